"""``out = z(seed)``, rounded to nearest."""

import triton
import triton.language as tl
from torch import Tensor
from zoengine.kernels import launch
from zoengine.kernels.noise import GAUSSIAN, LANES, anchor, normals, signs, word
from zoengine.kernels.rounding import round_nearest, widen


@triton.jit(do_not_specialize=["n", "offset", "first", "step", "stream"])
def noise_fill_kernel(
    out_ptr,
    seed_ptr,
    n: tl.int64,
    offset: tl.int64,
    first: tl.int64,
    step: tl.int64,
    stream: tl.uint32,
    NOISE: tl.constexpr,
    EDGE: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    PTX: tl.constexpr,
):
    """One group a program; groups and edges as in ``add_noise_kernel``."""
    SPAN: tl.constexpr = TILES * ROWS * LANES
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

    # Nothing is read; the load only gives Triton the layout that the stores want.
    zero = anchor(widen(tl.load(out_ptr + begin + index, mask=index < tl.minimum(n, 0)), PTX), PTX)
    seed = tl.load(seed_ptr)
    if NOISE == GAUSSIAN:
        z = normals(seed, group, stream, zero, 0, TILES, ROWS, PTX)
    else:
        z = signs(seed, group, stream, zero, TILES, ROWS, PTX)
    for row in tl.static_range(ROWS):
        value = z[row] if NOISE == GAUSSIAN else (z[row] | word(0x3F800000)).to(tl.float32, bitcast=True)
        at = index + row * LANES
        value = round_nearest(value, out_ptr.dtype.element_ty)
        tl.store(out_ptr + begin + at, value, mask=(at >= low) & (at < high) if EDGE else None)


def noise_fill_(out: Tensor, seed: Tensor, offset: int, stream: int, noise: int) -> None:
    """As ``zoengine.ops.schema`` says."""
    config, ptx = launch.noise_config(noise), launch.uses_ptx(out)
    for part in launch.parts(offset, out.numel(), config.span):
        with launch.on_device(out):
            noise_fill_kernel[(part.programs,)](
                out[part.start :],
                seed,
                out.numel(),
                offset,
                part.first,
                part.step,
                stream,
                NOISE=noise,
                EDGE=part.edge,
                TILES=config.tiles,
                ROWS=config.rows,
                PTX=ptx,
                **launch.compile_options(ptx),
            )
