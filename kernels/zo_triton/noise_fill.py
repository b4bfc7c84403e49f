"""``out = z(seed)``, rounded to nearest."""

import triton
import triton.language as tl
from torch import Tensor
from zoengine.kernels import launch
from zoengine.kernels.groups import noise_rows, place, store_row
from zoengine.kernels.noise import GAUSSIAN, LANES, anchor
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
    """One group a program; see ``groups.place``."""
    SPAN: tl.constexpr = TILES * ROWS * LANES
    index = tl.arange(0, TILES)[:, None] * (ROWS * LANES) + tl.arange(0, LANES)[None, :]
    group, begin, low, high = place(first, step, n, offset, EDGE, SPAN)

    # Nothing is read; the load only gives Triton the layout that the stores want.
    zero = anchor(widen(tl.load(out_ptr + begin + index, mask=index < tl.minimum(n, 0)), PTX), PTX)
    seed = tl.load(seed_ptr)
    z = ()
    PASS: tl.constexpr = 4 if NOISE == GAUSSIAN else ROWS
    for row in tl.static_range(0, ROWS, PASS):
        z += noise_rows(seed, stream, group, zero, row, PASS, NOISE, TILES, ROWS, PTX)
    for row in tl.static_range(ROWS):
        value = round_nearest(z[row], out_ptr.dtype.element_ty)
        store_row(out_ptr + begin, index + row * LANES, value, low, high, EDGE)


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
