"""Ops over segments of a flat tensor: sums in a fixed order, quantiles, and noise for many places at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoengine.noise import table
from zoengine.ops.checks import (
    bump,
    check_flat,
    check_like,
    check_position,
    check_stream,
    one_seed,
    segment_tensors,
    to_device,
)

_DIGIT_BITS = (12, 12, 7)  # of |x| in fp32, the highest first; what segment_histogram counts


def segment_stats(x: Tensor, starts: Tensor | Sequence[int], lengths: Tensor | Sequence[int]) -> Tensor:
    """Sum, sum of squares, minimum and maximum of each segment ``x[starts[s] : starts[s] + lengths[s]]``.

    Args:
        x: flat fp32, bf16 or fp16, contiguous.
        starts, lengths: S integers each (tensor or sequence). Elements outside every segment are never read.

    Returns:
        float64 of shape (S, 4) on ``x``'s device. Sums are taken in a fixed order (docs/noise-stream.md) and agree
        bit for bit between backends and runs; an empty segment gives (0, 0, inf, -inf).

    Raises:
        ValueError, TypeError: a segment reaches outside ``x``, or an argument is not as above.
    """
    check_flat("x", x)
    starts, lengths = segment_tensors(x, starts, lengths)
    return torch.ops.zoengine.segment_stats(x, starts, lengths)


def segment_dot(
    x: Tensor,
    starts: Tensor | Sequence[int],
    lengths: Tensor | Sequence[int],
    *,
    y: Tensor | None = None,
    seed: int | Tensor | None = None,
    offset: int = 0,
    stream: int = table.STREAM_DIRECTION,
    noise: str = "gaussian",
) -> Tensor:
    """Dot product of each segment of ``x`` with the same segment of ``y``, or with ``z(seed)``.

    Give exactly one of ``y`` (flat, same length as ``x``, fp32, bf16 or fp16) and ``seed``; with ``seed``, element i
    of ``x`` meets the noise at index ``offset + i``.

    Returns:
        float64 of shape (S,), deterministic as in :func:`segment_stats`.

    Raises:
        ValueError, TypeError: as :func:`segment_stats`, or not exactly one of ``y`` and ``seed``.
    """
    check_flat("x", x)
    starts, lengths = segment_tensors(x, starts, lengths)
    if (y is None) == (seed is None):
        raise ValueError("segment_dot takes exactly one of y=tensor and seed=integer")
    if y is not None:
        check_flat("y", y)
        check_like("y", y, x, None)
        return torch.ops.zoengine.segment_dot(x, y, starts, lengths)
    kind = check_position(offset, x.numel(), noise)
    seed = one_seed("seed", seed, x.device)
    return torch.ops.zoengine.segment_dot_noise(x, seed, starts, lengths, offset, check_stream(stream), kind)


def segment_noise_fill_(
    out: Tensor,
    seed: int | Tensor,
    starts: Tensor | Sequence[int],
    lengths: Tensor | Sequence[int],
    indices: Tensor | Sequence[int],
    *,
    stream: int = table.STREAM_DIRECTION,
    noise: str = "gaussian",
) -> Tensor:
    """``out[starts[s] + i] = z(seed)`` at index ``indices[s] + i`` for every i < lengths[s], in one launch.

    For noise that is packed more tightly than the arena: the factors of all matrices of a low-rank method.

    Raises:
        ValueError, TypeError: as :func:`segment_stats`.
    """
    check_flat("out", out)
    starts, lengths = segment_tensors(out, starts, lengths)
    if not isinstance(indices, Tensor):
        indices = torch.tensor(list(indices), dtype=torch.int64)
    if indices.dtype != torch.int64 or indices.shape != starts.shape:
        raise TypeError(f"indices must be int64 of shape {tuple(starts.shape)}, got {indices.dtype} of {indices.shape}")
    kind = check_position(0, 0, noise)
    seed = one_seed("seed", seed, out.device)
    bump(out)
    torch.ops.zoengine.segment_noise_fill_(
        out, seed, starts, lengths, to_device("indices", indices, out.device), check_stream(stream), kind
    )
    return out


def segment_quantile(
    x: Tensor, starts: Tensor | Sequence[int], lengths: Tensor | Sequence[int], fraction: float
) -> Tensor:
    """The ``fraction`` quantile of |x| over each segment: the smallest element with at least that share at or below it.

    Exact, by three histograms of 12, 12 and 7 bits of |x|, each over the elements that agree with what is known so far.

    Args:
        x: flat fp32, bf16 or fp16.
        starts, lengths: as in :func:`segment_stats`; no segment may be empty.
        fraction: in (0, 1].

    Returns:
        fp32 of shape (S,).

    Raises:
        ValueError, TypeError: as :func:`segment_stats`, or ``fraction`` outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    check_flat("x", x)
    starts, lengths = segment_tensors(x, starts, lengths)
    rank = (lengths.double() * fraction).ceil().long().clamp(min=1)  # the rank-th smallest is wanted
    prefix = torch.zeros_like(starts)
    for digit, bits in enumerate(_DIGIT_BITS):
        counts = torch.ops.zoengine.segment_histogram(x, starts, lengths, prefix, digit)
        below = counts.cumsum(1)
        value = (below < rank.unsqueeze(1)).sum(1)
        rank = rank - torch.where(value > 0, below.gather(1, (value - 1).clamp(min=0).unsqueeze(1)).squeeze(1), 0)
        prefix = prefix << bits | value
    return prefix.int().view(torch.float32)
