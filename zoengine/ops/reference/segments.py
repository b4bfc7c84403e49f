"""Sums, counts and noise over segments of a flat tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from zoengine.noise import reference as stream_reference
from zoengine.noise import table
from zoengine.ops.schema import HISTOGRAM_BINS

_LANES = table.LANES
_DIGITS = ((19, 31), (7, 19), (0, 7))  # the bits [low, high) of |x| in fp32 that each digit of a histogram holds


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


def segment_histogram(x, starts, lengths, prefixes, digit) -> Tensor:
    low, high = _DIGITS[digit]
    counts = x.new_zeros((starts.numel(), HISTOGRAM_BINS), dtype=torch.int64)
    for s, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        magnitude = x[start : start + length].float().view(torch.int32).long() & 0x7FFFFFFF
        magnitude = magnitude[magnitude >> high == prefixes[s]]
        counts[s] = torch.bincount(magnitude >> low & (1 << high - low) - 1, minlength=HISTOGRAM_BINS)
    return counts


def segment_noise_fill_(out, seed, starts, lengths, indices, stream, noise) -> None:
    for start, length, index in zip(starts.tolist(), lengths.tolist(), indices.tolist(), strict=True):
        z = stream_reference.fill(seed.reshape(()), index, length, stream, noise)
        out[start : start + length] = z.to(out.dtype)


def ordered_sum(values: Tensor) -> Tensor:
    """The sum of float64 ``values`` in the order that every backend keeps, so that sums agree bit for bit.

    Tiles of 1024 values are summed by :func:`lane_sum`, then the tile sums are summed by it once more.
    """
    padding = -values.numel() % 1024
    tiles = torch.nn.functional.pad(values, (0, padding)).view(-1, 1024)
    return lane_sum(lane_sum(tiles).unsqueeze(0)).squeeze(0)


def lane_sum(rows: Tensor) -> Tensor:
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
