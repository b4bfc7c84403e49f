"""Sums in float64 and extrema, in the order of ``reference.ordered_sum``."""

import triton
import triton.language as tl
from zoengine.kernels.noise import LANES

_AHEAD = tl.constexpr(8)  # rows of stored results that are under way at once


@triton.jit
def smaller(a, b):
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def larger(a, b):
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def combine(a, b, OUTPUT: tl.constexpr):
    """Outputs 0 and 1 are sums, 2 is a minimum and 3 a maximum; NaN wins."""
    if OUTPUT == 2:
        return smaller(a, b)
    elif OUTPUT == 3:
        return larger(a, b)
    else:
        return a + b


@triton.jit
def neutral(OUTPUT: tl.constexpr):
    """What :func:`combine` starts from, as a float64 scalar."""
    value: tl.constexpr = float("inf") if OUTPUT == 2 else float("-inf") if OUTPUT == 3 else 0.0
    return tl.full((), value, tl.float64)


@triton.jit
def halving_tree(lanes, TILES: tl.constexpr):
    """(TILES, 256) to (TILES,): lane l is added to l + 128, then of these sums l to l + 64, and so on.

    Each step sums an axis of two elements, so the order is as written in whatever layout the compiler keeps them.
    """
    for level in tl.static_range(8):
        lanes = tl.sum(tl.reshape(lanes, (TILES, 2, LANES >> (level + 1))), axis=1)
    return tl.reshape(lanes, (TILES,))


@triton.jit
def add_stored(ptr, tiles, OUTPUT: tl.constexpr):
    """Lanes (256,): lane l combines the stored results of tiles l, l + 256, ... in order."""
    lane = tl.arange(0, LANES)
    lanes = tl.zeros((LANES,), tl.float64) + neutral(OUTPUT)
    for tile in range(0, tiles, LANES * _AHEAD):
        values = ()
        for i in tl.static_range(_AHEAD):
            at = tile + i * LANES + lane
            values += (tl.load(ptr + at, mask=at < tiles, other=neutral(OUTPUT)),)
        for i in tl.static_range(_AHEAD):
            lanes = combine(lanes, values[i], OUTPUT)
    return lanes
