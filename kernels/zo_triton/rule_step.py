"""Update rules that are not linear in the noise: weights and states are read and written once.

The order of operations is that of ``zoengine/ops/reference/elementwise.py``: each line below is one line there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from zoengine.kernels import launch
from zoengine.kernels.groups import (
    add_rows,
    load_rows,
    noise_rows,
    place,
    rounded_row,
    rounding_bits,
    scaled,
    store_row,
)
from zoengine.kernels.noise import LANES, anchor, fma

from zoengine.ops.schema import RULES

_SIGN = tl.constexpr(RULES["sign"][0])
_ADAM = tl.constexpr(RULES["adam"][0])
_AMSGRAD = tl.constexpr(RULES["amsgrad"][0])
_ADAMU = tl.constexpr(RULES["adamu"][0])
_HIZOO = tl.constexpr(RULES["hizoo"][0])
_ADAM_REPLAY = tl.constexpr(RULES["adam_replay"][0])


@triton.jit
def _scalar(ptr, k, like):
    """Number ``k`` of a small tensor, in the shape of ``like``."""
    return tl.load(ptr + k).broadcast_to(like.shape)


@triton.jit
def _zeros(like, PASS: tl.constexpr):
    rows = ()
    for _ in tl.static_range(PASS):
        rows += (tl.zeros(like.shape, tl.float32),)
    return rows


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _gather(sums, squares, z, coeffs_ptr, scalars_ptr, k, count, RULE: tl.constexpr, PASS: tl.constexpr):
    """What term ``k`` adds: to ``sum c z``, and where the rule has a second set of coefficients to its sum of z^2."""
    if RULE == _HIZOO:
        result = ()
        for row in tl.static_range(PASS):
            centre = _scalar(scalars_ptr, 1, z[row]) * -1.0
            result += (fma(_scalar(coeffs_ptr, count + k, z[row]), fma(z[row], z[row], centre), squares[row]),)
        return sums, result
    elif RULE == _ADAM_REPLAY:
        result = ()
        for row in tl.static_range(PASS):
            result += (fma(_scalar(coeffs_ptr, count + k, z[row]) * z[row], z[row], squares[row]),)
        return add_rows(tl.load(coeffs_ptr + k), z, sums, PASS), result
    else:
        return add_rows(tl.load(coeffs_ptr + k), z, sums, PASS), squares


@triton.jit
def _adam_step(acc, m, v, s_ptr, FIRST: tl.constexpr):
    """``step m / (root_correction sqrt(v) + eps)`` added; these scalars stand at ``FIRST``, step after eps."""
    root = fma(tl.sqrt_rn(v), _scalar(s_ptr, FIRST, v), _scalar(s_ptr, FIRST + 1, v))
    return fma(_scalar(s_ptr, FIRST + 2, v), tl.div_rn(m, root), acc)


@triton.jit
def _moments(m, v, g, s_ptr):
    """Exponential averages of g and g^2."""
    m = fma(_scalar(s_ptr, 1, g), g, _scalar(s_ptr, 0, g) * m)
    return m, fma(_scalar(s_ptr, 3, g) * g, g, _scalar(s_ptr, 2, g) * v)


@triton.jit
def _apply(acc, g, squares, z, states, s_ptr, row: tl.constexpr, RULE: tl.constexpr):
    """The new weights and states of one row; of hizoo the new state and the root that divides its noise."""
    if RULE == _SIGN:
        sign = (g > 0).to(tl.float32) - (g < 0).to(tl.float32)
        return (fma(_scalar(s_ptr, 0, g), sign, acc),)
    elif RULE == _ADAM:
        m, v = _moments(states[0][row], states[1][row], g, s_ptr)
        return _adam_step(acc, m, v, s_ptr, 4), m, v
    elif RULE == _AMSGRAD:
        m, v = _moments(states[0][row], states[1][row], g, s_ptr)
        largest = _larger(states[2][row], v)
        return _adam_step(acc, m, largest, s_ptr, 4), m, v, largest
    elif RULE == _ADAMU:
        h = states[0][row]
        m = fma(_scalar(s_ptr, 0, h), h, g)
        first, second = _scalar(s_ptr, 1, h) * z[0][row], fma(_scalar(s_ptr, 2, h), z[1][row], h)
        v = fma(_scalar(s_ptr, 3, h) * first, first, _scalar(s_ptr, 4, h) * second * second)
        ratio = tl.div_rn(m, tl.sqrt_rn(v + _scalar(s_ptr, 5, h)))
        return fma(_scalar(s_ptr, 6, h), ratio, acc), _scalar(s_ptr, 7, h) * m
    elif RULE == _HIZOO:
        h = states[0][row]
        new = _larger(fma(squares, h, _scalar(s_ptr, 0, h) * h), _scalar(s_ptr, 2, h))
        return tl.sqrt_rn(tl.where(_scalar(s_ptr, 3, h) != 0, new, h)), new
    else:
        return (_adam_step(acc, g, squares, s_ptr, 0),)


@triton.jit
def _add_divided(acc, z, roots, coeff, PASS: tl.constexpr):
    """``fma(coeff, z / root, acc)``."""
    terms = ()
    for row in tl.static_range(PASS):
        terms += (tl.div_rn(z[row], roots[row]),)
    return add_rows(coeff, terms, acc, PASS)


@triton.jit(do_not_specialize=["n", "offset", "first", "step", "count"])
def rule_step_kernel(
    x_ptr,
    state0_ptr,
    state1_ptr,
    state2_ptr,
    seeds_ptr,
    streams_ptr,
    coeffs_ptr,
    scalars_ptr,
    keep_ptr,
    sr_seed_ptr,
    n: tl.int64,
    offset: tl.int64,
    first: tl.int64,
    step: tl.int64,
    count: tl.int32,
    RULE: tl.constexpr,
    COUNT: tl.constexpr,
    NOISE: tl.constexpr,
    EDGE: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    PTX: tl.constexpr,
):
    """One group a program; groups as in ``groups.place``. ``COUNT`` is 1, 2 for adamu, or -1 for a loop over ``count``.

    ``x_ptr`` and the states' pointers stand where the groups do; states that the rule does not have are None.
    """
    SPAN: tl.constexpr = TILES * ROWS * LANES
    PASS: tl.constexpr = 4
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    index = tl.arange(0, TILES)[:, None] * (ROWS * LANES) + tl.arange(0, LANES)[None, :]
    group, begin, low, high = place(first, step, n, offset, EDGE, SPAN)
    for row0 in tl.static_range(0, ROWS, PASS):
        acc = load_rows(x_ptr + begin, index, low, high, row0, PASS, EDGE, PTX)
        zero = anchor(acc[0], PTX)
        acc = scaled(acc, keep_ptr, PASS)
        states = ()
        for j in tl.static_range(3):
            state_ptr = state0_ptr if j == 0 else state1_ptr if j == 1 else state2_ptr
            if state_ptr is not None:
                states += (load_rows(state_ptr + begin, index, low, high, row0, PASS, EDGE, PTX),)

        sums, squares, z = _zeros(zero, PASS), _zeros(zero, PASS), ()
        if COUNT == -1:
            for k in range(count):
                one = noise_rows(
                    tl.load(seeds_ptr + k), tl.load(streams_ptr + k), group, zero, row0, PASS, NOISE, TILES, ROWS, PTX
                )
                sums, squares = _gather(sums, squares, one, coeffs_ptr, scalars_ptr, k, count, RULE, PASS)
        else:
            for k in tl.static_range(COUNT):
                one = noise_rows(
                    tl.load(seeds_ptr + k), tl.load(streams_ptr + k), group, zero, row0, PASS, NOISE, TILES, ROWS, PTX
                )
                sums, squares = _gather(sums, squares, one, coeffs_ptr, scalars_ptr, k, COUNT, RULE, PASS)
                z += (one,)

        results = ()
        for row in tl.static_range(PASS):
            results += (_apply(acc[row], sums[row], squares[row], z, states, scalars_ptr, row, RULE),)
        if RULE == _HIZOO:
            roots = ()
            for row in tl.static_range(PASS):
                roots += (results[row][0],)
            if COUNT == -1:  # the root needs all of the noise, so it is drawn once more
                for k in range(count):
                    one = noise_rows(
                        tl.load(seeds_ptr + k),
                        tl.load(streams_ptr + k),
                        group,
                        zero,
                        row0,
                        PASS,
                        NOISE,
                        TILES,
                        ROWS,
                        PTX,
                    )
                    acc = _add_divided(acc, one, roots, tl.load(coeffs_ptr + k), PASS)
            else:
                acc = _add_divided(acc, z[0], roots, tl.load(coeffs_ptr), PASS)

        if row0 == 0:
            random = rounding_bits(sr_seed_ptr, group, zero, TILES, ROWS, PTX)
        for row in tl.static_range(PASS):
            at = index + (row0 + row) * LANES
            for j in tl.static_range(3):
                state_ptr = state0_ptr if j == 0 else state1_ptr if j == 1 else state2_ptr
                if state_ptr is not None:
                    store_row(state_ptr + begin, at, results[row][j + 1], low, high, EDGE)
            moved = acc[row] if RULE == _HIZOO else results[row][0]
            value = rounded_row(moved, random, row0 + row, sr_seed_ptr is not None, dtype, PTX)
            store_row(x_ptr + begin, at, value, low, high, EDGE)


def rule_step_(
    x: Tensor,
    states: list[Tensor],
    seeds: Tensor,
    streams: Tensor,
    coeffs: Tensor,
    scalars: Tensor,
    keep: Tensor | None,
    sr_seed: Tensor | None,
    offset: int,
    noise: int,
    rule: int,
) -> None:
    """As ``zoengine.ops.schema`` says."""
    if x.dtype == torch.float32:
        sr_seed = None
    count, ptx = seeds.numel(), launch.uses_ptx(x)
    config = launch.STATE_CONFIG
    data = (x, *states, *(None,) * (3 - len(states)))
    unrolled = count == 1 or rule == _ADAMU.value
    for part in launch.parts(offset, x.numel(), config.span):
        with launch.on_device(x):
            rule_step_kernel[(part.programs,)](
                *(t if t is None else t[part.start :] for t in data),
                seeds,
                streams,
                coeffs,
                scalars,
                keep,
                sr_seed,
                x.numel(),
                offset,
                part.first,
                part.step,
                count,
                RULE=rule,
                COUNT=count if unrolled else -1,
                NOISE=noise,
                EDGE=part.edge,
                TILES=config.tiles,
                ROWS=config.rows,
                PTX=ptx,
                **launch.compile_options(ptx),
            )
