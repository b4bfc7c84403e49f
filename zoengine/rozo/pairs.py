"""LoRA pairs in an arena: found by their names, grouped by shape, read and written as one batch per group."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoengine.arena import ArenaError, Segment

# base_model.model.layers.0.q_proj.lora_A.default.weight: what peft calls the factors of a linear layer
_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?P<adapter>\.[^.]+)?\.weight")


class AdapterError(ArenaError):
    """What is to be trained is not LoRA adapters that RoZO can train; the message names the parameter and remedy."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The factors of one adapter, W = W0 + s B A: positions in the arena's segments; B is m x rank, A rank x n."""

    module: str
    B: int
    A: int
    m: int
    n: int
    rank: int


def find_pairs(segments: Sequence[Segment]) -> list[Pair]:
    """The LoRA pairs that ``segments`` consist of, in their order.

    Raises:
        AdapterError: there are none, something is not part of a pair, half of one is missing, the halves do not fit
            together, or they stand in different parameter groups.
    """
    halves: dict[tuple[str, str], dict[str, int]] = {}
    others = []
    for k, segment in enumerate(segments):
        match = _NAME.fullmatch(segment.name)
        if match and segment.ndim == 2:
            halves.setdefault((match["module"], match["adapter"] or ""), {})[match["factor"]] = k
        else:
            others.append(segment.name)
    if not halves:
        raise AdapterError(
            f"RoZO trains LoRA adapters only, and found none among {_some(others)}; wrap the model with peft "
            "(peft.get_peft_model(model, peft.LoraConfig(...)), or tuning.kind: lora) and give the optimizer the model"
        )
    if others:
        raise AdapterError(
            f"RoZO trains LoRA adapters of linear layers only; freeze {_some(others)} with requires_grad_(False)"
        )
    return [_pair(segments, module + adapter, factors) for (module, adapter), factors in halves.items()]


def _pair(segments: Sequence[Segment], module: str, factors: dict[str, int]) -> Pair:
    if len(factors) == 1:
        (factor,), (other,) = factors, {"A", "B"} - set(factors)
        raise AdapterError(
            f"{segments[factors[factor]].name!r} is trained and lora_{other} of {module!r} is not; a pair moves as "
            "one: train both or freeze both"
        )
    B, A = segments[factors["B"]], segments[factors["A"]]
    (m, rank), (inner, n) = B.shape, A.shape
    if rank != inner:
        raise AdapterError(f"{B.name!r} is {m} x {rank} and {A.name!r} is {inner} x {n}; their product does not exist")
    if (B.group, B.buffer) != (A.group, A.buffer):
        raise AdapterError(
            f"{B.name!r} and {A.name!r} are in different parameter groups, of different dtypes or on different "
            "devices; a pair moves as one: keep them together"
        )
    return Pair(module, factors["B"], factors["A"], m, n, rank)


def check_rank(pair: Pair, offset: bool, retracts: bool) -> int:
    """The rank of the point that ``pair`` carries: all of its rank, or half with an offset.

    Raises:
        AdapterError: an odd rank cannot be halved, or ``retracts`` and 2 r > min(m, n): a step from Y has rank 2 r.
    """
    if offset and pair.rank % 2:
        raise AdapterError(
            f"{pair.module!r} has rank {pair.rank}; rozo_offset keeps the start in half of the adapter and needs an "
            "even rank: change lora_r, or set rozo_offset to false"
        )
    r = pair.rank // 2 if offset else pair.rank
    if retracts and 2 * r > min(pair.m, pair.n):
        raise AdapterError(
            f"{pair.module!r} is {pair.m} x {pair.n} and its adapter a point of rank {r}; retraction by SVD needs "
            f"2 rank <= {min(pair.m, pair.n)}: take a smaller lora_r, leave this module out, or set rozo_retract to "
            "factor"
        )
    return r


class Stack:
    """Pairs of one shape, rank r and parameter group, which every operation takes as one batch of G."""

    def __init__(self, pairs: Sequence[Pair], rank: int, group: int) -> None:
        self.pairs = list(pairs)
        self.rank = rank
        self.group = group

    def of(self, views: Sequence[Tensor]) -> Factors:
        """Their first ``rank`` columns and rows in ``views``, which are tensors shaped like the arena's segments."""
        B = [views[pair.B][:, : self.rank] for pair in self.pairs]
        return Factors(B, [views[pair.A][: self.rank] for pair in self.pairs])


class Factors:
    """The memory of (B, A) of one stack; read and written in one launch each, without a loop over pairs."""

    def __init__(self, B: list[Tensor], A: list[Tensor]) -> None:
        self._views = B, A

    def read(self) -> tuple[Tensor, Tensor]:
        """B (G, m, r) and A (G, r, n), float64 copies."""
        B, A = (torch.stack(views).double() for views in self._views)
        return B, A

    def write(self, B: Tensor, A: Tensor) -> None:
        """Round B (G, m, r) and A (G, r, n) to where they are kept."""
        for views, values in zip(self._views, (B, A), strict=True):
            torch._foreach_copy_(views, list(values.to(views[0].dtype).unbind()))


def stacks(segments: Sequence[Segment], offset: bool, retracts: bool) -> list[Stack]:
    """All of ``segments`` as stacks of equal pairs; see :func:`find_pairs` and :func:`check_rank` for errors."""
    found: dict[tuple, list[Pair]] = {}
    for pair in find_pairs(segments):
        r = check_rank(pair, offset, retracts)
        where = segments[pair.B]
        found.setdefault((where.group, where.buffer, pair.m, pair.n, r), []).append(pair)
    return [Stack(pairs, key[-1], key[0]) for key, pairs in found.items()]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
