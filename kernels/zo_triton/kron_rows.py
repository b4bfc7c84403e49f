"""Rows ``u - kappa (a . u) a`` of normals u added to matrices, and ``sum_k coeffs[k] (sum_rows (u . a) u - rows a)``.

A program takes a block of 64 rows, one row at a time, tile by tile of the 1024-tiles of the arena that the row
touches: a thread then holds the lanes of the noise that it sums, and every Philox call serves four of its elements.
The noise is needed for the dot product and again for the sums. Where rows stand at multiples of 16 that of their first
tiles stays in registers; that of other tiles is drawn twice, 29 instructions an element more.

How many tiles stay is a matter of compile time. Each is code of its own, and Triton's choice of layouts takes time in
proportion to the accesses to memory times the square of all operations: keeping all of a row took 20 s at 8,192
columns and 55 s at 16,384, several times that with a score and stochastic rounding. With four tiles, rows of up to
4,096 columns that start at a tile are drawn once. Wider ones would need more warps for their registers, whose threads
then make narrower accesses: at 8,192 columns that took 53 instructions an element, and drawing half again takes 62.
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
WARPS = 2
_MOST_TILES = 4  # that are kept in registers
_MOST_LOOP_TILES = 3  # where they share them with sums over terms
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
    NOISE: tl.constexpr, TILES: tl.constexpr, REST: tl.constexpr, EVEN: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The noise of the first tiles of a row, four tensors a tile, and the dot product of all of it with a."""
    z = ()
    lanes = tl.zeros((1, LANES), tl.float32)
    for t in tl.static_range(TILES):
        if t < tiles:
            drawn = tile_noise(seed, tile0 + t, word(_STREAM), zero, NOISE, PTX, SHORT=True)
            lanes = _add_lanes(lanes, drawn, _load(a_ptr, a_at + t * TILE, t * TILE - shift, columns, EVEN, PTX))
        else:
            drawn = _zeros()
        z += drawn
    for t in range(TILES, tiles if REST else TILES):
        drawn = tile_noise(seed, tile0 + t, word(_STREAM), zero, NOISE, PTX, SHORT=True)
        lanes = _add_lanes(lanes, drawn, _load(a_ptr, a_at + t * TILE, t * TILE - shift, columns, EVEN, PTX))
    return z, _total(lanes)


@triton.jit
def _add_term(
    x_ptr, a_ptr, part_ptr, acc, z, kappa, dot, coeff, a_at, column, columns, begun,
    EVEN: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """What a term adds to a tile and to the block's sums."""
    if part_ptr is not None:
        _add_score(part_ptr, z, coeff * dot, column, columns, begun, EVEN, PTX)
    if x_ptr is not None:
        acc = _move(acc, z, _load(a_ptr, a_at, column, columns, EVEN, PTX), kappa * dot * -1.0, coeff)
    return acc


@triton.jit
def _begin(x_ptr, at, column, columns, keep_ptr, EVEN: tl.constexpr, PTX: tl.constexpr):
    """What the sums of a tile begin with."""
    if x_ptr is not None:
        return _kept(_load(x_ptr, at, column, columns, EVEN, PTX), keep_ptr)
    else:
        return _zeros()


@triton.jit
def _row(
    x_ptr, target, a_ptr, kappa, seeds_ptr, coeffs_ptr, keep_ptr, sr_seed_ptr, part_ptr, dots_ptr,
    row, index, offset, a_start, columns, count, zero,
    COUNT: tl.constexpr, NOISE: tl.constexpr, TILES: tl.constexpr, REST: tl.constexpr,
    EVEN: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One row, the first element of which stands at arena index ``index``; the noise of ``TILES`` tiles is kept."""
    tile0, shift = index // TILE, (index % TILE).to(tl.int32)
    tiles = (shift + columns + (TILE - 1)) // TILE
    x_at, a_at = tile0 * TILE - offset, a_start - shift
    if COUNT == 1:
        seed, coeff = tl.load(seeds_ptr), tl.load(coeffs_ptr)
        z, dot = _draw_row(seed, a_ptr, a_at, tile0, shift, tiles, columns, zero, NOISE, TILES, REST, EVEN, PTX)
        for t in tl.static_range(TILES):
            if t < tiles:
                at, column = t * TILE, t * TILE - shift
                acc = _begin(x_ptr, x_at + at, column, columns, keep_ptr, EVEN, PTX)
                acc = _add_term(
                    x_ptr, a_ptr, part_ptr, acc, _one_tile(z, t), kappa, dot, coeff, a_at + at, column, columns,
                    row > 0, EVEN, PTX,
                )  # fmt: skip
                if x_ptr is not None:
                    _round_and_store(target, x_at + at, acc, tile0 + t, column, columns, sr_seed_ptr, zero, EVEN, PTX)
    else:
        acc = ()
        for t in tl.static_range(TILES):
            acc += _begin(x_ptr, x_at + t * TILE, t * TILE - shift, columns, keep_ptr, EVEN, PTX)
        for k in range(count):
            seed, coeff = tl.load(seeds_ptr + k), tl.load(coeffs_ptr + k)
            z, dot = _draw_row(seed, a_ptr, a_at, tile0, shift, tiles, columns, zero, NOISE, TILES, REST, EVEN, PTX)
            tl.store(dots_ptr + k, dot)
            moved = ()
            for t in tl.static_range(TILES):
                four = _one_tile(acc, t)
                if t < tiles:
                    four = _add_term(
                        x_ptr, a_ptr, part_ptr, four, _one_tile(z, t), kappa, dot, coeff, a_at + t * TILE,
                        t * TILE - shift, columns, row + k > 0, EVEN, PTX,
                    )  # fmt: skip
                moved += four
            acc = moved
        if x_ptr is not None:
            for t in tl.static_range(TILES):
                if t < tiles:
                    at, column, four = t * TILE, t * TILE - shift, _one_tile(acc, t)
                    _round_and_store(target, x_at + at, four, tile0 + t, column, columns, sr_seed_ptr, zero, EVEN, PTX)
        tl.debug_barrier()
    for t in range(TILES, tiles if REST else TILES):
        at, column = t * TILE, t * TILE - shift
        rest = _begin(x_ptr, x_at + at, column, columns, keep_ptr, EVEN, PTX)
        for k in range(1 if COUNT == 1 else count):
            seed, coeff = tl.load(seeds_ptr + k), tl.load(coeffs_ptr + k)
            projection = dot if COUNT == 1 else tl.load(dots_ptr + k)
            drawn = tile_noise(seed, tile0 + t, word(_STREAM), zero, NOISE, PTX, SHORT=True)
            rest = _add_term(
                x_ptr, a_ptr, part_ptr, rest, drawn, kappa, projection, coeff, a_at + at, column, columns,
                row + k > 0, EVEN, PTX,
            )  # fmt: skip
        if x_ptr is not None:
            _round_and_store(target, x_at + at, rest, tile0 + t, column, columns, sr_seed_ptr, zero, EVEN, PTX)


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
    REST: tl.constexpr,
    PTX: tl.constexpr,
):
    """One row block a program. ``COUNT`` is 1, or -1 for a loop over ``count`` seeds.

    ``TILES``: so many tiles of a row that stands at multiples of 16 are kept; ``REST``: there may
    be more of them. Without ``x_ptr`` the matrices are
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
    dots_ptr += block * count
    if (offset | start | columns | a_start) % 16 == 0:
        zero = _anchor(like, first // 16 * 16, PTX)
        for row in range(rows):
            _row(
                x_ptr, target, a_ptr, kappa, seeds_ptr, coeffs_ptr, keep_ptr, sr_seed_ptr, part_ptr, dots_ptr,
                row, first + row * columns, offset, a_start, columns, count, zero,
                COUNT, NOISE, TILES, REST, True, PTX,
            )  # fmt: skip
            tl.debug_barrier()  # the next row's columns and dot products belong to other threads
    else:
        zero = _anchor(like, first, PTX)
        for row in range(rows):
            _row(
                x_ptr, target, a_ptr, kappa, seeds_ptr, coeffs_ptr, keep_ptr, sr_seed_ptr, part_ptr, dots_ptr,
                row, first + row * columns, offset, a_start, columns, count, zero,
                COUNT, NOISE, 0, True, False, PTX,
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


def kron_config(widest: int, loop: bool) -> tuple[int, bool]:
    """Tiles of a row to keep in registers, at most 96 numbers a thread, and whether rows may have more."""
    tiles = -(-(widest + 1023) // 1024)  # that a row touches, wherever it starts
    most = _MOST_LOOP_TILES if loop else _MOST_TILES
    return min(tiles, most), tiles > most


def _rows(x, out, a, kappa, segments, seeds, coeffs, keep, sr_seed, score, offset, noise, blocks, widest) -> None:
    if x is not None and x.dtype == torch.float32:
        sr_seed = None
    count, matrices, ptx = seeds.numel(), segments.shape[0], launch.uses_ptx(a)
    tiles, more = kron_config(widest, count != 1)
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
            REST=more,
            PTX=ptx,
            **launch.compile_options(ptx, MOST_REGISTERS, WARPS),
        )
        if score is not None:
            grid = (matrices, -(-widest // LANES.value))
            arguments = (score, a, partials, segments, coeffs, count, stride)
            kron_score_kernel[grid](*arguments, **launch.compile_options(ptx))
