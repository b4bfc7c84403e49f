"""The kernel cases: what each computes, the bytes it has to move, and what one would write today instead.

Bytes are those the operation cannot avoid: every tensor it needs read once and every tensor it makes written once, at
P bytes per element (4 for fp32, 2 for bf16 and fp16). Noise costs no bytes.

    copy            2P        read, write
    normal_add      4P K      per term: write z, read x and z, write x     (today's way, shown for comparison)
    noise_fill      P         write
    add_noise_      2P + 4J   read x, write x or ``out``; J fp32 states are read
    segment_stats   P         read
    segment_dot     2P        read x and y, of one dtype
    segment_dot     P         read x; against z(seed)

Caches that fetch a line before writing it move more than that; the copy they are compared with does so too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.baselines import normal_add_
from zoengine import ops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SEGMENT = 1 << 20  # elements of a segment in the segment cases

# What a case is compared with, by key.
BASELINES = {
    "copy": None,
    "normal_add": None,
    "noise_fill": "torch.normal",
    "add_noise": "torch.normal + add_ per term",
    "segment_stats": "x.sum, x * x sum, aminmax",
    "segment_dot": "torch.dot",
    "segment_dot_noise": "torch.normal + torch.dot",
}


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    ``op`` is a key of ``BASELINES``; ``terms`` counts noise terms, ``states`` fp32 states, ``out`` says that the result
    goes to another tensor, and ``decay`` that x is scaled.
    """

    op: str
    dtype: str
    terms: int = 0
    noise: str = "gaussian"
    rounding: str = "nearest"
    states: int = 0
    out: bool = False
    decay: bool = False

    @property
    def name(self) -> str:
        parts = [self.op, self.dtype]
        if self.op in ("add_noise", "normal_add"):
            parts.append(f"k{self.terms}")
        if self.op in ("add_noise", "noise_fill", "segment_dot_noise"):
            parts.append(self.noise)
        if self.op == "add_noise" and self.dtype != "fp32":
            parts.append(self.rounding)
        parts += [f"states{self.states}"] * (self.states > 0) + ["decay"] * self.decay + ["out"] * self.out
        return "/".join(parts)

    def bytes(self, elements: int) -> int:
        """Bytes the operation has to move for ``elements``; the table is in the module's text."""
        p = DTYPES[self.dtype].itemsize
        per_element = {
            "copy": 2 * p,
            "normal_add": 4 * p * self.terms,
            "noise_fill": p,
            "add_noise": 2 * p + 4 * self.states,
            "segment_stats": p,
            "segment_dot": 2 * p,
            "segment_dot_noise": p,
        }[self.op]
        return per_element * elements

    @property
    def group(self) -> tuple:
        """Cases with one key are timed in the same rounds, against the same baseline."""
        return (self.dtype, "add_noise" if self.op == "normal_add" else self.op, self.terms)


class Workspace:
    """The tensors that the cases of one dtype work on. Seeds and coefficients lie on the device, as in a captured
    graph, so that no case times a transfer."""

    def __init__(self, dtype: str, elements: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(1)
        self.x = torch.empty(elements, dtype=DTYPES[dtype], device=device).normal_(0, 0.02, generator=generator)
        self.y = self.x.clone()
        self.dtype, self.elements, self.device = dtype, elements, device

    @functools.cached_property
    def states(self) -> list[Tensor]:
        return [torch.full((self.elements,), 0.01, dtype=torch.float32, device=self.device) for _ in range(2)]

    @functools.cached_property
    def segments(self) -> tuple[Tensor, Tensor]:
        starts = torch.arange(0, self.elements, SEGMENT)
        lengths = (self.elements - starts).clamp(max=SEGMENT)
        return starts.to(self.device), lengths.to(self.device)

    def seeds(self, count: int) -> Tensor:
        return torch.arange(1, count + 1, dtype=torch.int64, device=self.device)

    def coeffs(self, count: int) -> Tensor:
        # of both signs, so that x stays what it is over thousands of calls
        return torch.tensor([1e-3, -1e-3] * count, device=self.device)[:count]


def cases(dtypes: Iterable[str]) -> list[Case]:
    """All cases, those of one group next to each other."""
    found: list[Case] = []
    for dtype in dtypes:
        roundings = ("nearest",) if dtype == "fp32" else ("nearest", "stochastic")
        found += [Case("copy", dtype)]
        found += [Case("noise_fill", dtype, noise=noise) for noise in ("gaussian", "rademacher")]
        for k in (1, 2, 4):
            found += [Case("normal_add", dtype, terms=k)]
            found += [
                Case("add_noise", dtype, k, noise, rounding)
                for noise in ("gaussian", "rademacher")
                for rounding in roundings
            ]
            if k == 1:
                found += [
                    Case("add_noise", dtype, k, rounding=roundings[-1], states=1),
                    Case("add_noise", dtype, k, rounding=roundings[-1], states=2),
                    Case("add_noise", dtype, k, rounding=roundings[-1], decay=True),
                    Case("add_noise", dtype, k, out=True),
                ]
        found += [Case("segment_stats", dtype), Case("segment_dot", dtype)]
        found += [Case("segment_dot_noise", dtype, noise=noise) for noise in ("gaussian", "rademacher")]
    return found


def is_main(case: Case) -> bool:
    """Whether a case is worth measuring at every size: one term in place, and the noise alone."""
    plain = not (case.states or case.out or case.decay)
    return case.op == "noise_fill" or (case.op == "add_noise" and case.terms == 1 and plain)


def ours(case: Case, work: Workspace) -> Callable[[], object]:
    """The case as a call of ours, or torch's where the case is torch's (copy, normal_add)."""
    x, y = work.x, work.y
    if case.op == "copy":
        return lambda: y.copy_(x)
    if case.op == "normal_add":
        return lambda: [normal_add_(x, (-1) ** k * 1e-3) for k in range(case.terms)]
    seed = work.seeds(1)
    if case.op == "noise_fill":
        return lambda: ops.noise_fill_(y, seed, noise=case.noise)
    if case.op == "segment_stats":
        return lambda: ops.segment_stats(x, *work.segments)
    if case.op == "segment_dot":
        return lambda: ops.segment_dot(x, *work.segments, y=y)
    if case.op == "segment_dot_noise":
        return lambda: ops.segment_dot(x, *work.segments, seed=seed, noise=case.noise)
    seeds, coeffs = work.seeds(case.terms), work.coeffs(case.terms)
    states, state_coeffs = work.states[: case.states] if case.states else [], work.coeffs(case.states)
    decay = torch.tensor(1e-6, device=work.device) if case.decay else 0.0
    return lambda: ops.add_noise_(
        x, seeds, coeffs, noise=case.noise, states=states, state_coeffs=state_coeffs, decay=decay,
        out=y if case.out else None, rounding=case.rounding, sr_seed=seed,
    )  # fmt: skip


def today(case: Case, work: Workspace) -> Callable[[], object] | None:
    """What ``BASELINES`` says for the case, or None where there is nothing to compare with."""
    x, y = work.x, work.y
    if case.op == "noise_fill":
        return lambda: torch.normal(0.0, 1.0, size=(work.elements,), dtype=x.dtype, device=x.device)
    if case.op == "normal_add":
        return ours(case, work)
    if case.op == "add_noise":
        return ours(Case("normal_add", case.dtype, case.terms), work)
    if case.op == "segment_stats":
        return lambda: (x.sum(), (x * x).sum(), x.aminmax())
    if case.op == "segment_dot":
        return lambda: torch.dot(x, y)
    if case.op == "segment_dot_noise":
        return lambda: torch.dot(x, torch.normal(0.0, 1.0, size=(work.elements,), dtype=x.dtype, device=x.device))
    return None
