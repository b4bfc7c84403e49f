"""``out[starts[s] + i] = z(seed)`` at index ``indices[s] + i``, all segments in one launch."""

import triton
import triton.language as tl
from torch import Tensor
from zoengine.kernels import launch
from zoengine.kernels.groups import noise_rows
from zoengine.kernels.noise import LANES, anchor
from zoengine.kernels.rounding import round_nearest, widen
from zoengine.kernels.segments import find_segment


@triton.jit(do_not_specialize=["stream", "segments"])
def segment_noise_fill_kernel(
    out_ptr,
    seed_ptr,
    starts_ptr,
    lengths_ptr,
    indices_ptr,
    ends_ptr,
    stream: tl.uint32,
    segments: tl.int32,
    NOISE: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    PTX: tl.constexpr,
):
    """One group of the arena and one segment that touches it at a time; ``ends_ptr`` counts them, segment by segment.

    There are at least as many programs as that for disjoint segments; for others a program takes several.
    """
    SPAN: tl.constexpr = TILES * ROWS * LANES
    PASS: tl.constexpr = 4
    at = tl.arange(0, TILES)[:, None] * (ROWS * LANES) + tl.arange(0, LANES)[None, :]
    # Nothing is read; the load only gives Triton the layout that the stores want.
    zero = anchor(widen(tl.load(out_ptr + at, mask=at < tl.minimum(segments, 0)), PTX), PTX)
    seed = tl.load(seed_ptr)
    blocks = tl.load(ends_ptr + segments - 1).to(tl.int32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        segment, before = find_segment(ends_ptr, segments, block)
        index = tl.load(indices_ptr + segment)
        group = index // SPAN + (block - before)
        low = index - group * SPAN  # the segment covers [low, high) of the group and what lies beyond it
        high = low + tl.load(lengths_ptr + segment)
        begin = tl.load(starts_ptr + segment) - low
        whole = (low <= 0) & (high >= SPAN) & (begin % 16 == 0)
        for row0 in tl.static_range(0, ROWS, PASS):
            z = noise_rows(seed, stream, group, zero, row0, PASS, NOISE, TILES, ROWS, PTX)
            for row in tl.static_range(PASS):
                value = round_nearest(z[row], out_ptr.dtype.element_ty)
                place = at + (row0 + row) * LANES
                if whole:
                    tl.store(out_ptr + begin // 16 * 16 + place, value)
                else:
                    tl.store(out_ptr + begin + place, value, mask=(place >= low) & (place < high))


def segment_noise_fill_(
    out: Tensor, seed: Tensor, starts: Tensor, lengths: Tensor, indices: Tensor, stream: int, noise: int
) -> None:
    """As ``zoengine.ops.schema`` says. Where segments overlap, one of them wins."""
    segments = starts.numel()
    if segments == 0:
        return
    config, ptx = launch.STATE_CONFIG, launch.uses_ptx(out)
    ends = ((indices % config.span + lengths + (config.span - 1)) // config.span).cumsum(0)
    programs = out.numel() // config.span + 2 * segments
    with launch.on_device(out):
        segment_noise_fill_kernel[(programs,)](
            out,
            seed,
            starts,
            lengths,
            indices,
            ends,
            stream,
            segments,
            NOISE=noise,
            TILES=config.tiles,
            ROWS=config.rows,
            PTX=ptx,
            **launch.compile_options(ptx),
        )
