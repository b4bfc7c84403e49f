"""Sums, extrema and dot products of segments, in float64 and in the order of ``reference.ordered_sum``.

The order: tiles of 1024 elements counted from the segment's start; in a tile lane l adds elements l, l + 256, ...;
a halving tree adds the lanes; the tile sums are added up once more in the same way.

Two launches: one program for each block of ``TILES`` tiles, then one program for each segment. The segment table stays
on the device, so the number of blocks is bounded, not known: disjoint segments never exceed the bound. Overlapping
ones may; the blocks beyond are then computed by the second kernel, which is right but slow.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from zoengine.kernels import launch
from zoengine.kernels.groups import TILE
from zoengine.kernels.noise import LANES, anchor, noise_at, tile_noise
from zoengine.kernels.rounding import widen
from zoengine.kernels.sums import add_stored, combine, halving_tree, larger, smaller

STATS = tl.constexpr(0)
DOT = tl.constexpr(1)
DOT_NOISE = tl.constexpr(2)
ROWS = tl.constexpr(4)  # of 256 lanes in a tile


@triton.jit
def _load_rows(ptr, begin, left, WHOLE: tl.constexpr, TILES: tl.constexpr, PTX: tl.constexpr):
    """Four fp32 tensors (TILES, 256): elements ``t 1024 + r 256 + l`` from ``begin`` on, 0 from the ``left``-th.

    ``WHOLE`` says that none is missing and that ``begin`` is a multiple of 16: then 16 bytes a thread are loaded.
    """
    index = tl.arange(0, TILES)[:, None] * TILE + tl.arange(0, LANES)[None, :]
    base = ptr + (begin // 16 * 16 if WHOLE else begin)  # the product tells the compiler
    rows = ()
    for row in tl.static_range(ROWS):
        at = index + row * LANES
        values = tl.load(base + at) if WHOLE else tl.load(base + at, mask=at < left, other=0.0)
        rows += (widen(values, PTX),)
    return rows


@triton.jit
def _noise_rows(seed, position, stream, zero, NOISE: tl.constexpr, TILES: tl.constexpr, PTX: tl.constexpr):
    """Noise of the elements that :func:`_load_rows` loads, the first of them at arena index ``position``."""
    tile = tl.arange(0, TILES)[:, None].to(tl.int64)
    if position % TILE == 0:
        z0, z1, z2, z3 = tile_noise(seed, position // TILE + tile, stream, zero, NOISE, PTX)
    else:
        at = position + tile * TILE + tl.arange(0, LANES)[None, :] + zero.to(tl.int64)
        z0 = noise_at(seed, at, stream, NOISE, PTX)
        z1 = noise_at(seed, at + LANES, stream, NOISE, PTX)
        z2 = noise_at(seed, at + 2 * LANES, stream, NOISE, PTX)
        z3 = noise_at(seed, at + 3 * LANES, stream, NOISE, PTX)
    return z0, z1, z2, z3


@triton.jit
def _tiles(
    x_ptr, y_ptr, seed_ptr, begin, left, offset, stream,
    WHOLE: tl.constexpr, KIND: tl.constexpr, NOISE: tl.constexpr, TILES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Results (TILES,) of the tiles from element ``begin`` on, of which ``left`` elements count.

    One result for a dot product; sum, sum of squares, minimum and maximum for the statistics.
    """
    x = _load_rows(x_ptr, begin, left, WHOLE, TILES, PTX)
    if KIND == DOT:
        y = _load_rows(y_ptr, begin, left, WHOLE, TILES, PTX)
    elif KIND == DOT_NOISE:
        zero = anchor(x[0], PTX)
        y = _noise_rows(tl.load(seed_ptr), offset + begin, stream, zero, NOISE, TILES, PTX)
    else:
        y = x
    index = tl.arange(0, TILES)[:, None] * TILE + tl.arange(0, LANES)[None, :]
    total = tl.zeros((TILES, LANES), tl.float64)
    products = tl.zeros((TILES, LANES), tl.float64)
    low = tl.full((TILES, LANES), float("inf"), tl.float32)
    high = tl.full((TILES, LANES), float("-inf"), tl.float32)
    for row in tl.static_range(ROWS):
        a = x[row].to(tl.float64)
        products = tl.fma(a, y[row].to(tl.float64), products)  # the product is exact: rounds as one addition does
        if KIND == STATS:
            total = total + a
            least, most = x[row], x[row]
            if not WHOLE:
                there = index + row * LANES < left
                least = tl.where(there, least, float("inf"))
                most = tl.where(there, most, float("-inf"))
            low = smaller(low, least)
            high = larger(high, most)
    if KIND == STATS:
        return (
            halving_tree(total, TILES),
            halving_tree(products, TILES),
            tl.reduce(low, 1, smaller).to(tl.float64),
            tl.reduce(high, 1, larger).to(tl.float64),
        )
    else:
        return (halving_tree(products, TILES),)


@triton.jit
def _block(
    x_ptr, y_ptr, seed_ptr, start, length, block, offset, stream,
    KIND: tl.constexpr, NOISE: tl.constexpr, TILES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """:func:`_tiles` for one block of a segment."""
    done = block * (TILES * TILE)
    begin = start + done
    left = tl.minimum(length - done, TILES * TILE).to(tl.int32)
    if (left == TILES * TILE) & (begin % 16 == 0):
        results = _tiles(x_ptr, y_ptr, seed_ptr, begin, left, offset, stream, True, KIND, NOISE, TILES, PTX)
    else:
        results = _tiles(x_ptr, y_ptr, seed_ptr, begin, left, offset, stream, False, KIND, NOISE, TILES, PTX)
    return results


@triton.jit
def find_segment(ends_ptr, segments, block):
    """The first segment whose end, a count of blocks, is beyond ``block``, and the blocks before it."""
    low = tl.zeros((), tl.int64)
    high = low + segments
    while low < high:
        middle = (low + high) // 2
        beyond = tl.load(ends_ptr + middle) > block
        low = tl.where(beyond, low, middle + 1)
        high = tl.where(beyond, middle, high)
    return low, tl.load(ends_ptr + low - 1, mask=low > 0, other=0)


@triton.jit(do_not_specialize=["offset", "stream", "segments", "capacity"])
def segment_blocks_kernel(
    partials_ptr,
    x_ptr,
    y_ptr,
    seed_ptr,
    starts_ptr,
    lengths_ptr,
    ends_ptr,
    offset: tl.int64,
    stream: tl.uint32,
    segments: tl.int32,
    capacity: tl.int64,
    KIND: tl.constexpr,
    NOISE: tl.constexpr,
    TILES: tl.constexpr,
    PTX: tl.constexpr,
):
    """Program p computes block p of all: ``ends_ptr`` holds for each segment the number of blocks up to its end."""
    program = tl.program_id(0).to(tl.int64)
    low, before = find_segment(ends_ptr, segments, program)
    if low < segments:
        start, length = tl.load(starts_ptr + low), tl.load(lengths_ptr + low)
        results = _block(
            x_ptr, y_ptr, seed_ptr, start, length, program - before, offset.to(tl.int64), stream.to(tl.uint32),
            KIND, NOISE, TILES, PTX,
        )  # fmt: skip
        slot = partials_ptr + program * TILES + tl.arange(0, TILES)
        for i in tl.static_range(4 if KIND == STATS else 1):
            tl.store(slot + i * capacity * TILES, results[i])


@triton.jit
def _add_block(lanes, results, block, COUNT: tl.constexpr, TILES: tl.constexpr):
    """The same for the tiles of one block that were not stored: ``results`` holds (TILES,) for each output."""
    lane = tl.arange(0, LANES)
    here = ((lane - block * TILES) & (LANES - 1)) < TILES
    sums = ()
    for i in tl.static_range(COUNT):
        values = tl.reshape(tl.broadcast_to(results[i][None, :], (LANES // TILES, TILES)), (LANES,))
        sums += (tl.where(here, combine(lanes[i], values, i), lanes[i]),)
    return sums


@triton.jit(do_not_specialize=["offset", "stream", "capacity"])
def segment_totals_kernel(
    result_ptr,
    partials_ptr,
    x_ptr,
    y_ptr,
    seed_ptr,
    starts_ptr,
    lengths_ptr,
    ends_ptr,
    offset: tl.int64,
    stream: tl.uint32,
    capacity: tl.int64,
    KIND: tl.constexpr,
    NOISE: tl.constexpr,
    TILES: tl.constexpr,
    PTX: tl.constexpr,
):
    """Program s adds up the tiles of segment s."""
    segment = tl.program_id(0)
    before = tl.load(ends_ptr + segment - 1, mask=segment > 0, other=0)
    blocks = tl.load(ends_ptr + segment) - before
    stored = tl.minimum(tl.maximum(capacity - before, 0), blocks)
    COUNT: tl.constexpr = 4 if KIND == STATS else 1
    lanes = ()
    for i in tl.static_range(COUNT):
        lanes += (add_stored(partials_ptr + (i * capacity + before) * TILES, stored * TILES, i),)
    for block in range(stored, blocks):
        start, length = tl.load(starts_ptr + segment), tl.load(lengths_ptr + segment)
        results = _block(
            x_ptr, y_ptr, seed_ptr, start, length, block, offset.to(tl.int64), stream.to(tl.uint32),
            KIND, NOISE, TILES, PTX,
        )  # fmt: skip
        lanes = _add_block(lanes, results, block, COUNT, TILES)
    for i in tl.static_range(COUNT):
        if i < 2:
            result = tl.sum(halving_tree(tl.reshape(lanes[i], (1, LANES)), 1), axis=0)
        else:
            result = tl.reduce(lanes[i], 0, smaller if i == 2 else larger)
        tl.store(result_ptr + segment * COUNT + i, result)


BLOCK_TILES = 4  # in the block of one program


def segment_stats(x: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """As ``zoengine.ops.schema`` says."""
    result = x.new_empty((starts.numel(), 4), dtype=torch.float64)
    _reduce(result, STATS.value, x, None, None, starts, lengths, 0, 0, 0)
    return result


def segment_dot(x: Tensor, y: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """As ``zoengine.ops.schema`` says."""
    result = x.new_empty((starts.numel(),), dtype=torch.float64)
    _reduce(result, DOT.value, x, y, None, starts, lengths, 0, 0, 0)
    return result


def segment_dot_noise(
    x: Tensor, seed: Tensor, starts: Tensor, lengths: Tensor, offset: int, stream: int, noise: int
) -> Tensor:
    """As ``zoengine.ops.schema`` says."""
    result = x.new_empty((starts.numel(),), dtype=torch.float64)
    _reduce(result, DOT_NOISE.value, x, None, seed, starts, lengths, offset, stream, noise)
    return result


def _reduce(result, kind, x, y, seed, starts, lengths, offset, stream, noise) -> None:
    """Fill ``result`` without reading anything back from the device."""
    segments = starts.numel()
    if segments == 0:
        return
    size = BLOCK_TILES * TILE.value
    ends = ((lengths + (size - 1)) // size).cumsum(0)
    capacity = x.numel() // size + segments  # blocks, at most, of disjoint segments
    partials = x.new_empty((4 if kind == STATS.value else 1, capacity, BLOCK_TILES), dtype=torch.float64)
    inputs = (x, y, seed, starts, lengths, ends, offset, stream)
    ptx = launch.uses_ptx(x)
    options = dict(KIND=kind, NOISE=noise, TILES=BLOCK_TILES, PTX=ptx, **launch.compile_options(ptx))
    with launch.on_device(x):
        segment_blocks_kernel[(capacity,)](partials, *inputs, segments, capacity, **options)
        segment_totals_kernel[(segments,)](result, partials, *inputs, capacity, **options)
