"""``state = keep state + sum_k coeffs[k] z_k`` with an update of the weights and the norm of the state, in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from zoengine.kernels import launch
from zoengine.kernels.groups import (
    TILE,
    add_rows,
    load_rows,
    noise_rows,
    place,
    rounded_row,
    rounding_bits,
    scaled,
    store_row,
)
from zoengine.kernels.noise import LANES, anchor
from zoengine.kernels.sums import add_stored, halving_tree


@triton.jit
def _store_squares(
    partials_ptr, valid_ptr, rows, group, n, offset, low, high,
    ROW: tl.constexpr, EDGE: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The sums of squares of the 1024-tiles that the four rows ``ROW ...`` are, over the valid elements of each."""
    tile = (group * TILES + tl.arange(0, TILES)) * (ROWS // 4) + ROW // 4 - offset // TILE
    there = (tile >= 0) & (tile * TILE < n)
    valid = tl.load(valid_ptr + tile, mask=there if EDGE else None)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    squares = tl.zeros((TILES, LANES), tl.float64)
    for row in tl.static_range(4):
        counted = lane + row * LANES < valid
        if EDGE:
            at = tl.arange(0, TILES)[:, None] * (ROWS * LANES) + (ROW + row) * LANES + lane
            counted = counted & (at >= low) & (at < high)
        value = tl.where(counted, rows[row], 0.0).to(tl.float64)
        squares = tl.fma(value, value, squares)  # the product is exact: rounds as one addition does
    tl.store(partials_ptr + tile, halving_tree(squares, TILES), mask=there if EDGE else None)


@triton.jit(do_not_specialize=["n", "offset", "first", "step", "count"])
def state_fold_kernel(
    state_ptr,
    x_ptr,
    partials_ptr,
    seeds_ptr,
    streams_ptr,
    coeffs_ptr,
    keep_ptr,
    x_coeffs_ptr,
    x_keep_ptr,
    sr_seed_ptr,
    valid_ptr,
    n: tl.int64,
    offset: tl.int64,
    first: tl.int64,
    step: tl.int64,
    count: tl.int32,
    COUNT: tl.constexpr,
    NOISE: tl.constexpr,
    EDGE: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    PTX: tl.constexpr,
):
    """One group a program; groups as in ``groups.place``, ``COUNT`` as in ``add_noise_kernel``.

    ``state_ptr`` and ``x_ptr`` stand where the groups do, ``partials_ptr`` and ``valid_ptr`` at the first tile.
    """
    SPAN: tl.constexpr = TILES * ROWS * LANES
    PASS: tl.constexpr = 4
    index = tl.arange(0, TILES)[:, None] * (ROWS * LANES) + tl.arange(0, LANES)[None, :]
    group, begin, low, high = place(first, step, n, offset, EDGE, SPAN)
    for row0 in tl.static_range(0, ROWS, PASS):
        old = load_rows(state_ptr + begin, index, low, high, row0, PASS, EDGE, PTX)
        zero = anchor(old[0], PTX)
        new = scaled(old, keep_ptr, PASS)
        if x_ptr is not None:
            x = load_rows(x_ptr + begin, index, low, high, row0, PASS, EDGE, PTX)
            x = scaled(x, x_keep_ptr, PASS)
        if COUNT == -1:
            for k in range(count):
                z = noise_rows(
                    tl.load(seeds_ptr + k), tl.load(streams_ptr + k), group, zero, row0, PASS, NOISE, TILES, ROWS, PTX
                )
                new = add_rows(tl.load(coeffs_ptr + k), z, new, PASS)
                if x_ptr is not None:
                    x = add_rows(tl.load(x_coeffs_ptr + k), z, x, PASS)
        elif COUNT == 1:
            z = noise_rows(tl.load(seeds_ptr), tl.load(streams_ptr), group, zero, row0, PASS, NOISE, TILES, ROWS, PTX)
            new = add_rows(tl.load(coeffs_ptr), z, new, PASS)
            if x_ptr is not None:
                x = add_rows(tl.load(x_coeffs_ptr), z, x, PASS)
        for row in tl.static_range(PASS):
            store_row(state_ptr + begin, index + (row0 + row) * LANES, new[row], low, high, EDGE)
        if x_ptr is not None:
            of_states = x_coeffs_ptr + (count if COUNT == -1 else COUNT)
            x = add_rows(tl.load(of_states), old, x, PASS)
            x = add_rows(tl.load(of_states + 1), new, x, PASS)
            if row0 == 0:
                random = rounding_bits(sr_seed_ptr, group, zero, TILES, ROWS, PTX)
            for row in tl.static_range(PASS):
                value = rounded_row(x[row], random, row0 + row, sr_seed_ptr is not None, x_ptr.dtype.element_ty, PTX)
                store_row(x_ptr + begin, index + (row0 + row) * LANES, value, low, high, EDGE)
        if valid_ptr is not None:
            _store_squares(partials_ptr, valid_ptr, new, group, n, offset, low, high, row0, EDGE, TILES, ROWS)


@triton.jit(do_not_specialize=["tiles"])
def tile_total_kernel(result_ptr, partials_ptr, tiles: tl.int64):
    """The lane sum of the tiles' sums."""
    lanes = add_stored(partials_ptr, tiles, 0)
    tl.store(result_ptr, tl.sum(halving_tree(tl.reshape(lanes, (1, LANES)), 1), axis=0))


def state_fold_(
    state: Tensor,
    x: Tensor | None,
    seeds: Tensor,
    streams: Tensor,
    coeffs: Tensor,
    keep: Tensor | None,
    x_coeffs: Tensor | None,
    x_keep: Tensor | None,
    sr_seed: Tensor | None,
    valid: Tensor | None,
    offset: int,
    noise: int,
) -> Tensor:
    """As ``zoengine.ops.schema`` says."""
    if x is None or x.dtype == torch.float32:
        sr_seed = None
    n, count, ptx = state.numel(), seeds.numel(), launch.uses_ptx(state)
    config = launch.STATE_CONFIG
    tiles = -(-n // TILE.value)
    result = state.new_empty((0 if valid is None else 1,), dtype=torch.float64)
    partials = None if valid is None else state.new_empty((tiles,), dtype=torch.float64)
    options = launch.compile_options(ptx)
    with launch.on_device(state):
        for part in launch.parts(offset, n, config.span):
            state_fold_kernel[(part.programs,)](
                state[part.start :],
                None if x is None else x[part.start :],
                partials,
                seeds,
                streams,
                coeffs,
                keep,
                x_coeffs,
                x_keep,
                sr_seed,
                valid,
                n,
                offset,
                part.first,
                part.step,
                count,
                COUNT=count if count <= 1 else -1,
                NOISE=noise,
                EDGE=part.edge,
                TILES=config.tiles,
                ROWS=config.rows,
                PTX=ptx,
                **options,
            )
        if valid is not None:
            tile_total_kernel[(1,)](result, partials, tiles, **options)
    return result
