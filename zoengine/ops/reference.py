"""Every op in plain torch: the oracle of the tests, and the backend where no kernel exists.

Written for clarity and exact agreement with the kernels, not for speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoengine.noise import reference as stream_reference
from zoengine.noise import table

_CHUNK = 1 << 20  # elements whose temporaries are alive at once
_LANES = table.LANES


def add_noise_(x, seeds, coeffs, states, keep, sr_seed, offset, stream, noise) -> None:
    add_noise_out(x, seeds, coeffs, states, keep, sr_seed, offset, stream, noise, out=x)


def add_noise_out(x, seeds, coeffs, states, keep, sr_seed, offset, stream, noise, *, out) -> None:
    count = seeds.numel()
    for start in range(0, x.numel(), _CHUNK):
        piece = slice(start, min(start + _CHUNK, x.numel()))
        n = piece.stop - piece.start
        acc = x[piece].float()
        if keep is not None:
            acc = acc * keep
        for k in range(count):
            z = stream_reference.fill(seeds[k], offset + start, n, stream, noise)
            acc = stream_reference.fma(coeffs[k], z, acc)
        for j, state in enumerate(states):
            acc = stream_reference.fma(coeffs[count + j], state[piece], acc)
        if sr_seed is not None and out.dtype != torch.float32:
            bits = stream_reference.fill(sr_seed.reshape(()), offset + start, n, table.STREAM_ROUNDING, "rounding")
            out[piece] = round_stochastic(acc, bits, out.dtype)
        else:
            out[piece] = acc.to(out.dtype)


def round_stochastic(x: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 ``x`` rounded to bf16 or fp16 with 16-bit integers ``random`` (int64): up with the probability of the rest.

    The random bits are added just below the last bit kept, then everything below it is cut off. Infinities stay,
    NaN stays NaN. fp16 keeps 13 bits fewer than fp32 and takes the upper 13 random bits; below 2^-14, where its
    spacing is 2^-24, the same is done on the integer trunc(|x| 2^37).
    """
    bits = x.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    magnitude, sign = bits & 0x7FFFFFFF, bits >> 31
    if dtype == torch.bfloat16:
        rounded = torch.where(magnitude < 0x7F800000, (magnitude + random) >> 16, magnitude >> 16)
    else:
        fixed = (x.abs().clamp(max=2.0**-14) * 2.0**37).long()
        normal = magnitude - 0x38000000  # rebias the exponent from 127 to 15
        rounded = ((torch.where(magnitude < 0x38800000, fixed, normal) + (random >> 3)) >> 13).clamp(max=0x7C00)
    half = (rounded | sign << 15).to(torch.int32)
    result = torch.where(half >= 0x8000, half - 0x10000, half).to(torch.int16).view(dtype)
    return torch.where(x.isnan(), torch.full_like(result, float("nan")), result)


def noise_fill_(out, seed, offset, stream, noise) -> None:
    for start in range(0, out.numel(), _CHUNK):
        n = min(_CHUNK, out.numel() - start)
        out[start : start + n] = stream_reference.fill(seed.reshape(()), offset + start, n, stream, noise).to(out.dtype)


def segment_stats(x, starts, lengths) -> Tensor:
    rows = []
    for values in _segments(x, starts, lengths):
        empty = values.numel() == 0
        low = values.new_tensor(float("inf")) if empty else values.min()
        high = values.new_tensor(float("-inf")) if empty else values.max()
        rows.append(torch.stack((ordered_sum(values), ordered_sum(values * values), low, high)))
    return torch.stack(rows) if rows else x.new_empty((0, 4), dtype=torch.float64)


def segment_dot(x, y, starts, lengths) -> Tensor:
    pairs = zip(_segments(x, starts, lengths), _segments(y, starts, lengths), strict=True)
    return _stack([ordered_sum(a * b) for a, b in pairs], x)


def segment_dot_noise(x, seed, starts, lengths, offset, stream, noise) -> Tensor:
    dots = []
    for start, values in zip(starts.tolist(), _segments(x, starts, lengths), strict=True):
        z = stream_reference.fill(seed.reshape(()), offset + start, values.numel(), stream, noise)
        dots.append(ordered_sum(values * z.double()))
    return _stack(dots, x)


def ordered_sum(values: Tensor) -> Tensor:
    """The sum of float64 ``values`` in the order that every backend keeps, so that sums agree bit for bit.

    Tiles of 1024 values are summed by :func:`_lane_sum`, then the tile sums are summed by it once more.
    """
    padding = -values.numel() % 1024
    tiles = torch.nn.functional.pad(values, (0, padding)).view(-1, 1024)
    return _lane_sum(_lane_sum(tiles).unsqueeze(0)).squeeze(0)


def _lane_sum(rows: Tensor) -> Tensor:
    """Sum over the last dimension: 256 lanes, lane l adding elements l, l + 256, ... in order, then a halving tree."""
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % _LANES))
    lanes = torch.zeros((rows.shape[0], _LANES), dtype=rows.dtype, device=rows.device)
    for part in rows.split(_LANES, dim=-1) if rows.numel() else ():
        lanes = lanes + part
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes.squeeze(-1)


def _segments(x: Tensor, starts: Tensor, lengths: Tensor) -> list[Tensor]:
    return [x[a : a + n].double() for a, n in zip(starts.tolist(), lengths.tolist(), strict=True)]


def _stack(values: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(values) if values else like.new_empty((0,), dtype=torch.float64)
