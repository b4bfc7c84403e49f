"""What every launcher shares: how a group is shaped, and how a range of the arena is cut into groups."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from zoengine.noise import table

WARPS = 4


@dataclass(frozen=True)
class NoiseConfig:
    """Shape of a group (see ``noise.py``). Chosen by reading SASS, never by running."""

    tiles: int
    rows: int
    registers: int | None = None  # cap where the compiler takes more than it needs (NVIDIA)

    @property
    def span(self) -> int:
        """Elements of a group."""
        return self.tiles * self.rows * table.LANES


@dataclass(frozen=True)
class Part:
    """One launch: groups ``first, first + step, ...``, one a program, from element ``start`` of the tensor on."""

    first: int
    step: int
    programs: int
    start: int
    edge: bool


# Kernels that write fp32 states: four elements a thread in a row, two passes of four rows. Eight would make 16 bytes of
# bf16, but then each fp32 store passes through shared memory, and the states take twice the registers.
STATE_CONFIG = NoiseConfig(tiles=2, rows=8)


def noise_config(noise: int, *, stochastic: bool = False, loop: bool = False) -> NoiseConfig:
    """32 elements a thread; 64 where one Philox call serves eight rows: signs, bits for stochastic rounding."""
    rows = 4 if noise == table.GAUSSIAN and not stochastic else 8
    return NoiseConfig(tiles=4, rows=rows, registers=168 if stochastic and loop else None)


def compile_options(ptx: bool, registers: int | None = None, warps: int = WARPS) -> dict[str, object]:
    """Options of a kernel. The bits depend on products and sums not being contracted."""
    return {"num_warps": warps, "enable_fp_fusion": False} | ({"maxnreg": registers} if ptx and registers else {})


def parts(offset: int, n: int, span: int, *, whole: bool = True) -> list[Part]:
    """Cut arena indices ``offset .. offset + n`` into whole groups and the at most two groups at the ends.

    Whole groups need no masks; a tensor that starts and ends at multiples of ``span`` needs one launch only.
    ``whole`` false treats all groups as ends.
    """
    end = offset + n
    if not whole:
        begin = offset // span
        return [Part(begin, 1, -(-end // span) - begin, 0, edge=True)] if n else []
    first, last = -(-offset // span), end // span
    result = []
    if first < last:
        result.append(Part(first, 1, last - first, first * span - offset, edge=False))
    ends = sorted({i // span for i in (offset, end) if i % span}) if n else []
    if ends:
        result.append(Part(ends[0], ends[-1] - ends[0], len(ends), 0, edge=True))
    return result


def uses_ptx(x: Tensor) -> bool:
    """Whether kernels on ``x`` may use NVIDIA inline assembly."""
    return x.is_cuda and torch.version.hip is None and not triton.knobs.runtime.interpret


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; make it that of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
