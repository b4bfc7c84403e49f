"""``out = keep x + sum_k coeffs[k] T(z(seeds[k])) + sum_j coeffs[K + j] states[j]``, rounded once, in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from zoengine.kernels import launch
from zoengine.kernels.groups import (
    TILE,
    add_noise_rows,
    add_rows,
    load_row,
    load_rows,
    noise_rows,
    place,
    rounded_row,
    rounding_bits,
    store_row,
)
from zoengine.kernels.noise import GAUSSIAN, LANES, anchor
from zoengine.kernels.rounding import widen

from zoengine.ops.schema import TRANSFORMS

_SCALE = tl.constexpr(TRANSFORMS["scale"])
_MASK = tl.constexpr(TRANSFORMS["mask"])
_DIAG = tl.constexpr(TRANSFORMS["diag"])


@triton.jit
def _factors(
    ptr, group, n, offset, ROW: tl.constexpr, EDGE: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """The factor of the arena's 1024-tiles that row ``ROW`` of a group belongs to, shape (TILES, 1)."""
    tile = (group * TILES + tl.arange(0, TILES)[:, None]) * (ROWS // 4) + ROW // 4 - offset // TILE
    last = (offset % TILE + n - 1) // TILE
    return tl.load(ptr + tile, mask=(tile >= 0) & (tile <= last) if EDGE else None)


@triton.jit
def _operand_rows(
    ptr, group, begin, index, low, high, n, offset, ROW: tl.constexpr, PASS: tl.constexpr, TRANSFORM: tl.constexpr,
    EDGE: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What multiplies or divides the noise of ``PASS`` rows, the same for every term."""
    result = ()
    if TRANSFORM == _SCALE:
        for row in tl.static_range(PASS):
            result += (_factors(ptr, group, n, offset, ROW + row, EDGE, TILES, ROWS),)
    elif TRANSFORM == _DIAG:
        for row in tl.static_range(PASS):
            result += (tl.sqrt_rn(load_row(ptr + begin, index + (ROW + row) * LANES, low, high, EDGE)),)
    return result


@triton.jit
def _add_term(
    acc, operands, seed, stream, coeff, group, zero, ROW: tl.constexpr, PASS: tl.constexpr, TRANSFORM: tl.constexpr,
    NOISE: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """``fma(coeff, T(z(seed)), acc)`` for the rows ``ROW ...`` of a group."""
    ELEMENTWISE: tl.constexpr = (TRANSFORM == _SCALE) | (TRANSFORM == _DIAG)
    if not ELEMENTWISE:
        return add_noise_rows(acc, coeff, seed, stream, group, zero, ROW, PASS, NOISE, TILES, ROWS, PTX)
    else:
        z = noise_rows(seed, stream, group, zero, ROW, PASS, NOISE, TILES, ROWS, PTX)
        terms = ()
        for row in tl.static_range(PASS):
            terms += (operands[row] * z[row] if TRANSFORM == _SCALE else tl.div_rn(z[row], operands[row]),)
        return add_rows(coeff, terms, acc, PASS)


@triton.jit
def _chosen(
    ptr, element, index, low, high,
    ROW: tl.constexpr, VECTOR: tl.constexpr, EDGE: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Which elements of row ``ROW`` have their bit set, shape (TILES, 256); ``element`` is the group's first in x.

    Whole groups start at a multiple of 8, and one byte serves the ``VECTOR`` elements that a thread loads at once: it
    is loaded once, and its bits stay in their thread.
    """
    if EDGE:
        at = index + ROW * LANES
        bit = element + at
        byte = tl.load(ptr + (bit >> 3), mask=(at >= low) & (at < high), other=0)
        return ((byte.to(tl.int32) >> (bit & 7).to(tl.int32)) & 1) != 0
    else:
        first = tl.arange(0, LANES // VECTOR)[None, :] * VECTOR
        at = tl.arange(0, TILES)[:, None] * (ROWS * LANES) + ROW * LANES + first
        byte = tl.load(ptr + (element >> 3) + (at >> 3)).to(tl.int32) >> (first & 7)
        bits = (byte[:, :, None] >> tl.arange(0, VECTOR)[None, None, :]) & 1
        return tl.reshape(bits, (TILES, LANES)) != 0


@triton.jit(do_not_specialize=["n", "offset", "start", "first", "step", "count"])
def add_noise_kernel(
    x_ptr,
    out_ptr,
    seeds_ptr,
    streams_ptr,
    coeffs_ptr,
    state0_ptr,
    state1_ptr,
    keep_ptr,
    sr_seed_ptr,
    operand_ptr,
    n: tl.int64,
    offset: tl.int64,
    start: tl.int64,
    first: tl.int64,
    step: tl.int64,
    count: tl.int32,
    COUNT: tl.constexpr,
    NOISE: tl.constexpr,
    TRANSFORM: tl.constexpr,
    EDGE: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    PTX: tl.constexpr,
):
    """One group a program. ``COUNT`` is the number of seeds if that is 0 or 1; -1 takes ``count`` of them, in a loop.

    ``x_ptr`` and the other elementwise pointers stand at element ``start``, those of ``scale`` and ``mask`` at their
    first. Optional pointers are None.
    """
    SPAN: tl.constexpr = TILES * ROWS * LANES
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    VECTOR: tl.constexpr = 128 // dtype.primitive_bitwidth  # elements in 16 bytes
    index = tl.arange(0, TILES)[:, None] * (ROWS * LANES) + tl.arange(0, LANES)[None, :]
    group, begin, low, high = place(first, step, n, offset, EDGE, SPAN)

    x = ()
    for row in tl.static_range(ROWS):
        x += (load_row(x_ptr + begin, index + row * LANES, low, high, EDGE),)
    zero = anchor(widen(x[0], PTX), PTX)

    target = (x_ptr if out_ptr is None else out_ptr) + begin
    PASS: tl.constexpr = 4 if NOISE == GAUSSIAN else ROWS  # the rows that one Philox call serves, to need few registers
    for row0 in tl.static_range(0, ROWS, PASS):
        acc = ()
        for row in tl.static_range(PASS):
            wide = widen(x[row0 + row], PTX)
            acc += (wide if keep_ptr is None else wide * tl.load(keep_ptr),)
        operands = _operand_rows(
            operand_ptr, group, begin, index, low, high, n, offset, row0, PASS, TRANSFORM, EDGE, TILES, ROWS
        )
        states_coeffs = coeffs_ptr + (count if COUNT == -1 else COUNT)
        if COUNT == -1:
            for k in range(count):
                seed, stream, coeff = tl.load(seeds_ptr + k), tl.load(streams_ptr + k), tl.load(coeffs_ptr + k)
                acc = _add_term(
                    acc, operands, seed, stream, coeff, group, zero, row0, PASS, TRANSFORM, NOISE, TILES, ROWS, PTX
                )
        elif COUNT == 1:
            seed, stream, coeff = tl.load(seeds_ptr), tl.load(streams_ptr), tl.load(coeffs_ptr)
            acc = _add_term(
                acc, operands, seed, stream, coeff, group, zero, row0, PASS, TRANSFORM, NOISE, TILES, ROWS, PTX
            )
        for j in tl.static_range(2):
            state_ptr = state0_ptr if j == 0 else state1_ptr
            if state_ptr is not None:
                state = load_rows(state_ptr + begin, index, low, high, row0, PASS, EDGE, PTX)
                acc = add_rows(tl.load(states_coeffs + j), state, acc, PASS)
        if row0 == 0:  # not before: words held during the loop over the terms would take registers
            random = rounding_bits(sr_seed_ptr, group, zero, TILES, ROWS, PTX)
        for row in tl.static_range(PASS):
            value = rounded_row(acc[row], random, row0 + row, sr_seed_ptr is not None, dtype, PTX)
            at = index + (row0 + row) * LANES
            if TRANSFORM == _MASK:
                chosen = _chosen(operand_ptr, start + begin, index, low, high, row0 + row, VECTOR, EDGE, TILES, ROWS)
                value = tl.where(chosen, value, x[row0 + row])
            store_row(target, at, value, low, high, EDGE)


def add_noise_(
    x: Tensor,
    seeds: Tensor,
    streams: Tensor,
    coeffs: Tensor,
    states: list[Tensor],
    keep: Tensor | None,
    sr_seed: Tensor | None,
    offset: int,
    noise: int,
    transform: int,
    operand: Tensor | None,
    *,
    out: Tensor | None = None,
) -> None:
    """As ``zoengine.ops.schema`` says of ``add_noise_`` and, with ``out``, of ``add_noise_out``."""
    if out is not None and out.data_ptr() == x.data_ptr():
        out = None
    if x.dtype == torch.float32:
        sr_seed = None
    count, ptx = seeds.numel(), launch.uses_ptx(x)
    config = launch.noise_config(noise, stochastic=sr_seed is not None, loop=count > 1)
    data = (x, out, *states, *(None,) * (2 - len(states)))
    # Whole groups take eight bits of a mask at once: where they would not start at a byte, all are edges.
    whole = transform != _MASK.value or offset % 8 == 0
    elementwise = transform == _DIAG.value
    for part in launch.parts(offset, x.numel(), config.span, whole=whole):
        x_part, out_part, state0, state1 = (t if t is None else t[part.start :] for t in data)
        with launch.on_device(x):
            add_noise_kernel[(part.programs,)](
                x_part,
                out_part,
                seeds,
                streams,
                coeffs,
                state0,
                state1,
                keep,
                sr_seed,
                operand[part.start :] if elementwise else operand,
                x.numel(),
                offset,
                part.start,
                part.first,
                part.step,
                count,
                COUNT=count if count <= 1 else -1,
                NOISE=noise,
                TRANSFORM=transform,
                EDGE=part.edge,
                TILES=config.tiles,
                ROWS=config.rows,
                PTX=ptx,
                **launch.compile_options(ptx, config.registers),
            )


add_noise_out = add_noise_
