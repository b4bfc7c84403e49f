"""``out = keep x + sum_k coeffs[k] z(seeds[k]) + sum_j coeffs[K + j] states[j]``, rounded once, in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from zoengine.kernels import launch
from zoengine.kernels.noise import GAUSSIAN, LANES, anchor, fma, normals, rounding_words, signs, word
from zoengine.kernels.rounding import round_nearest, round_stochastic, widen


@triton.jit
def _add_term(
    acc, seed, coeff, group, stream, zero,
    ROW: tl.constexpr, NOISE: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """``fma(coeff, z(seed), acc)`` for the rows ``ROW ...`` of a group: four of them, or all with signs."""
    result = ()
    if NOISE == GAUSSIAN:
        z = normals(seed, group, stream, zero, ROW // 4, TILES, ROWS, PTX)
        for row in tl.static_range(4):
            result += (fma(coeff.broadcast_to(zero.shape), z[row], acc[row]),)
    else:
        bits = signs(seed, group, stream, zero, TILES, ROWS, PTX)
        for row in tl.static_range(ROWS):  # coeff times a sign is exact, so this is the fma
            term = (coeff.to(tl.uint32, bitcast=True) ^ bits[row]).to(tl.float32, bitcast=True)
            result += (acc[row] + term,)
    return result


@triton.jit
def _add_state(acc, coeff, ptr, index, low, high, EDGE: tl.constexpr, PASS: tl.constexpr):
    """``fma(coeff, state, acc)`` for the ``PASS`` rows from ``index`` on."""
    result = ()
    for row in tl.static_range(PASS):
        at = index + row * LANES
        values = tl.load(ptr + at, mask=(at >= low) & (at < high) if EDGE else None)
        result += (fma(coeff.broadcast_to(values.shape), values, acc[row]),)
    return result


@triton.jit(do_not_specialize=["n", "offset", "first", "step", "stream", "count"])
def add_noise_kernel(
    x_ptr,
    out_ptr,
    seeds_ptr,
    coeffs_ptr,
    state0_ptr,
    state1_ptr,
    keep_ptr,
    sr_seed_ptr,
    n: tl.int64,
    offset: tl.int64,
    first: tl.int64,
    step: tl.int64,
    stream: tl.uint32,
    count: tl.int32,
    COUNT: tl.constexpr,
    NOISE: tl.constexpr,
    EDGE: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    PTX: tl.constexpr,
):
    """One group a program. ``COUNT`` is the number of seeds if that is 0 or 1; -1 takes ``count`` of them, in a loop.

    EDGE false: groups ``first, first + 1, ...``; x_ptr stands at the first of them. EDGE true: groups ``first``,
    ``first + step``, of which only indices ``offset .. offset + n`` exist; x_ptr stands at index ``offset``.
    Optional pointers are None.
    """
    SPAN: tl.constexpr = TILES * ROWS * LANES
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    stream = stream.to(tl.uint32)
    index = tl.arange(0, TILES)[:, None] * (ROWS * LANES) + tl.arange(0, LANES)[None, :]
    if EDGE:
        group = first.to(tl.int64) + program * step
        begin = group * SPAN - offset
        low = tl.maximum(-begin, 0).to(tl.int32)
        high = tl.minimum(n - begin, SPAN).to(tl.int32)
    else:
        group = first.to(tl.int64) + program
        begin = program * SPAN
        low, high = 0, SPAN

    x = ()
    for row in tl.static_range(ROWS):
        at = index + row * LANES
        x += (tl.load(x_ptr + begin + at, mask=(at >= low) & (at < high) if EDGE else None),)
    zero = anchor(widen(x[0], PTX), PTX)
    if sr_seed_ptr is not None:
        random = rounding_words(tl.load(sr_seed_ptr), group, zero, TILES, ROWS, PTX)

    target = (x_ptr if out_ptr is None else out_ptr) + begin
    PASS: tl.constexpr = 4 if NOISE == GAUSSIAN else ROWS  # the rows that one Philox call serves, to need few registers
    for start in tl.static_range(0, ROWS, PASS):
        acc = ()
        for row in tl.static_range(PASS):
            wide = widen(x[start + row], PTX)
            acc += (wide if keep_ptr is None else wide * tl.load(keep_ptr),)
        states_coeffs = coeffs_ptr + (count if COUNT == -1 else COUNT)
        if COUNT == -1:
            for k in range(count):
                seed, coeff = tl.load(seeds_ptr + k), tl.load(coeffs_ptr + k)
                acc = _add_term(acc, seed, coeff, group, stream, zero, start, NOISE, TILES, ROWS, PTX)
        elif COUNT == 1:
            seed, coeff = tl.load(seeds_ptr), tl.load(coeffs_ptr)
            acc = _add_term(acc, seed, coeff, group, stream, zero, start, NOISE, TILES, ROWS, PTX)
        here = index + start * LANES
        if state0_ptr is not None:
            acc = _add_state(acc, tl.load(states_coeffs), state0_ptr + begin, here, low, high, EDGE, PASS)
        if state1_ptr is not None:
            acc = _add_state(acc, tl.load(states_coeffs + 1), state1_ptr + begin, here, low, high, EDGE, PASS)
        for row in tl.static_range(PASS):
            if sr_seed_ptr is not None:
                half = random[(start + row) // 2] >> (row % 2 * 16)
                value = round_stochastic(acc[row], half & word(0xFFFF), dtype, PTX)
            else:
                value = round_nearest(acc[row], dtype)
            at = here + row * LANES
            tl.store(target + at, value, mask=(at >= low) & (at < high) if EDGE else None)


def add_noise_(
    x: Tensor,
    seeds: Tensor,
    coeffs: Tensor,
    states: list[Tensor],
    keep: Tensor | None,
    sr_seed: Tensor | None,
    offset: int,
    stream: int,
    noise: int,
) -> None:
    """As ``zoengine.ops.schema`` says."""
    _add_noise(x, None, seeds, coeffs, states, keep, sr_seed, offset, stream, noise)


def add_noise_out(
    x: Tensor,
    seeds: Tensor,
    coeffs: Tensor,
    states: list[Tensor],
    keep: Tensor | None,
    sr_seed: Tensor | None,
    offset: int,
    stream: int,
    noise: int,
    *,
    out: Tensor,
) -> None:
    """As ``zoengine.ops.schema`` says."""
    in_place = out.data_ptr() == x.data_ptr()
    _add_noise(x, None if in_place else out, seeds, coeffs, states, keep, sr_seed, offset, stream, noise)


def _add_noise(x, out, seeds, coeffs, states, keep, sr_seed, offset, stream, noise) -> None:
    if x.dtype == torch.float32:
        sr_seed = None
    count, ptx = seeds.numel(), launch.uses_ptx(x)
    config = launch.noise_config(noise, stochastic=sr_seed is not None, loop=count > 1)
    data = (x, out, *states, *(None,) * (2 - len(states)))
    for part in launch.parts(offset, x.numel(), config.span):
        x_part, out_part, state0, state1 = (t if t is None else t[part.start :] for t in data)
        with launch.on_device(x):
            add_noise_kernel[(part.programs,)](
                x_part,
                out_part,
                seeds,
                coeffs,
                state0,
                state1,
                keep,
                sr_seed,
                x.numel(),
                offset,
                part.first,
                part.step,
                stream,
                count,
                COUNT=count if count <= 1 else -1,
                NOISE=noise,
                EDGE=part.edge,
                TILES=config.tiles,
                ROWS=config.rows,
                PTX=ptx,
                **launch.compile_options(ptx, config.registers),
            )
