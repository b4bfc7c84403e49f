"""Noise stream version 1 in plain torch: the oracle every kernel is compared with, bit for bit.

docs/noise-stream.md is the specification. Everything is integer arithmetic in int64 or fp32 arithmetic with one
IEEE rounding per operation; where a kernel uses a fused multiply-add, :func:`fma` reproduces its single rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoengine.noise import table

_MASK32 = 0xFFFFFFFF
_CHUNK_TILES = 1 << 10  # bounds the temporaries of a long fill


def fma(a: Tensor, b: Tensor, c: Tensor | float) -> Tensor:
    """fp32 ``a * b + c`` rounded once, from float64 arithmetic.

    The product of two fp32 numbers is exact in float64; the sum is made exact enough by rounding it to odd, after
    which the conversion to fp32 rounds as if from the exact value (Boldo and Melquiond 2008). Plain float64 would
    round twice and differ in about one of 100,000 values.
    """
    product = a.double() * b.double()
    addend = c.double() if isinstance(c, Tensor) else torch.full((), c, dtype=torch.float64, device=a.device)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)  # TwoSum: total + error is exact
    bits = total.view(torch.int64)
    toward = torch.where((error > 0) == (total > 0), 1, -1)
    odd = torch.where((error != 0) & (bits & 1 == 0) & torch.isfinite(total), bits + toward, bits)
    return odd.view(torch.float64).float()


def philox4x32(seed: Tensor, block: Tensor, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 words for int64 ``block`` numbers; key = ``seed`` (int64 scalar), counter (block, stream, 0).

    Returns four int64 tensors shaped like ``block`` with values in [0, 2^32).
    """
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    c0, c1 = block & _MASK32, (block >> 32) & _MASK32
    c2, c3 = torch.full_like(block, stream), torch.zeros_like(block)
    for _ in range(table.PHILOX_ROUNDS):
        p0, p1 = table.PHILOX_M0 * c0, table.PHILOX_M1 * c2  # int64 wraps: bits 32..63 are those of the product
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + table.PHILOX_W0) & _MASK32, (k1 + table.PHILOX_W1) & _MASK32
    return c0, c1, c2, c3


def box_muller(w_radius: Tensor, w_angle: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals (fp32) from two 32-bit words held in int64."""
    u = fma((w_radius >> 1).float(), _scalar(w_radius, table.U_SCALE), table.U_SHIFT)
    radius = minus_two_log(u).double().sqrt().float()  # torch's fp32 sqrt on CPU is not correctly rounded

    x = _signed32(w_angle << 2).float() * table.ANGLE_SCALE
    x2 = x * x
    sine = fma(_horner(table.SIN_POLY, x2) * x2, x, x)
    cosine = fma(_horner(table.COS_POLY, x2), x2, 1.0)
    quadrant = ((w_angle + table.QUADRANT_SHIFT) & _MASK32) >> 30
    radius = torch.where(quadrant >= 2, -radius, radius)
    swap = quadrant & 1 == 1
    return radius * torch.where(swap, -sine, cosine), radius * torch.where(swap, cosine, sine)


def minus_two_log(u: Tensor) -> Tensor:
    """-2 ln u for fp32 u in (0, 1], by exponent split and a degree-7 polynomial."""
    bits = u.view(torch.int32).long()
    exponent = _signed32((bits - table.LOG_PIVOT) & table.LOG_EXPONENT_MASK)
    m = (bits - exponent).int().view(torch.float32) - 1.0
    tail = fma(exponent.float(), _scalar(u, table.LOG_SCALE), table.LOG_FLOOR)
    return fma(m, _horner(table.LOG_POLY, m), tail)


def gaussian(seed: Tensor, tiles: Tensor, stream: int) -> Tensor:
    """Normals of whole tiles of 1024: shape ``(len(tiles), 4, 256)``, fp32."""
    words = philox4x32(seed, _blocks(tiles), stream)
    return torch.stack((*box_muller(words[0], words[1]), *box_muller(words[2], words[3])), dim=1)


def rademacher(seed: Tensor, tiles: Tensor, stream: int) -> Tensor:
    """Signs of whole tiles of 32768: shape ``(len(tiles), 128, 256)``, fp32, +1 or -1."""
    words = torch.stack(philox4x32(seed, _blocks(tiles), stream), dim=1)
    bits = (words.unsqueeze(2) >> torch.arange(32, device=tiles.device).view(1, 1, 32, 1)) & 1
    return (2 * bits - 1).float().flatten(1, 2)


def rounding(seed: Tensor, tiles: Tensor, stream: int = table.STREAM_ROUNDING) -> Tensor:
    """16-bit integers of stochastic rounding for whole tiles of 2048: shape ``(len(tiles), 8, 256)``, int64."""
    words = torch.stack(philox4x32(seed, _blocks(tiles), stream), dim=1)
    return torch.stack((words & 0xFFFF, words >> 16), dim=2).flatten(1, 2)


_TILED = {table.GAUSSIAN: gaussian, table.RADEMACHER: rademacher, "rounding": rounding}
_PER_CALL = {
    table.GAUSSIAN: table.GAUSSIAN_PER_CALL,
    table.RADEMACHER: table.RADEMACHER_PER_CALL,
    "rounding": table.ROUNDING_PER_CALL,
}


def fill(seed: Tensor, offset: int, count: int, stream: int, kind: int | str) -> Tensor:
    """Elements ``offset .. offset + count`` of a stream, as a flat tensor on ``seed``'s device.

    ``kind`` is ``table.GAUSSIAN``, ``table.RADEMACHER`` (both fp32) or ``"rounding"`` (int64).
    """
    tile_size = _PER_CALL[kind] * table.LANES
    first, last = offset // tile_size, (offset + count + tile_size - 1) // tile_size
    chunk = max(1, _CHUNK_TILES * 1024 // tile_size)
    parts = [
        _TILED[kind](seed, torch.arange(t, min(t + chunk, last), device=seed.device), stream).flatten()
        for t in range(first, last, chunk)
    ]
    if not parts:
        return torch.empty(0, dtype=torch.float32, device=seed.device)
    start = offset - first * tile_size
    return torch.cat(parts)[start : start + count]


def _blocks(tiles: Tensor) -> Tensor:
    return tiles.unsqueeze(1) * table.LANES + torch.arange(table.LANES, device=tiles.device)


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value: Tensor | float = _scalar(x, coefficients[-1]).expand_as(x)
    for c in reversed(coefficients[:-1]):
        value = fma(value, x, c)
    return value


def _scalar(like: Tensor, value: float) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=like.device)


def _signed32(word: Tensor) -> Tensor:
    """The low 32 bits of an int64, read as a signed 32-bit integer."""
    return ((word & _MASK32) ^ 0x80000000) - 0x80000000
