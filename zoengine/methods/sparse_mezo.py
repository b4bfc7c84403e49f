"""Sparse-MeZO: Liu et al. 2024, "Sparse MeZO: Less Parameters for Better Performance"."""

from __future__ import annotations

import dataclasses

import torch

from zoengine import ops
from zoengine.directions import Call, Step
from zoengine.methods.base import Run
from zoengine.methods.fields import Fields, require
from zoengine.methods.mezo import MeZO
from zoengine.transforms import Dense, Masked, is_adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseFields(Fields):
    """Fields of Sparse-MeZO."""

    sparsity: float = dataclasses.field(
        default=0.75, metadata={"help": "share of each matrix, its largest weights, that is left alone, in [0, 1)"}
    )
    mask_interval: int = dataclasses.field(
        default=1, metadata={"help": "steps after which the mask is taken from the weights anew; 0: never"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.sparsity < 1, self, "sparsity", "in [0, 1)")
        require(self.mask_interval >= 0, self, "mask_interval", "at least 0")


class SparseMeZO(MeZO):
    """MeZO on the small weights: where |theta| <= tau, with tau the 1 - sparsity quantile of its matrix at the start.

    The mask is taken from theta at the start of a step, never from perturbed weights; weight decay follows it.
    Vectors, LoRA factors and prefixes are trained whole. Sparsity 0 masks nothing (tau is infinite). A masked weight
    does not move, so with fixed tau the masked set only grows.
    """

    name = "sparse-mezo"
    Fields = SparseFields
    transform: Masked

    def make_transform(self) -> Dense:
        segments, sparsity = self.arena.segments, self.fields.sparsity
        thresholds = torch.full((len(segments),), float("inf"))
        for buffer, x in enumerate(self.arena.buffers):
            chosen = [
                k for k, s in enumerate(segments)
                if s.buffer == buffer and s.ndim >= 2 and s.numel and not is_adapter(s.name)
            ]  # fmt: skip
            if sparsity and chosen:
                starts, lengths = [segments[k].start for k in chosen], [segments[k].numel for k in chosen]
                thresholds[chosen] = ops.segment_quantile(x, starts, lengths, 1 - sparsity).cpu()
        transform = Masked(self.arena, self.fields.noise, self._states, thresholds)
        self._states.tensors["thresholds"] = [thresholds]
        if self.fields.mask_interval != 1:  # else the weights tell
            self._states.tensors["mask"] = transform.bits
        return transform

    def _restored(self) -> None:
        self.transform.place_thresholds()

    def run(self, step: Step) -> Run:
        interval = self.fields.mask_interval
        if interval and step.number % interval == 0:
            yield Call(self.transform.refresh, prepares=True)
        return (yield from super().run(step))
