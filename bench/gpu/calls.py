"""One call of every op on small data, with all of its numbers in tensors on the device, as graphs need them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import DTYPES
from zoengine import ops
from zoengine.noise import table
from zoengine.ops.schema import RULES, SCHEMAS, TRANSFORMS

TILE = 1024
STARTS, SHAPES = (8, 40_000), ((33, 1040), (7, 130))  # of the matrices in x
ELEMENTS = 48 * TILE


@dataclass
class Call:
    """An op on tensors of its own.

    ``function`` runs it and returns what it returns; ``written`` are the tensors it changes, ``seeds`` and ``numbers``
    those it reads its seeds and coefficients from.
    """

    op: str
    name: str
    function: Callable[[], Tensor | None]
    written: list[Tensor]
    seeds: list[Tensor]
    numbers: list[Tensor]

    def __post_init__(self) -> None:
        self._before = [tensor.clone() for tensor in self.written]

    def reset(self) -> None:
        """Give the tensors that the op changes their first values again."""
        for tensor, before in zip(self.written, self._before, strict=True):
            tensor.copy_(before)

    def renew(self) -> None:
        """Other seeds and coefficients, in the same tensors."""
        for tensor in self.seeds:
            tensor.mul_(7919).add_(12345)
        for tensor in self.numbers:
            tensor.mul_(0.5)

    def run(self) -> list[Tensor]:
        """Reset, run, and return everything the op changed or returned."""
        self.reset()
        result = self.function()
        return [*self.written, *([] if result is None else [result])]


class _Inputs:
    """Tensors of one call; made anew for each, so that no call changes another's."""

    def __init__(self, dtype: str, device: torch.device) -> None:
        self._generator = torch.Generator().manual_seed(3)
        self._device, self.dtype = device, DTYPES[dtype]
        self.seeds, self.numbers = [], []

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self._device)

    def weights(self) -> Tensor:
        return self.normal(ELEMENTS).to(self.dtype)

    def positive(self) -> Tensor:
        return self.normal(ELEMENTS).abs() + 0.1

    def number(self, *values: float) -> Tensor:
        self.numbers.append(torch.tensor(values, device=self._device))
        return self.numbers[-1]

    def seed(self, count: int = 1) -> Tensor:
        self.seeds.append(torch.arange(1, count + 1, device=self._device))
        return self.seeds[-1]

    def ints(self, *values: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)

    def terms(self, count: int, sets: int = 1, extra: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        coeffs = self.number(*(0.3 - 0.1 * k for k in range(sets * count + extra)))
        return self.seed(count), torch.arange(count, device=self._device) % 3, coeffs


def calls(dtype: str, device: torch.device) -> list[Call]:
    """Every op of the schema, most of them in more than one form, on weights of ``dtype``."""
    found: list[Call] = []

    def add(op: str, name: str, inputs: _Inputs, written: list[Tensor], *args, **kwargs) -> None:
        function = getattr(torch.ops.zoengine, op)
        call = Call(op, name, lambda: function(*args, **kwargs), written, inputs.seeds, inputs.numbers)
        found.append(call)

    def fresh() -> _Inputs:
        return _Inputs(dtype, device)

    gaussian, plain = table.GAUSSIAN, TRANSFORMS["none"]
    for label, count, noise, stochastic, states in (
        ("gaussian", 1, gaussian, False, 0),
        ("rademacher", 1, table.RADEMACHER, False, 0),
        ("stochastic", 1, gaussian, True, 0),
        ("four terms, two states", 4, gaussian, True, 2),
    ):
        i = fresh()
        x, held = i.weights(), [i.normal(ELEMENTS) for _ in range(states)]
        keep, rounding = (i.number(0.9) if states else None), (i.seed() if stochastic else None)
        terms = i.terms(count, extra=states)
        add("add_noise_", f"add_noise_ {label}", i, [x], x, *terms, held, keep, rounding, 0, noise, plain, None)
    for transform in ("scale", "mask", "diag"):
        i = fresh()
        x = i.weights()
        operand = {
            "scale": lambda i: i.normal(ELEMENTS // TILE),
            "mask": lambda i: (i.normal(ELEMENTS // 8).abs() * 99).to(torch.uint8),
            "diag": lambda i: i.positive(),
        }[transform](i)
        rest = ([], None, None, 0, gaussian, TRANSFORMS[transform], operand)
        add("add_noise_", f"add_noise_ {transform}", i, [x], x, *i.terms(1), *rest)
    i = fresh()
    x = i.weights()
    out = torch.zeros_like(x)
    add("add_noise_out", "add_noise_out", i, [out], x, *i.terms(1), [], None, None, 0, gaussian, plain, None, out=out)
    i = fresh()
    out = i.weights()
    add("noise_fill_", "noise_fill_", i, [out], out, i.seed(), 0, 0, gaussian)
    i = fresh()
    state, x, valid = i.normal(ELEMENTS), i.weights(), i.ints(*[1000] * (ELEMENTS // TILE), dtype=torch.int32)
    rest = (i.number(0.9), i.number(0.2, 0.1, -0.3), i.number(0.8), i.seed(), valid, 0, gaussian)
    add("state_fold_", "state_fold_", i, [state, x], state, x, *i.terms(1), *rest)
    for rule, (number, states, names) in RULES.items():
        i = fresh()
        x, held = i.weights(), [i.positive() for _ in range(states)]
        terms = i.terms(2 if rule == "adamu" else 1, sets=2 if rule in ("hizoo", "adam_replay") else 1)
        rest = (i.number(*(0.4 + 0.05 * k for k in range(len(names)))), i.number(0.9), i.seed(), 0, gaussian, number)
        add("rule_step_", f"rule_step_ {rule}", i, [x, *held], x, held, *terms, *rest)
    _matrix_calls(fresh, add)
    _segment_calls(fresh, add)
    missing = set(SCHEMAS) - {call.op for call in found}
    if missing:
        raise RuntimeError(f"bench/gpu/calls.py calls every op of the schema but {', '.join(sorted(missing))}")
    return found


def _matrix_calls(fresh: Callable[[], _Inputs], add: Callable[..., None]) -> None:
    for op in ("kron_rows_", "kron_rows_out"):
        i = fresh()
        matrices = ops.Matrices.for_kron(STARTS, SHAPES, i._device)
        x, a, kappa = i.weights(), i.normal(matrices.sizes[0]), i.number(0.3, 0.2)
        score, out = torch.zeros_like(a), torch.zeros_like(x)
        seeds, _, coeffs = i.terms(2)
        args = (a, kappa, matrices.table, seeds, coeffs, i.number(0.9), i.seed(), score, 0, table.GAUSSIAN)
        named = {"out": out} if op == "kron_rows_out" else {}
        written = [out if named else x, score]
        add(op, op, i, written, x, *args, matrices.blocks, matrices.widest, **named)
    i = fresh()
    matrices = ops.Matrices.for_kron(STARTS, SHAPES, i._device)
    a, (seeds, _, coeffs) = i.normal(matrices.sizes[0]), i.terms(1)
    extents = (0, table.GAUSSIAN, matrices.blocks, matrices.widest)
    add("kron_score", "kron_score", i, [], a, matrices.table, seeds, coeffs, *extents)
    for op in ("lowrank_add_", "lowrank_add_out"):
        i = fresh()
        matrices = ops.Matrices.for_lowrank(STARTS, SHAPES, 3, i._device)
        x, (left, right) = i.weights(), (i.normal(size) for size in matrices.sizes)
        out = torch.zeros_like(x)
        args = (left, right, matrices.table, i.number(0.3), i.number(0.9), i.seed(), 0, 3)
        named = {"out": out} if op == "lowrank_add_out" else {}
        add(op, op, i, [out if named else x], x, *args, matrices.blocks, matrices.widest, **named)


def _segment_calls(fresh: Callable[[], _Inputs], add: Callable[..., None]) -> None:
    i = fresh()
    out, places = i.normal(ELEMENTS), (i.ints(0, 9000), i.ints(8192, 700), i.ints(4096, 2**34 - 300))
    add("segment_noise_fill_", "segment_noise_fill_", i, [out], out, i.seed(), *places, 2, table.GAUSSIAN)
    segments = ((0, 1024, 30_001), (1024, 20_000, 5000))
    i = fresh()
    add("segment_stats", "segment_stats", i, [], i.weights(), *(i.ints(*s) for s in segments))
    i = fresh()
    add("segment_dot", "segment_dot", i, [], i.weights(), i.weights(), *(i.ints(*s) for s in segments))
    i = fresh()
    args = (i.weights(), i.seed(), *(i.ints(*s) for s in segments), 0, 0, table.GAUSSIAN)
    add("segment_dot_noise", "segment_dot_noise", i, [], *args)
    i = fresh()
    args = (i.weights(), *(i.ints(*s) for s in segments), i.ints(0, 0, 0), 0)
    add("segment_histogram", "segment_histogram", i, [], *args)
    i = fresh()
    bits = i.ints(*[0] * (ELEMENTS // 8), dtype=torch.uint8)
    add("mask_below_", "mask_below_", i, [bits], bits, i.weights(), i.normal(ELEMENTS // TILE).abs())
