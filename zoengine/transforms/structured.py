"""What the transforms of matrices share: a span of the arena as a set of matrices and the dense rest of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoengine.arena import Arena, Segment, Span
from zoengine.directions import Fold, Term
from zoengine.transforms.dense import Dense, rounding
from zoengine.transforms.states import States


@dataclass(frozen=True)
class Part:
    """A span's matrices that the transform acts on, and the stretches where z stays dense.

    Attributes:
        segments: the matrices, those of equal shape next to each other.
        shapes: (rows, columns) of each, first dimension by product of the others unless the transform reshapes it.
        dense: the rest, as spans of their own.
        slot: where a state's tensor for the matrices stands in the list of its tensors; those of ``dense`` follow.
    """

    span: Span
    segments: tuple[Segment, ...]
    shapes: tuple[tuple[int, int], ...]
    dense: tuple[Span, ...]
    slot: int

    def groups(self) -> list[tuple[tuple[int, int], int]]:
        """The distinct shapes in order, with the number of matrices of each."""
        return [(shape, len(list(members))) for shape, members in itertools.groupby(self.shapes)]


class Place(NamedTuple):
    """What an op reads, where it writes (None: there too), and how it counts and rounds."""

    x: Tensor
    out: Tensor | None
    how: dict[str, Any]


class Structured(Dense):
    """Base of transforms that treat matrices in their own way and leave vectors dense.

    States are stored per part: one packed tensor for its matrices (:meth:`matrix_state`), then one per dense stretch.

    Args:
        shape_of: the (rows, columns) a segment has for the transform, or None to leave it dense.
    """

    fuses = False

    def __init__(
        self, arena: Arena, noise: str, states: States, shape_of: Callable[[Segment], tuple[int, int] | None]
    ) -> None:
        super().__init__(arena, noise, states)
        self.parts: list[Part] = []
        slots = 0
        for span in arena.group_spans:
            inside = [
                s for s in arena.segments if s.buffer == span.buffer and span.start <= s.start < span.stop and s.numel
            ]
            shapes = [shape_of(s) for s in inside]
            chosen = [(s, shape) for s, shape in zip(inside, shapes, strict=True) if shape is not None]
            chosen.sort(key=lambda pair: pair[1])  # equal shapes side by side: batched products are views then
            dense = _stretches(span, [s for s, shape in zip(inside, shapes, strict=True) if shape is None])
            segments, found = tuple(s for s, _ in chosen), tuple(shape for _, shape in chosen)
            self.parts.append(Part(span, segments, found, tuple(dense), slots))
            slots += bool(segments) + len(dense)
        self._part_of = {part.span: part for part in self.parts}

    def spans(self, by_group: bool) -> Sequence[Span]:
        return [part.span for part in self.parts]

    def new_state(self) -> list[Tensor]:
        tensors = []
        for part in self.parts:
            device = self.arena.buffers[part.span.buffer].device
            sizes = [self.matrix_state(part)] if part.segments else []
            sizes += [d.stop - d.start for d in part.dense]
            tensors += [torch.zeros(size, dtype=torch.float32, device=device) for size in sizes]
        return tensors

    def matrix_state(self, part: Part) -> int:
        """Elements of a state for the matrices of ``part``."""
        raise NotImplementedError

    def add_matrices(self, part: Part, terms: Sequence[Term], at: Place, keep: float) -> None:
        """As :meth:`Dense.add`, over the matrices of ``part``."""
        raise NotImplementedError

    def fold_matrices(self, part: Part, fold: Fold) -> None:
        """As :meth:`Dense.fold`, over the matrices of ``part``."""
        raise NotImplementedError

    def add(
        self,
        span: Span,
        source: Sequence[Tensor],
        terms: Sequence[Term],
        *,
        keep: float = 1.0,
        target: Sequence[Tensor] | None = None,
        sr_seed: int | None = None,
    ) -> None:
        part = self._part_of[span]
        terms = [t for t in terms if t.coeff != 0.0]
        if part.segments and (terms or keep != 1.0 or target is not None):
            where, buffer = slice(span.start, span.stop), span.buffer
            how = {"offset": span.index, "rounding": rounding(sr_seed), "sr_seed": sr_seed or 0}
            at = Place(source[buffer][where], None if target is None else target[buffer][where], how)
            self.add_matrices(part, terms, at, keep)
        for stretch in part.dense:
            super().add(stretch, source, terms, keep=keep, target=target, sr_seed=sr_seed)

    def fold(self, fold: Fold) -> None:
        if fold.norm:
            raise ValueError(f"{type(self).__name__} has no norm of a state; methods that need one are dense")
        for part in self.parts:
            if part.segments:
                self.fold_matrices(part, fold)
            for stretch in part.dense:
                self.fold_span(stretch, replace(fold, keep=self.dense_keep(fold.keep)))

    def dense_keep(self, keep: float) -> float:
        """What a fold keeps of the state of dense stretches."""
        return keep

    def _slice(self, name: str, span: Span) -> Tensor:
        part = next(p for p in self.parts if span in p.dense)
        return self.states.tensors[name][part.slot + bool(part.segments) + part.dense.index(span)]


def matrix_shape(segment: Segment) -> tuple[int, int] | None:
    """(first dimension, product of the others) of a matrix; None for a vector."""
    return (segment.shape[0], segment.numel // segment.shape[0]) if segment.ndim >= 2 else None


def _stretches(span: Span, segments: Sequence[Segment]) -> list[Span]:
    """The segments of a span as few contiguous spans, padding included."""
    found: list[Span] = []
    for s in segments:
        stop = s.start + s.numel + -s.numel % 1024
        if found and found[-1].stop == s.start:
            found[-1] = replace(found[-1], stop=stop)
        else:
            found.append(replace(span, start=s.start, stop=stop, index=s.index))
    return found
