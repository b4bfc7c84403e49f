"""How many elements of each segment have each value of one digit of |x|, among those with given digits before it."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from zoengine.kernels import launch
from zoengine.kernels.noise import word
from zoengine.kernels.rounding import widen
from zoengine.kernels.segments import find_segment

from zoengine.ops.schema import HISTOGRAM_BINS

_BINS = tl.constexpr(HISTOGRAM_BINS)
_DIGITS = ((19, 31), (7, 19), (0, 7))  # the bits [low, high) of |x| in fp32
_CHUNK = tl.constexpr(2048)
_CHUNKS = 8  # in the block of one program
_MOST_COPIES = 16


@triton.jit
def _count(
    bins_ptr, x_ptr, begin, left, prefix,
    WHOLE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Count a chunk from element ``begin`` on, of which ``left`` elements exist; ``WHOLE``: all, 16 bytes a thread."""
    at = tl.arange(0, _CHUNK)
    base = x_ptr + (begin // 16 * 16 if WHOLE else begin)  # the product tells the compiler
    values = widen(tl.load(base + at, mask=None if WHOLE else at < left), PTX)
    magnitude = values.to(tl.uint32, bitcast=True) & word(0x7FFFFFFF)
    counted = (magnitude >> HIGH) == prefix
    if not WHOLE:
        counted = counted & (at < left)
    digit = ((magnitude >> LOW) & word((1 << (HIGH - LOW)) - 1)).to(tl.int32)
    tl.atomic_add(bins_ptr + digit, tl.full((_CHUNK,), 1, tl.int64), mask=counted, sem="relaxed")


@triton.jit(do_not_specialize=["segments", "copies"])
def segment_histogram_kernel(
    counts_ptr,
    x_ptr,
    starts_ptr,
    lengths_ptr,
    prefixes_ptr,
    ends_ptr,
    segments: tl.int32,
    copies: tl.int32,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    CHUNKS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Blocks of ``CHUNKS`` chunks; ``ends_ptr`` counts them. ``copies`` sets of counts, to share the hot bins out.

    There are at least as many programs as blocks for disjoint segments; for others a program takes several.
    """
    SIZE: tl.constexpr = CHUNKS * _CHUNK
    copy = (tl.program_id(0) % copies).to(tl.int64)
    blocks = tl.load(ends_ptr + segments - 1).to(tl.int32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        segment, before = find_segment(ends_ptr, segments, block)
        done = (block - before).to(tl.int64) * SIZE
        begin = tl.load(starts_ptr + segment) + done
        left = tl.minimum(tl.load(lengths_ptr + segment) - done, SIZE).to(tl.int32)
        prefix = tl.load(prefixes_ptr + segment).to(tl.uint32)
        bins_ptr = counts_ptr + (copy * segments + segment) * _BINS
        for chunk in range(0, left, _CHUNK):
            if (left - chunk >= _CHUNK) & (begin % 16 == 0):
                _count(bins_ptr, x_ptr, begin + chunk, left - chunk, prefix, True, LOW, HIGH, PTX)
            else:
                _count(bins_ptr, x_ptr, begin + chunk, left - chunk, prefix, False, LOW, HIGH, PTX)


def segment_histogram(x: Tensor, starts: Tensor, lengths: Tensor, prefixes: Tensor, digit: int) -> Tensor:
    """As ``zoengine.ops.schema`` says."""
    segments = starts.numel()
    # Weights crowd into a few bins, and an atomic addition waits for the one before it to the same bin.
    copies = max(1, min(_MOST_COPIES, 1024 // max(segments, 1)))
    counts = x.new_zeros((copies, segments, HISTOGRAM_BINS), dtype=torch.int64)
    if segments and x.numel():
        size, ptx = _CHUNKS * _CHUNK.value, launch.uses_ptx(x)
        ends = ((lengths + (size - 1)) // size).cumsum(0)
        low, high = _DIGITS[digit]
        with launch.on_device(x):
            segment_histogram_kernel[(x.numel() // size + segments,)](
                counts, x, starts, lengths, prefixes, ends, segments, copies,
                LOW=low, HIGH=high, CHUNKS=_CHUNKS, PTX=ptx, **launch.compile_options(ptx),
            )  # fmt: skip
    return counts.sum(0)
