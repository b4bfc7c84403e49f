"""The update cases: kernels that do a whole update in one pass, and the plain torch a user would write for each.

Bytes are those the operation cannot avoid, normals those it cannot do without; P bytes are one element of x (4 for
fp32, 2 for bf16). Together they give a floor: moving the bytes at the speed of a copy, or drawing the normals as fast
as ``noise_fill_`` does, whichever takes longer. States are fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import DTYPES
from zoengine import ops

TILE = 1024
COLUMNS = 1024  # of the matrix that x is in the matrix cases
FACTOR = 8192  # elements of a factor in the case of packed noise
ADAM = {"beta1": 0.9, "one_minus_beta1": 0.1, "beta2": 0.99, "one_minus_beta2": 0.01, "root_correction": 1.5}
SMALL = 1e-4  # a coefficient that leaves the data what it is over thousands of calls


class Data:
    """The tensors that the cases of one dtype work on; ``elements`` is a multiple of 64 Ki."""

    def __init__(self, dtype: str, elements: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(1)
        self.x = torch.empty(elements, dtype=DTYPES[dtype], device=device).normal_(0, 0.02, generator=generator)
        self.y = self.x.clone()
        self.dtype, self.elements, self.device = dtype, elements, device
        self.seeds = torch.arange(1, 9, dtype=torch.int64, device=device)

    def full(self, value: float, count: int | None = None) -> Tensor:
        return torch.full((count or self.elements,), value, device=self.device)

    @functools.cached_property
    def m(self) -> Tensor:
        return self.full(0.01)

    @functools.cached_property
    def v(self) -> Tensor:
        return self.full(0.5)

    @functools.cached_property
    def largest(self) -> Tensor:
        return self.full(0.6)

    @functools.cached_property
    def mask(self) -> Tensor:
        """One byte an element, as torch has it."""
        return torch.arange(self.elements, device=self.device) % 3 == 0

    @functools.cached_property
    def a(self) -> Tensor:
        return self.full(0.02, COLUMNS)

    @functools.cached_property
    def factors(self) -> tuple[Tensor, Tensor]:
        rank = 8
        rows = self.elements // COLUMNS
        return self.full(0.1, rows * rank).view(rows, rank), self.full(0.1, COLUMNS * rank).view(COLUMNS, rank)

    def normal(self, k: int, like: Tensor | None = None) -> Tensor:
        """Noise in a temporary, as torch makes it; of x's dtype or of ``like``'s."""
        dtype = (self.x if like is None else like).dtype
        return torch.normal(0.0, 1.0, size=(self.elements,), dtype=dtype, device=self.device)


Call = Callable[[], object]


@dataclass(frozen=True)
class Update:
    """One update: what it costs per element, ours and today's way of it, each made for some data."""

    name: str
    extra_bytes: float  # beyond reading and writing x
    normals: float
    ours: Callable[[Data], Call]
    today: Callable[[Data], Call]
    x_bytes: int = 2  # times P: how often x is read and written

    def bytes(self, dtype: str, elements: int) -> int:
        return round((self.x_bytes * DTYPES[dtype].itemsize + self.extra_bytes) * elements)


UPDATES: dict[str, Update] = {}


def _update(name: str, extra_bytes: float, normals: float, today: Callable[[Data], Call], x_bytes: int = 2):
    def register(ours: Callable[[Data], Call]) -> None:
        UPDATES[name] = Update(name, extra_bytes, normals, ours, today, x_bytes)

    return register


@_update("add_scaled", 4 / TILE, 1, lambda d: (
    lambda: d.x.add_((d.normal(0).view(-1, TILE) * d.full(0.5, d.elements // TILE).to(d.x).unsqueeze(1)).view(-1),
                     alpha=SMALL)
))  # fmt: skip
def _add_scaled(d: Data) -> Call:
    scale = d.full(0.5, d.elements // TILE)
    return lambda: ops.add_noise_(d.x, d.seeds[:1], SMALL, scale=scale)


@_update("add_masked", 1 / 8, 1, lambda d: lambda: d.x.add_(d.normal(0).mul_(d.mask), alpha=SMALL))
def _add_masked(d: Data) -> Call:
    powers = 2 ** torch.arange(8, device=d.device, dtype=torch.uint8)
    mask = (d.mask.view(-1, 8).to(torch.uint8) * powers).sum(1, dtype=torch.uint8)
    return lambda: ops.add_noise_(d.x, d.seeds[:1], SMALL, mask=mask)


@_update("add_diagonal", 4, 1, lambda d: lambda: d.x.add_(d.normal(0) / d.v.sqrt(), alpha=SMALL))
def _add_diagonal(d: Data) -> Call:
    return lambda: ops.add_noise_(d.x, d.seeds[:1], SMALL, diag=d.v)


def _momentum_today(d: Data) -> Call:
    def call() -> Tensor:
        d.m.mul_(0.9).add_(d.normal(0, d.m), alpha=0.1)
        return d.x.mul_(1 - 1e-6).add_(d.m, alpha=-SMALL)

    return call


@_update("momentum", 8, 1, _momentum_today)
def _momentum(d: Data) -> Call:
    return lambda: ops.state_fold_(d.m, d.seeds[:1], 0.1, keep=0.9, x=d.x, x_keep=1 - 1e-6, x_coeffs=[0.0, 0.0, -SMALL])


@_update("fold_norm", 8, 1, lambda d: lambda: d.m.mul_(0.9).add_(d.normal(0, d.m), alpha=0.1).square().sum(), 0)
def _fold_norm(d: Data) -> Call:
    valid = torch.full((d.elements // TILE,), TILE, dtype=torch.int32, device=d.device)
    return lambda: ops.state_fold_(d.m, d.seeds[:1], 0.1, keep=0.9, valid=valid)


@_update("sign", 0, 1, lambda d: lambda: d.x.add_((d.normal(0) * 0.3).sign_(), alpha=-SMALL))
def _sign(d: Data) -> Call:
    return lambda: ops.rule_step_(d.x, "sign", [], d.seeds[:1], 0.3, {"step": -SMALL})


def _adam_today(d: Data, amsgrad: bool = False) -> Call:
    def call() -> Tensor:
        g = d.normal(0, d.m).mul_(0.3)
        d.m.mul_(ADAM["beta1"]).add_(g, alpha=ADAM["one_minus_beta1"])
        d.v.mul_(ADAM["beta2"]).addcmul_(g, g, value=ADAM["one_minus_beta2"])
        used = torch.maximum(d.largest, d.v, out=d.largest) if amsgrad else d.v
        return d.x.addcdiv_(d.m, used.sqrt().mul_(ADAM["root_correction"]).add_(1e-8), value=-SMALL)

    return call


@_update("adam", 16, 1, _adam_today)
def _adam(d: Data) -> Call:
    scalars = {**ADAM, "eps": 1e-8, "step": -SMALL}
    return lambda: ops.rule_step_(d.x, "adam", [d.m, d.v], d.seeds[:1], 0.3, scalars)


@_update("amsgrad", 24, 1, lambda d: _adam_today(d, amsgrad=True))
def _amsgrad(d: Data) -> Call:
    scalars = {**ADAM, "eps": 1e-8, "step": -SMALL}
    return lambda: ops.rule_step_(d.x, "amsgrad", [d.m, d.v, d.largest], d.seeds[:1], 0.3, scalars)


def _adamu_today(d: Data) -> Call:
    def call() -> Tensor:
        z0, z1 = d.normal(0, d.m), d.normal(1, d.m)
        m = 0.3 * z0 + 0.2 * z1 + 0.4 * d.m
        v = 0.2 * (0.7 * z0) ** 2 + 0.8 * (0.6 * z1 + d.m) ** 2
        d.m.copy_(m)
        return d.x.add_(m / (v + 1e-8).sqrt(), alpha=-SMALL)

    return call


@_update("adamu", 8, 2, _adamu_today)
def _adamu(d: Data) -> Call:
    scalars = {"state": 0.4, "first": 0.7, "second": 0.6, "beta2": 0.2, "one_minus_beta2": 0.8, "eps": 1e-8}
    scalars |= {"step": -SMALL, "sign": 1.0}
    return lambda: ops.rule_step_(d.x, "adamu", [d.m], d.seeds[:2], [0.3, 0.2], scalars)


def _hizoo_today(d: Data) -> Call:
    def call() -> Tensor:
        z = d.normal(0, d.v)
        root = d.v.sqrt()
        d.v.mul_(0.99 + 0.01 * (z * z - 1)).clamp_(min=0.1)
        return d.x.add_(z / root, alpha=-SMALL)

    return call


@_update("hizoo", 8, 1, _hizoo_today)
def _hizoo(d: Data) -> Call:
    scalars = {"keep": 0.99, "centre": 1.0, "floor": 0.1, "hessian_first": 0.0}
    return lambda: ops.rule_step_(d.x, "hizoo", [d.v], d.seeds[:1], [-SMALL, 0.01], scalars)


def _replay_today(d: Data) -> Call:
    def call() -> Tensor:
        m, v = d.full(0.0), d.full(0.0)
        for k in range(4):
            z = d.normal(k, m)
            m.add_(z, alpha=0.1)
            v.addcmul_(z, z, value=0.01)
        return d.x.addcdiv_(m, v.sqrt_().add_(1e-8), value=-SMALL)

    return call


@_update("adam_replay", 0, 4, _replay_today)
def _replay(d: Data) -> Call:
    scalars = {"root_correction": 1.0, "eps": 1e-8, "step": -SMALL}
    return lambda: ops.rule_step_(d.x, "adam_replay", [], d.seeds[:4], [0.1] * 4 + [0.01] * 4, scalars)


def _kron_today(d: Data, write: bool = True, score: bool = True) -> Call:
    def call() -> object:
        u = d.normal(0, d.a).view(-1, COLUMNS)
        dots = u @ d.a
        if write:
            d.x.view(-1, COLUMNS).add_(u - 0.3 * torch.outer(dots, d.a), alpha=SMALL)
        return SMALL * (u.t() @ dots - len(u) * d.a) if score else d.x

    return call


def _kron(d: Data, score: bool) -> Call:
    table = ops.Matrices.for_kron([0], [(d.elements // COLUMNS, COLUMNS)], d.device)
    kappa, into = d.full(0.3, 1), torch.empty_like(d.a) if score else None
    return lambda: ops.kron_rows_(d.x, d.a, kappa, table, d.seeds[:1], SMALL, score=into)


_update("kron", 0, 1, lambda d: _kron_today(d, score=False))(lambda d: _kron(d, score=False))
_update("kron_and_score", 0, 1, _kron_today)(lambda d: _kron(d, score=True))


@_update("kron_score", 0, 1, lambda d: _kron_today(d, write=False), 0)
def _kron_score(d: Data) -> Call:
    table = ops.Matrices.for_kron([0], [(d.elements // COLUMNS, COLUMNS)], d.device)
    return lambda: ops.kron_score(d.a, table, d.seeds[:1], SMALL)


def _lowrank_today(d: Data, rank: int) -> Call:
    left, right = (factor[:, :rank] for factor in d.factors)
    return lambda: d.x.view(-1, COLUMNS).add_(left @ right.t(), alpha=SMALL)


def _lowrank(d: Data, rank: int) -> Call:
    table = ops.Matrices.for_lowrank([0], [(d.elements // COLUMNS, COLUMNS)], rank, d.device)
    left, right = (factor[:, :rank].flatten() for factor in d.factors)
    return lambda: ops.lowrank_add_(d.x, left, right, table, SMALL, rank=rank)


for _rank in (2, 8):
    _update(f"lowrank{_rank}", 4 * _rank / COLUMNS, 0, functools.partial(_lowrank_today, rank=_rank))(
        functools.partial(_lowrank, rank=_rank)
    )


@_update("packed_noise", 0, 1, lambda d: lambda: [part.normal_() for part in d.y.split(FACTOR)], 1)
def _packed(d: Data) -> Call:
    starts = torch.arange(0, d.elements, FACTOR, device=d.device)
    lengths = torch.full_like(starts, FACTOR)
    return lambda: ops.segment_noise_fill_(d.y, d.seeds[:1], starts, lengths, 7 * starts + 5, stream=2)


def _quantile_today(d: Data) -> Call:
    return lambda: [part.abs().kthvalue(-(-len(part) // 2)).values for part in d.x.split(1 << 20)]


@_update("quantile", 0, 0, _quantile_today, 3)  # three histograms
def _quantile(d: Data) -> Call:
    starts = torch.arange(0, d.elements, 1 << 20)
    lengths = (d.elements - starts).clamp(max=1 << 20)
    return lambda: ops.segment_quantile(d.x, starts.to(d.device), lengths.to(d.device), 0.5)


@_update("mask_below", 1 / 8, 0, lambda d: (
    lambda: d.x.view(-1, TILE).abs() <= d.full(2.0**-7, d.elements // TILE).to(d.x).unsqueeze(1)
), 1)  # fmt: skip
def _mask_below(d: Data) -> Call:
    thresholds = d.full(2.0**-7, d.elements // TILE)
    return lambda: ops.mask_below(d.x, thresholds)
