"""One bit an element: whether |x| is at most the threshold of its 1024-tile."""

import triton
import triton.language as tl
from torch import Tensor
from zoengine.kernels import launch
from zoengine.kernels.groups import TILE
from zoengine.kernels.rounding import widen

_BYTES = tl.constexpr(128)  # of a tile
_TILES = 4  # a program


@triton.jit
def _tiles(bits_ptr, x_ptr, thresholds_ptr, tile, n, EDGE: tl.constexpr, TILES: tl.constexpr, PTX: tl.constexpr):
    begin = tile * TILE
    left = tl.minimum(n - begin, TILES * TILE).to(tl.int32)
    number = tl.arange(0, TILES)[:, None]
    at = number * TILE + tl.arange(0, TILE)[None, :]
    there = at < left if EDGE else None
    limits = tl.load(thresholds_ptr + tile + number, mask=number * TILE < left if EDGE else None)
    below = tl.abs(widen(tl.load(x_ptr + begin + at, mask=there), PTX)) <= limits
    if EDGE:
        below = below & there
    bits = tl.reshape(below.to(tl.int32), (TILES, _BYTES, 8)) << tl.arange(0, 8)[None, None, :]
    byte = number * _BYTES + tl.arange(0, _BYTES)[None, :]
    where = bits_ptr + begin // 8 + byte
    tl.store(where, tl.sum(bits, axis=2).to(tl.uint8), mask=byte * 8 < left if EDGE else None)


@triton.jit(do_not_specialize=["n"])
def mask_below_kernel(bits_ptr, x_ptr, thresholds_ptr, n: tl.int64, TILES: tl.constexpr, PTX: tl.constexpr):
    """``TILES`` tiles a program."""
    tile = tl.program_id(0).to(tl.int64) * TILES
    if (tile + TILES) * TILE <= n:
        _tiles(bits_ptr, x_ptr, thresholds_ptr, tile, n, False, TILES, PTX)
    else:
        _tiles(bits_ptr, x_ptr, thresholds_ptr, tile, n, True, TILES, PTX)


def mask_below_(bits: Tensor, x: Tensor, thresholds: Tensor) -> None:
    """As ``zoengine.ops.schema`` says."""
    n, ptx = x.numel(), launch.uses_ptx(x)
    if n:
        with launch.on_device(x):
            mask_below_kernel[(-(-n // (_TILES * TILE.value)),)](
                bits, x, thresholds, n, TILES=_TILES, PTX=ptx, **launch.compile_options(ptx)
            )
