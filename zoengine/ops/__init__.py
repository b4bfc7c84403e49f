"""Noise kernels under one name each, whatever the device: ``zoengine.ops.add_noise_`` and its kin.

Every function here checks its arguments, brings seeds and coefficients to the device of ``x``, and calls the
torch.library op of the same name; the backend that runs it is chosen by :mod:`zoengine.ops.backends`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoengine.noise import table
from zoengine.noise.seeds import check_seed, to_int64
from zoengine.ops.backends import Backend, backends, current, use

__all__ = [
    "Backend",
    "add_noise_",
    "backends",
    "current",
    "noise_fill",
    "noise_fill_",
    "segment_dot",
    "segment_stats",
    "use",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDINGS = ("nearest", "stochastic")

Seeds = Tensor | int | Sequence[int]
Coefficients = Tensor | float | Sequence[float]


def add_noise_(
    x: Tensor,
    seeds: Seeds,
    coeffs: Coefficients,
    *,
    offset: int = 0,
    stream: int = table.STREAM_DIRECTION,
    noise: str = "gaussian",
    states: Sequence[Tensor] = (),
    state_coeffs: Coefficients = (),
    decay: float | Tensor = 0.0,
    out: Tensor | None = None,
    rounding: str = "nearest",
    sr_seed: int | Tensor = 0,
) -> Tensor:
    """``out = (1 - decay) x + sum_k coeffs[k] z(seeds[k]) + sum_j state_coeffs[j] states[j]`` in one pass.

    Accumulates in fp32 in exactly this order, one fused multiply-add per term, and rounds once at the end.

    Args:
        x: fp32, bf16 or fp16, any shape, contiguous; element i stands at arena index ``offset + i``.
        seeds: K seeds of 64 bits: an int64 tensor of shape (K,), an integer or a sequence of integers.
        coeffs: K fp32 coefficients, as a tensor of shape (K,), a number or a sequence.
        offset: arena index of the first element, 0 <= offset, offset + x.numel() <= 2^63.
        stream: stream id, see docs/noise-stream.md.
        noise: ``"gaussian"`` or ``"rademacher"``.
        states: up to two fp32 tensors of ``x``'s shape that are added as they are (a momentum, for instance).
        state_coeffs: one fp32 coefficient per state.
        decay: fraction of ``x`` to take away; the kernel multiplies by fp32(1 - decay) and skips that for 0.
        out: where to write, of ``x``'s shape and dtype; ``None`` writes to ``x`` itself. May not overlap ``x``
            other than by being ``x``.
        rounding: ``"nearest"`` (ties to even) or ``"stochastic"`` (unbiased; fp32 results are exact either way).
        sr_seed: 64-bit seed of the rounding bits (stream 4, same index as the noise).

    Seeds, coefficients, decay and sr_seed may be tensors on the host or on ``x``'s device: new values never
    recompile a kernel, and a CUDA graph reads them afresh at every replay when they are device tensors.

    Returns:
        The tensor written to.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, layout, device or range is not as above.
    """
    _check_data("x", x)
    device = x.device
    seeds, count = _seed_tensor(seeds, device)
    coeffs = _coefficient_tensor("coeffs", coeffs, count, "one per seed", device)
    if len(states) > 2:
        raise ValueError(f"at most 2 states can be added in one pass, got {len(states)}")
    state_coeffs = _coefficient_tensor("state_coeffs", state_coeffs, len(states), "one per state", device)
    for j, state in enumerate(states):
        _check_like(f"states[{j}]", state, x, torch.float32)
    if states:
        coeffs = torch.cat((coeffs, state_coeffs))
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    sr = _one_seed("sr_seed", sr_seed, device) if rounding == "stochastic" else None
    keep = _keep_factor(decay, device)
    offset, stream, kind = _check_position(offset, x.numel(), stream, noise)

    flat = x.view(-1)
    flat_states = [state.view(-1) for state in states]
    if out is None or out is x:
        _bump(x)
        torch.ops.zoengine.add_noise_(flat, seeds, coeffs, flat_states, keep, sr, offset, stream, kind)
        return x
    _check_like("out", out, x, x.dtype)
    if out.data_ptr() != x.data_ptr() and abs(out.data_ptr() - x.data_ptr()) < x.nbytes:
        raise ValueError("out and x overlap in memory without being the same; clone one of them")
    _bump(out)
    torch.ops.zoengine.add_noise_out(flat, seeds, coeffs, flat_states, keep, sr, offset, stream, kind, out=out.view(-1))
    return out


def noise_fill_(
    out: Tensor,
    seed: int | Tensor,
    *,
    offset: int = 0,
    stream: int = table.STREAM_DIRECTION,
    noise: str = "gaussian",
) -> Tensor:
    """Write ``z(seed)`` at indices ``offset ...`` into ``out`` (fp32, bf16 or fp16, rounded to nearest) and return it.

    Raises:
        ValueError, TypeError: as :func:`add_noise_`.
    """
    _check_data("out", out)
    seed = _one_seed("seed", seed, out.device)
    offset, stream, kind = _check_position(offset, out.numel(), stream, noise)
    _bump(out)
    torch.ops.zoengine.noise_fill_(out.view(-1), seed, offset, stream, kind)
    return out


def noise_fill(
    shape: int | Sequence[int],
    seed: int | Tensor,
    *,
    offset: int = 0,
    stream: int = table.STREAM_DIRECTION,
    noise: str = "gaussian",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A new tensor of ``shape`` holding ``z(seed)``; see :func:`noise_fill_`."""
    return noise_fill_(torch.empty(shape, dtype=dtype, device=device), seed, offset=offset, stream=stream, noise=noise)


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
    _check_flat("x", x)
    starts, lengths = _segment_tensors(x, starts, lengths)
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
    _check_flat("x", x)
    starts, lengths = _segment_tensors(x, starts, lengths)
    if (y is None) == (seed is None):
        raise ValueError("segment_dot takes exactly one of y=tensor and seed=integer")
    if y is not None:
        _check_flat("y", y)
        _check_like("y", y, x, None)
        return torch.ops.zoengine.segment_dot(x, y, starts, lengths)
    offset, stream, kind = _check_position(offset, x.numel(), stream, noise)
    seed = _one_seed("seed", seed, x.device)
    return torch.ops.zoengine.segment_dot_noise(x, seed, starts, lengths, offset, stream, kind)


def _check_data(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")
    if not x.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, got shape {tuple(x.shape)} with strides {x.stride()}; "
            f"pass {name}.contiguous() and copy the result back"
        )
    if x.device.type == "meta":
        raise ValueError(f"{name} is on the meta device and holds no data; materialise it first")


def _check_flat(name: str, x: Tensor) -> None:
    _check_data(name, x)
    if x.dim() != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {tuple(x.shape)}; pass {name}.view(-1)")


def _check_like(name: str, tensor: Tensor, x: Tensor, dtype: torch.dtype | None) -> None:
    _check_data(name, tensor)
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}; move one of them")
    if tensor.shape != x.shape:
        raise ValueError(f"{name} must have x's shape {tuple(x.shape)}, got {tuple(tensor.shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")


def _check_position(offset: int, count: int, stream: int, noise: str) -> tuple[int, int, int]:
    if noise not in table.NOISES:
        raise ValueError(f"noise must be one of {', '.join(table.NOISES)}, got {noise!r}")
    if not 0 <= offset <= 2**63 - 1 - count:
        raise ValueError(f"offset must be in [0, 2^63 - numel), got {offset}")
    if not 0 <= stream < 2**32:
        raise ValueError(f"stream must be in [0, 2^32), got {stream}")
    return offset, stream, table.NOISES[noise]


def _seed_tensor(seeds: Seeds, device: torch.device) -> tuple[Tensor, int]:
    if not isinstance(seeds, Tensor):
        values = [seeds] if isinstance(seeds, int) else list(seeds)
        seeds = torch.tensor([to_int64(check_seed(s)) for s in values], dtype=torch.int64)
    if seeds.dtype != torch.int64:
        raise TypeError(f"seeds must be int64, got {seeds.dtype}")
    if seeds.dim() > 1:
        raise ValueError(f"seeds must have shape (K,), got {tuple(seeds.shape)}")
    seeds = _to_device("seeds", seeds.reshape(-1), device)
    return seeds, seeds.numel()


def _one_seed(name: str, seed: int | Tensor, device: torch.device) -> Tensor:
    if not isinstance(seed, Tensor):
        seed = torch.tensor([to_int64(check_seed(seed, name))], dtype=torch.int64)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError(f"{name} must be one int64, got {seed.dtype} of shape {tuple(seed.shape)}")
    return _to_device(name, seed.reshape(1), device)


def _coefficient_tensor(name: str, values: Coefficients, count: int, what: str, device: torch.device) -> Tensor:
    if not isinstance(values, Tensor):
        values = torch.tensor([values] if isinstance(values, int | float) else list(values), dtype=torch.float64)
    values = values.reshape(-1).to(torch.float32)
    if values.numel() != count:
        raise ValueError(f"{name} must hold {count} numbers, {what}, got {values.numel()}")
    return _to_device(name, values, device)


def _keep_factor(decay: float | Tensor, device: torch.device) -> Tensor | None:
    if isinstance(decay, Tensor):
        if decay.numel() != 1:
            raise ValueError(f"decay must be one number, got a tensor of shape {tuple(decay.shape)}")
        return _to_device("decay", (1.0 - decay.double()).float().reshape(1), device)
    return None if decay == 0 else _to_device("decay", torch.tensor([1.0 - decay], dtype=torch.float32), device)


def _to_device(name: str, tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device == device:
        return tensor.contiguous()
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device} but the data is on {device}; pass it from the host or there")
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)  # no host synchronisation
    return tensor.to(device)


def _segment_tensors(
    x: Tensor, starts: Tensor | Sequence[int], lengths: Tensor | Sequence[int]
) -> tuple[Tensor, Tensor]:
    checked = []
    for name, values in (("starts", starts), ("lengths", lengths)):
        tensor = values if isinstance(values, Tensor) else torch.tensor(list(values), dtype=torch.int64)
        if tensor.dtype != torch.int64 or tensor.dim() != 1:
            raise TypeError(f"{name} must be int64 of shape (S,), got {tensor.dtype} of shape {tuple(tensor.shape)}")
        checked.append(tensor)
    starts, lengths = checked
    if starts.numel() != lengths.numel():
        raise ValueError(f"starts and lengths must be equally long, got {starts.numel()} and {lengths.numel()}")
    # Device tables are trusted: reading them back would synchronise. The arena passes its own, checked when built.
    if starts.device.type == "cpu" and lengths.device.type == "cpu":
        bad = (starts < 0) | (lengths < 0) | (starts + lengths > x.numel())
        if bad.any():
            s = int(bad.nonzero()[0])
            stop = int(starts[s]) + int(lengths[s])
            raise ValueError(f"segment {s} is [{int(starts[s])}, {stop}), outside of x's {x.numel()} elements")
    return _to_device("starts", starts, x.device), _to_device("lengths", lengths, x.device)


def _bump(x: Tensor) -> None:
    """Tell autograd that ``x`` changes; raw ops do not, and a graph that saved ``x`` would use the new values."""
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)
