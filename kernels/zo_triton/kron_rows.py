"""Rows ``u - kappa (a . u) a`` of normals u added to matrices, and ``sum_k coeffs[k] (sum_rows (u . a) u - rows a)``.

A program takes a block of 64 rows, one row at a time, tile by tile of the 1024-tiles of the arena that the row
touches: a thread then holds the lanes of the noise that it sums, and every Philox call serves four of its elements.
Where a row fits into registers and stands at multiples of 16 its noise is drawn once; other rows draw it twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from zoengine.kernels import launch
from zoengine.kernels.groups import TILE, rounded_row
from zoengine.kernels.matrices import BLOCK, find_block
from zoengine.kernels.noise import LANES, anchor, fma, tile_noise, tile_rounding_words, word
from zoengine.kernels.rounding import widen
from zoengine.kernels.sums import halving_tree

from zoengine.noise import table

_STREAM = tl.constexpr(table.STREAM_DIRECTION)
_MOST_TILES = 24  # of a row that is kept in registers
MOST_REGISTERS = 255  # all there are; on its own ptxas may settle for fewer and spill


@triton.jit
def _columns(at, column, columns, EVEN: tl.constexpr):
    """Where a tile stands: its first element ``at``, which is column ``column`` of its row, and the end of the row.

    ``EVEN`` says that all three are multiples of 16; the products tell the compiler, which then loads 16 bytes a
    thread, masked as a whole.
    """
    if EVEN:
        return at // 16 * 16, column // 16 * 16, columns // 16 * 16
    else:
        return at, column, columns


@triton.jit
def _load(ptr, at, column, columns, EVEN: tl.constexpr, PTX: tl.constexpr):
    """Four fp32 rows (1, 256) of a tile, 0 where it is outside of its row."""
    at, column, columns = _columns(at, column, columns, EVEN)
    lane = tl.arange(0, LANES)[None, :]
    rows = ()
    for row in tl.static_range(4):
        j = column + row * LANES + lane
        rows += (widen(tl.load(ptr + at + row * LANES + lane, mask=(j >= 0) & (j < columns), other=0.0), PTX),)
    return rows


@triton.jit
def _store(ptr, at, rows, column, columns, EVEN: tl.constexpr):
    at, column, columns = _columns(at, column, columns, EVEN)
    lane = tl.arange(0, LANES)[None, :]
    for row in tl.static_range(4):
        j = column + row * LANES + lane
        tl.store(ptr + at + row * LANES + lane, rows[row], mask=(j >= 0) & (j < columns))


@triton.jit
def _add_lanes(lanes, z, a):
    """Lane sums of ``a . z``, tile after tile."""
    for row in tl.static_range(4):
        lanes = fma(a[row], z[row], lanes)
    return lanes


@triton.jit
def _total(lanes):
    return tl.sum(halving_tree(lanes, 1), axis=0)


@triton.jit
def _zeros():
    nil = tl.zeros((1, LANES), tl.float32)
    return nil, nil, nil, nil


@triton.jit
def _move(acc, z, a, projection, coeff):
    """``fma(coeff, z + projection a, acc)``."""
    result = ()
    for row in tl.static_range(4):
        w = fma(projection.broadcast_to(z[row].shape), a[row], z[row])
        result += (fma(coeff.broadcast_to(w.shape), w, acc[row]),)
    return result


@triton.jit
def _add_score(ptr, z, weight, column, columns, begun, EVEN: tl.constexpr, PTX: tl.constexpr):
    """``fma(weight, z, part)`` for a tile of the block's sums, which begin at 0."""
    part = _load(ptr, column, column, tl.where(begun, columns, 0), EVEN, PTX)
    sums = ()
    for row in tl.static_range(4):
        sums += (fma(weight.broadcast_to(part[row].shape), z[row], part[row]),)
    _store(ptr, column, sums, column, columns, EVEN)


@triton.jit
def _kept(rows, keep_ptr):
    if keep_ptr is not None:
        keep = tl.load(keep_ptr)
        return rows[0] * keep, rows[1] * keep, rows[2] * keep, rows[3] * keep
    else:
        return rows


@triton.jit
def _round_and_store(
    ptr, at, acc, tile, column, columns, sr_seed_ptr, zero, EVEN: tl.constexpr, PTX: tl.constexpr
):  # fmt: skip
    dtype: tl.constexpr = ptr.dtype.element_ty
    random = () if sr_seed_ptr is None else tile_rounding_words(tl.load(sr_seed_ptr), tile, zero, PTX)
    rows = ()
    for row in tl.static_range(4):
        rows += (rounded_row(acc[row], random, row, sr_seed_ptr is not None, dtype, PTX),)
    _store(ptr, at, rows, column, columns, EVEN)


@triton.jit
def _one_tile(rows, t: tl.constexpr):
    return rows[4 * t], rows[4 * t + 1], rows[4 * t + 2], rows[4 * t + 3]


@triton.jit
def _anchor(ptr, at, PTX: tl.constexpr):
    """A zero in the layout of the loads from ``ptr + at``. Nothing is read."""
    lane = tl.arange(0, LANES)[None, :]
    return anchor(widen(tl.load(ptr + at + lane, mask=lane < tl.minimum(at, 0).to(tl.int32)), PTX), PTX)


@triton.jit
def _draw_row(
    seed, a_ptr, a_at, tile0, shift, tiles, columns, zero,
    NOISE: tl.constexpr, TILES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The noise of a row, four tensors a tile, and its dot product with a."""
    z = ()
    lanes = tl.zeros((1, LANES), tl.float32)
    for t in tl.static_range(TILES):
        if t < tiles:
            drawn = tile_noise(seed, tile0 + t, word(_STREAM), zero, NOISE, PTX)
            lanes = _add_lanes(lanes, drawn, _load(a_ptr, a_at + t * TILE, t * TILE - shift, columns, True, PTX))
        else:
            drawn = _zeros()
        z += drawn
    return z, _total(lanes)


@triton.jit
def _kept_row(
    x_ptr, target, a_ptr, kappa, seeds_ptr, coeffs_ptr, keep_ptr, sr_seed_ptr, part_ptr,
    row, index, offset, a_start, columns, count, zero,
    COUNT: tl.constexpr, NOISE: tl.constexpr, TILES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One row, the first element of which stands at arena index ``index``, with its noise in registers."""
    tile0, shift = index // TILE, (index % TILE).to(tl.int32)
    tiles = (shift + columns + (TILE - 1)) // TILE
    x_at, a_at = tile0 * TILE - offset, a_start - shift
    if COUNT == 1:
        seed, coeff = tl.load(seeds_ptr), tl.load(coeffs_ptr)
        z, dot = _draw_row(seed, a_ptr, a_at, tile0, shift, tiles, columns, zero, NOISE, TILES, PTX)
        for t in tl.static_range(TILES):
            if t < tiles:
                at, column = t * TILE, t * TILE - shift
                if part_ptr is not None:
                    _add_score(part_ptr, _one_tile(z, t), coeff * dot, column, columns, row > 0, True, PTX)
                if x_ptr is not None:
                    acc = _kept(_load(x_ptr, x_at + at, column, columns, True, PTX), keep_ptr)
                    a = _load(a_ptr, a_at + at, column, columns, True, PTX)
                    acc = _move(acc, _one_tile(z, t), a, kappa * dot * -1.0, coeff)
                    _round_and_store(target, x_at + at, acc, tile0 + t, column, columns, sr_seed_ptr, zero, True, PTX)
    else:
        acc = ()
        for t in tl.static_range(TILES):
            four = _zeros()
            if x_ptr is not None:
                four = _kept(_load(x_ptr, x_at + t * TILE, t * TILE - shift, columns, True, PTX), keep_ptr)
            acc += four
        for k in range(count):
            seed, coeff = tl.load(seeds_ptr + k), tl.load(coeffs_ptr + k)
            z, dot = _draw_row(seed, a_ptr, a_at, tile0, shift, tiles, columns, zero, NOISE, TILES, PTX)
            moved = ()
            for t in tl.static_range(TILES):
                at, column = t * TILE, t * TILE - shift
                four = _one_tile(acc, t)
                if t < tiles:
                    if part_ptr is not None:
                        _add_score(part_ptr, _one_tile(z, t), coeff * dot, column, columns, row + k > 0, True, PTX)
                    if x_ptr is not None:
                        a = _load(a_ptr, a_at + at, column, columns, True, PTX)
                        four = _move(four, _one_tile(z, t), a, kappa * dot * -1.0, coeff)
                moved += four
            acc = moved
        if x_ptr is not None:
            for t in tl.static_range(TILES):
                if t < tiles:
                    at, column, four = t * TILE, t * TILE - shift, _one_tile(acc, t)
                    _round_and_store(target, x_at + at, four, tile0 + t, column, columns, sr_seed_ptr, zero, True, PTX)


@triton.jit
def _ragged_row(
    x_ptr, target, a_ptr, kappa, seeds_ptr, coeffs_ptr, keep_ptr, sr_seed_ptr, part_ptr, dots_ptr,
    row, index, offset, a_start, columns, count, zero, NOISE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One row of any length, whose noise is drawn once for the dot products and once more for the sums."""
    tile0, shift = index // TILE, (index % TILE).to(tl.int32)
    tiles = (shift + columns + (TILE - 1)) // TILE
    x_at, a_at = tile0 * TILE - offset, a_start - shift
    for k in range(count):
        seed = tl.load(seeds_ptr + k)
        lanes = tl.zeros((1, LANES), tl.float32)
        for t in range(tiles):
            z = tile_noise(seed, tile0 + t, word(_STREAM), zero, NOISE, PTX)
            lanes = _add_lanes(lanes, z, _load(a_ptr, a_at + t * TILE, t * TILE - shift, columns, False, PTX))
        tl.store(dots_ptr + k, _total(lanes))
    tl.debug_barrier()
    for t in range(tiles):
        at, column = t * TILE, t * TILE - shift
        if x_ptr is not None:
            acc = _kept(_load(x_ptr, x_at + at, column, columns, False, PTX), keep_ptr)
        for k in range(count):
            seed, coeff, dot = tl.load(seeds_ptr + k), tl.load(coeffs_ptr + k), tl.load(dots_ptr + k)
            z = tile_noise(seed, tile0 + t, word(_STREAM), zero, NOISE, PTX)
            if part_ptr is not None:
                _add_score(part_ptr, z, coeff * dot, column, columns, row + k > 0, False, PTX)
            if x_ptr is not None:
                a = _load(a_ptr, a_at + at, column, columns, False, PTX)
                acc = _move(acc, z, a, kappa * dot * -1.0, coeff)
        if x_ptr is not None:
            _round_and_store(target, x_at + at, acc, tile0 + t, column, columns, sr_seed_ptr, zero, False, PTX)


@triton.jit(do_not_specialize=["offset", "matrices", "count", "stride"])
def kron_rows_kernel(
    x_ptr,
    out_ptr,
    a_ptr,
    kappa_ptr,
    table_ptr,
    seeds_ptr,
    coeffs_ptr,
    keep_ptr,
    sr_seed_ptr,
    partials_ptr,
    dots_ptr,
    offset: tl.int64,
    matrices: tl.int32,
    count: tl.int32,
    stride: tl.int64,
    COUNT: tl.constexpr,
    NOISE: tl.constexpr,
    TILES: tl.constexpr,
    PTX: tl.constexpr,
):
    """One row block a program. ``COUNT`` is 1, or -1 for a loop over ``count`` seeds.

    ``TILES``: the most tiles that a row touches, all of them kept; 0 keeps none. Without ``x_ptr`` the matrices are
    left alone; ``partials_ptr``, ``stride`` numbers a block, takes the block's sums of the score, ``dots_ptr``,
    ``count`` numbers a block, the dot products of a row.
    """
    block = tl.program_id(0).to(tl.int64)
    offset = offset.to(tl.int64)
    matrix, entry, first_row, rows, columns = find_block(table_ptr, matrices, block, 5)
    start, a_start = tl.load(entry), tl.load(entry + 4)
    first = offset + start + first_row * columns
    if x_ptr is not None:
        kappa = tl.load(kappa_ptr + matrix)
        target = x_ptr if out_ptr is None else out_ptr
        like = x_ptr
    else:
        kappa = 0.0
        target = x_ptr
        like = a_ptr
    part_ptr = partials_ptr if partials_ptr is None else partials_ptr + block * (stride // 16 * 16)
    even = ((offset | start | columns | a_start) % 16 == 0) & (TILES > 0)
    if even:
        zero = _anchor(like, first // 16 * 16, PTX)
        for row in range(rows):
            _kept_row(
                x_ptr, target, a_ptr, kappa, seeds_ptr, coeffs_ptr, keep_ptr, sr_seed_ptr, part_ptr,
                row, first + row * columns, offset, a_start, columns, count, zero, COUNT, NOISE, TILES, PTX,
            )  # fmt: skip
            if part_ptr is not None:
                tl.debug_barrier()  # the next row's columns belong to other threads
    else:
        zero = _anchor(like, first, PTX)
        for row in range(rows):
            _ragged_row(
                x_ptr, target, a_ptr, kappa, seeds_ptr, coeffs_ptr, keep_ptr, sr_seed_ptr, part_ptr,
                dots_ptr + block * count, row, first + row * columns, offset, a_start, columns, count, zero, NOISE, PTX,
            )  # fmt: skip
            tl.debug_barrier()


@triton.jit(do_not_specialize=["count", "stride"])
def kron_score_kernel(
    score_ptr, a_ptr, partials_ptr, table_ptr, coeffs_ptr, count: tl.int32, stride: tl.int64
):  # fmt: skip
    """256 columns of a matrix a program: the blocks' sums in float64, in order, less the expectation."""
    entry = table_ptr + tl.program_id(0).to(tl.int64) * 5
    rows, columns, before, a_start = tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    j = tl.program_id(1) * LANES + tl.arange(0, LANES)
    there = j < columns
    weight = tl.zeros((), tl.float64)
    for k in range(count):
        weight += tl.load(coeffs_ptr + k).to(tl.float64)
    total = tl.zeros((LANES,), tl.float64)
    for block in range((rows + (BLOCK - 1)) // BLOCK):
        part = tl.load(partials_ptr + (before + block) * stride + j, mask=there, other=0.0)
        total += part.to(tl.float64)
    expected = weight * rows.to(tl.float64) * tl.load(a_ptr + a_start + j, mask=there).to(tl.float64)
    tl.store(score_ptr + a_start + j, (total - expected).to(tl.float32), mask=there)


def kron_rows_(
    x: Tensor,
    a: Tensor,
    kappa: Tensor,
    segments: Tensor,
    seeds: Tensor,
    coeffs: Tensor,
    keep: Tensor | None,
    sr_seed: Tensor | None,
    score: Tensor | None,
    offset: int,
    noise: int,
    blocks: int,
    widest: int,
    *,
    out: Tensor | None = None,
) -> None:
    """As ``zoengine.ops.schema`` says of ``kron_rows_`` and, with ``out``, of ``kron_rows_out``."""
    if out is not None and out.data_ptr() == x.data_ptr():
        out = None
    _rows(x, out, a, kappa, segments, seeds, coeffs, keep, sr_seed, score, offset, noise, blocks, widest)


kron_rows_out = kron_rows_


def kron_score(
    a: Tensor, segments: Tensor, seeds: Tensor, coeffs: Tensor, offset: int, noise: int, blocks: int, widest: int
) -> Tensor:
    """As ``zoengine.ops.schema`` says."""
    score = a.new_empty(a.shape)
    _rows(None, None, a, None, segments, seeds, coeffs, None, None, score, offset, noise, blocks, widest)
    return score


def kron_config(widest: int, loop: bool) -> tuple[int, int]:
    """Tiles of a row to keep in registers, 0 for none, and warps that share them: at most 96 numbers a thread."""
    tiles = -(-(widest + 1023) // 1024)  # that a row touches, wherever it starts
    kept = 2 * tiles if loop else tiles  # a loop keeps the sum besides the noise
    if kept > _MOST_TILES:
        return 0, 4
    return tiles, 2 if kept <= 6 else 4 if kept <= 12 else 8


def _rows(x, out, a, kappa, segments, seeds, coeffs, keep, sr_seed, score, offset, noise, blocks, widest) -> None:
    if x is not None and x.dtype == torch.float32:
        sr_seed = None
    count, matrices, ptx = seeds.numel(), segments.shape[0], launch.uses_ptx(a)
    tiles, warps = kron_config(widest, count != 1)
    partials, stride = None, 0
    if score is not None:
        stride = -(-widest // 16) * 16
        partials = (a.new_empty if count else a.new_zeros)((blocks, stride))
    dots = a.new_empty((blocks, count))
    with launch.on_device(a):
        kron_rows_kernel[(blocks,)](
            x,
            out,
            a,
            kappa,
            segments,
            seeds,
            coeffs,
            keep,
            sr_seed,
            partials,
            dots,
            offset,
            matrices,
            count,
            stride,
            COUNT=1 if count == 1 else -1,
            NOISE=noise,
            TILES=tiles,
            PTX=ptx,
            **launch.compile_options(ptx, MOST_REGISTERS, warps),
        )
        if score is not None:
            grid = (matrices, -(-widest // LANES.value))
            arguments = (score, a, partials, segments, coeffs, count, stride)
            kron_score_kernel[grid](*arguments, **launch.compile_options(ptx))
