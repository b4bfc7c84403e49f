"""Checks of the public ops' arguments, and their conversion to what a backend takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoengine.noise import table
from zoengine.noise.seeds import check_seed, to_int64

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDINGS = ("nearest", "stochastic")

Seeds = Tensor | int | Sequence[int]
Coefficients = Tensor | float | Sequence[float]
Streams = int | Sequence[int]


def check_data(name: str, x: Tensor) -> None:
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


def check_flat(name: str, x: Tensor) -> None:
    check_data(name, x)
    if x.dim() != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {tuple(x.shape)}; pass {name}.view(-1)")


def check_like(name: str, tensor: Tensor, x: Tensor, dtype: torch.dtype | None) -> None:
    check_data(name, tensor)
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}; move one of them")
    if tensor.shape != x.shape:
        raise ValueError(f"{name} must have x's shape {tuple(x.shape)}, got {tuple(tensor.shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")


def check_position(offset: int, count: int, noise: str) -> int:
    """The integer of ``noise``, once it and the position are known to be valid."""
    if noise not in table.NOISES:
        raise ValueError(f"noise must be one of {', '.join(table.NOISES)}, got {noise!r}")
    if not 0 <= offset <= 2**63 - 1 - count:
        raise ValueError(f"offset must be in [0, 2^63 - numel), got {offset}")
    return table.NOISES[noise]


def check_stream(stream: int) -> int:
    if not 0 <= stream < 2**32:
        raise ValueError(f"stream must be in [0, 2^32), got {stream}")
    return stream


def term_tensors(
    seeds: Seeds, streams: Streams, coeffs: Coefficients, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """seeds, streams and coefficients of K noise terms, one of each per term."""
    seeds, count = seed_tensor(seeds, device)
    return (
        seeds,
        stream_tensor(streams, count, device),
        coefficient_tensor("coeffs", coeffs, count, "one per seed", device),
    )


def stream_tensor(streams: Streams, count: int, device: torch.device) -> Tensor:
    if isinstance(streams, int):
        return torch.full((count,), check_stream(streams), dtype=torch.int64, device=device)
    if len(streams) != count:
        raise ValueError(f"stream must be one number or {count}, one per seed, got {len(streams)}")
    return to_device("stream", torch.tensor([check_stream(s) for s in streams], dtype=torch.int64), device)


def rounding_seed(rounding: str, sr_seed: int | Tensor, device: torch.device) -> Tensor | None:
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    return one_seed("sr_seed", sr_seed, device) if rounding == "stochastic" else None


def keep_tensor(name: str, keep: float | Tensor, device: torch.device) -> Tensor | None:
    """``keep`` as an fp32 tensor, or None for the number 1, which multiplies nothing."""
    if isinstance(keep, Tensor):
        return coefficient_tensor(name, keep, 1, "a factor", device)
    return None if keep == 1 else to_device(name, torch.tensor([keep], dtype=torch.float32), device)


def check_no_overlap(out: Tensor, x: Tensor) -> None:
    if out.data_ptr() != x.data_ptr() and abs(out.data_ptr() - x.data_ptr()) < x.nbytes:
        raise ValueError("out and x overlap in memory without being the same; clone one of them")


def seed_tensor(seeds: Seeds, device: torch.device) -> tuple[Tensor, int]:
    if not isinstance(seeds, Tensor):
        values = [seeds] if isinstance(seeds, int) else list(seeds)
        seeds = torch.tensor([to_int64(check_seed(s)) for s in values], dtype=torch.int64)
    if seeds.dtype != torch.int64:
        raise TypeError(f"seeds must be int64, got {seeds.dtype}")
    if seeds.dim() > 1:
        raise ValueError(f"seeds must have shape (K,), got {tuple(seeds.shape)}")
    seeds = to_device("seeds", seeds.reshape(-1), device)
    return seeds, seeds.numel()


def one_seed(name: str, seed: int | Tensor, device: torch.device) -> Tensor:
    if not isinstance(seed, Tensor):
        seed = torch.tensor([to_int64(check_seed(seed, name))], dtype=torch.int64)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError(f"{name} must be one int64, got {seed.dtype} of shape {tuple(seed.shape)}")
    return to_device(name, seed.reshape(1), device)


def coefficient_tensor(name: str, values: Coefficients, count: int, what: str, device: torch.device) -> Tensor:
    if not isinstance(values, Tensor):
        values = torch.tensor([values] if isinstance(values, int | float) else list(values), dtype=torch.float64)
    values = values.reshape(-1).to(torch.float32)
    if values.numel() != count:
        raise ValueError(f"{name} must hold {count} numbers, {what}, got {values.numel()}")
    return to_device(name, values, device)


def keep_factor(decay: float | Tensor, device: torch.device) -> Tensor | None:
    if isinstance(decay, Tensor):
        if decay.numel() != 1:
            raise ValueError(f"decay must be one number, got a tensor of shape {tuple(decay.shape)}")
        return to_device("decay", (1.0 - decay.double()).float().reshape(1), device)
    return None if decay == 0 else to_device("decay", torch.tensor([1.0 - decay], dtype=torch.float32), device)


def to_device(name: str, tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device == device:
        return tensor.contiguous()
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device} but the data is on {device}; pass it from the host or there")
    if tensor.numel() == 0:
        return torch.empty_like(tensor, device=device)  # nothing to copy, so nothing that a graph capture could refuse
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)  # no host synchronisation
    return tensor.to(device)


def segment_tensors(
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
    return to_device("starts", starts, x.device), to_device("lengths", lengths, x.device)


def bump(x: Tensor) -> None:
    """Tell autograd that ``x`` changes; raw ops do not, and a graph that saved ``x`` would use the new values."""
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)
