"""Elementwise ops: noise added to weights, folded into a state, or put through an update rule, in one pass each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from zoengine.noise import table
from zoengine.ops.checks import (
    Coefficients,
    Seeds,
    Streams,
    bump,
    check_data,
    check_flat,
    check_like,
    check_no_overlap,
    check_position,
    check_stream,
    coefficient_tensor,
    keep_factor,
    keep_tensor,
    one_seed,
    rounding_seed,
    term_tensors,
    to_device,
)
from zoengine.ops.schema import RULES, TRANSFORMS

_TILE = 1024


def add_noise_(
    x: Tensor,
    seeds: Seeds,
    coeffs: Coefficients,
    *,
    offset: int = 0,
    stream: Streams = table.STREAM_DIRECTION,
    noise: str = "gaussian",
    scale: Tensor | None = None,
    mask: Tensor | None = None,
    diag: Tensor | None = None,
    states: Sequence[Tensor] = (),
    state_coeffs: Coefficients = (),
    decay: float | Tensor = 0.0,
    out: Tensor | None = None,
    rounding: str = "nearest",
    sr_seed: int | Tensor = 0,
) -> Tensor:
    """``out = (1 - decay) x + sum_k coeffs[k] T(z(seeds[k])) + sum_j state_coeffs[j] states[j]`` in one pass.

    Accumulates in fp32 in exactly this order, one fused multiply-add per term, and rounds once at the end.

    Args:
        x: fp32, bf16 or fp16, any shape, contiguous; element i stands at arena index ``offset + i``.
        seeds: K seeds of 64 bits: an int64 tensor of shape (K,), an integer or a sequence of integers.
        coeffs: K fp32 coefficients, as a tensor of shape (K,), a number or a sequence.
        offset: arena index of the first element, 0 <= offset, offset + x.numel() <= 2^63.
        stream: stream id, see docs/noise-stream.md; one for all terms or one per seed.
        noise: ``"gaussian"`` or ``"rademacher"``.
        scale: T(z) = scale[t] z, with fp32 factors for the 1024-tiles of the arena that x touches: t counts from
            the tile of ``offset``.
        mask: elements whose bit is 0 are copied, whatever the terms: uint8 of ceil(numel / 8), element i at bit i & 7
            of byte i >> 3, as :func:`mask_below` makes it.
        diag: T(z) = z / sqrt(diag), fp32 of ``x``'s shape, with correctly rounded root and division. At most one of
            ``scale``, ``mask`` and ``diag``; without them T(z) = z.
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
    check_data("x", x)
    device = x.device
    seeds, streams, coeffs = term_tensors(seeds, stream, coeffs, device)
    if len(states) > 2:
        raise ValueError(f"at most 2 states can be added in one pass, got {len(states)}")
    state_coeffs = coefficient_tensor("state_coeffs", state_coeffs, len(states), "one per state", device)
    for j, state in enumerate(states):
        check_like(f"states[{j}]", state, x, torch.float32)
    if states:
        coeffs = torch.cat((coeffs, state_coeffs))
    sr = rounding_seed(rounding, sr_seed, device)
    keep = keep_factor(decay, device)
    kind = check_position(offset, x.numel(), noise)
    transform, operand = _transform(x, offset, scale, mask, diag)
    flat_states = [state.view(-1) for state in states]
    arguments = (seeds, streams, coeffs, flat_states, keep, sr, offset, kind, transform, operand)

    if out is None or out is x:
        bump(x)
        torch.ops.zoengine.add_noise_(x.view(-1), *arguments)
        return x
    check_like("out", out, x, x.dtype)
    check_no_overlap(out, x)
    bump(out)
    torch.ops.zoengine.add_noise_out(x.view(-1), *arguments, out=out.view(-1))
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
    check_data("out", out)
    seed = one_seed("seed", seed, out.device)
    kind = check_position(offset, out.numel(), noise)
    bump(out)
    torch.ops.zoengine.noise_fill_(out.view(-1), seed, offset, check_stream(stream), kind)
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


def state_fold_(
    state: Tensor,
    seeds: Seeds,
    coeffs: Coefficients,
    *,
    keep: float | Tensor = 1.0,
    offset: int = 0,
    stream: Streams = table.STREAM_DIRECTION,
    noise: str = "gaussian",
    x: Tensor | None = None,
    x_keep: float | Tensor = 1.0,
    x_coeffs: Coefficients | None = None,
    rounding: str = "nearest",
    sr_seed: int | Tensor = 0,
    valid: Tensor | None = None,
) -> Tensor | None:
    """``state = keep state + sum_k coeffs[k] z_k``, and in the same pass an update of the weights ``x``.

    ``x = x_keep x + sum_k x_coeffs[k] z_k + x_coeffs[K] old + x_coeffs[K + 1] new``, where old and new are the state
    before and after: a momentum step reads and writes weights and momentum once and draws each normal once. Sums are
    taken in fp32 in this order, one fused multiply-add per term; the result is that of :func:`add_noise_` for the state
    and then, or before, for x, but for the sign of zeros where a coefficient is 0.

    Args:
        state: flat fp32; element i stands at arena index ``offset + i``.
        seeds, coeffs, offset, stream, noise, rounding, sr_seed: as in :func:`add_noise_`.
        keep, x_keep: fp32 factors; the number 1 multiplies nothing.
        x: weights of ``state``'s shape, fp32, bf16 or fp16.
        x_coeffs: K + 2 fp32 numbers, given exactly if ``x`` is.
        valid: int32 of ceil(numel / 1024): how many elements of each 1024-tile count for the norm (padding does not).
            ``offset`` must be a multiple of 1024 then.

    Returns:
        With ``valid``, the sum of squares of the new state, float64 of shape (1,), in the fixed order of
        docs/noise-stream.md; else None.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, layout, device or range is not as above.
    """
    check_flat("state", state)
    check_like("state", state, state, torch.float32)
    device = state.device
    seeds, streams, coeffs = term_tensors(seeds, stream, coeffs, device)
    kind = check_position(offset, state.numel(), noise)
    if (x is None) != (x_coeffs is None):
        raise ValueError("x and x_coeffs go together: give both or neither")
    if x is not None:
        check_like("x", x, state, None)
        x_coeffs = coefficient_tensor("x_coeffs", x_coeffs, seeds.numel() + 2, "one per seed, old and new", device)
        bump(x)
    if valid is not None:
        _check_tiles("valid", valid, state.numel(), torch.int32, device)
        if offset % _TILE:
            raise ValueError(f"with valid, offset must be a multiple of {_TILE}, got {offset}")
    bump(state)
    squares = torch.ops.zoengine.state_fold_(
        state, x, seeds, streams, coeffs, keep_tensor("keep", keep, device), x_coeffs,
        keep_tensor("x_keep", x_keep, device), rounding_seed(rounding, sr_seed, device), valid, offset, kind,
    )  # fmt: skip
    return None if valid is None else squares


def rule_step_(
    x: Tensor,
    rule: str,
    states: Sequence[Tensor],
    seeds: Seeds,
    coeffs: Coefficients,
    scalars: Mapping[str, float],
    *,
    keep: float | Tensor = 1.0,
    offset: int = 0,
    stream: Streams = table.STREAM_DIRECTION,
    noise: str = "gaussian",
    rounding: str = "nearest",
    sr_seed: int | Tensor = 0,
) -> Tensor:
    """One elementwise update that is not linear in the noise; weights and states are read and written once.

    With g = sum_k coeffs[k] z_k, all in fp32 and each state updated in place:

    * ``sign``: x = keep x + step sign(g), sign(0) = 0.
    * ``adam`` (states m, v): m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2;
      x = keep x + step m / (root_correction sqrt(v) + eps). step = -lr / (1 - beta1^t) and root_correction =
      (1 - beta2^t)^(-1/2) are the bias corrections of Kingma and Ba 2015, section 2.
    * ``amsgrad`` (states m, v, largest v): the same with the largest v so far (Reddi et al. 2018; ZO-AdaMM, Chen et al.
      2019).
    * ``adamu`` (state h; K = 2): m = g + state h; p = first z_0; q = second z_1 + h; v = beta2 p^2 + (1 - beta2) q^2;
      x = keep x + step m / sqrt(v + eps); h = sign m (ZO-AdaMU, Jiang et al. 2024).
    * ``hizoo`` (state h; 2K coefficients): h' = max(keep h + h sum_k coeffs[K + k] (z_k^2 - centre), floor);
      x = keep x + sum_k coeffs[k] z_k / sqrt(h), or sqrt(h') if hessian_first is 1 (HiZOO, Zhao et al. 2025).
    * ``adam_replay`` (2K coefficients): m = g; v = sum_k coeffs[K + k] z_k^2; x as adam. Moments from the log of the
      steps instead of states.

    The order of the operations is that of ``zoengine/ops/reference``, which every backend follows bit for bit.

    Args:
        x: flat fp32, bf16 or fp16.
        rule: one of the names above.
        states: fp32 tensors of ``x``'s shape.
        scalars: the numbers of the rule by name, see :data:`zoengine.ops.schema.RULES`.
        keep: factor on x, 1 - lr weight_decay.
        The others are as in :func:`add_noise_`.

    Raises:
        ValueError, TypeError: an unknown rule, a wrong number of states, or an argument that is not as above.
    """
    check_flat("x", x)
    device = x.device
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    number, state_count, names = RULES[rule]
    if len(states) != state_count:
        raise ValueError(f"rule {rule!r} has {state_count} states, got {len(states)}")
    for j, state in enumerate(states):
        check_like(f"states[{j}]", state, x, torch.float32)
    if set(scalars) != set(names):
        raise ValueError(f"rule {rule!r} takes the scalars {', '.join(names)}; got {', '.join(scalars)}")
    values = torch.tensor([float(scalars[name]) for name in names], dtype=torch.float64).float()
    # term_tensors wants as many coefficients as seeds; two rules have a second set.
    seeds, streams, _ = term_tensors(seeds, stream, torch.zeros(_count(seeds)), device)
    sets = 2 if rule in ("hizoo", "adam_replay") else 1
    coeffs = coefficient_tensor("coeffs", coeffs, sets * seeds.numel(), f"{sets} per seed", device)
    if seeds.numel() < 1 or (rule == "adamu" and seeds.numel() != 2):
        raise ValueError(f"rule {rule!r} needs {'2 seeds' if rule == 'adamu' else 'a seed'}, got {seeds.numel()}")
    kind = check_position(offset, x.numel(), noise)
    bump(x)
    for state in states:
        bump(state)
    torch.ops.zoengine.rule_step_(
        x, list(states), seeds, streams, coeffs, to_device("scalars", values, device),
        keep_tensor("keep", keep, device), rounding_seed(rounding, sr_seed, device), offset, kind, number,
    )  # fmt: skip
    return x


def mask_below(x: Tensor, thresholds: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The bits of |x| <= threshold, as ``mask`` of :func:`add_noise_` takes them.

    Args:
        x: flat fp32, bf16 or fp16 that starts at a 1024-tile of the arena.
        thresholds: fp32, one per 1024-tile; infinity lets everything but NaN pass.
        out: uint8 of ceil(numel / 8) to write to.

    Raises:
        ValueError, TypeError: as :func:`add_noise_`.
    """
    check_flat("x", x)
    _check_tiles("thresholds", thresholds, x.numel(), torch.float32, x.device)
    if out is None:
        out = torch.empty(-(-x.numel() // 8), dtype=torch.uint8, device=x.device)
    _check_mask("out", out, x)
    bump(out)
    torch.ops.zoengine.mask_below_(out, x, thresholds)
    return out


def _transform(
    x: Tensor, offset: int, scale: Tensor | None, mask: Tensor | None, diag: Tensor | None
) -> tuple[int, Tensor | None]:
    given = [name for name, operand in (("scale", scale), ("mask", mask), ("diag", diag)) if operand is not None]
    if len(given) > 1:
        raise ValueError(f"at most one of scale, mask and diag can be given, got {' and '.join(given)}")
    if scale is not None:
        _check_tiles("scale", scale, x.numel() + offset % _TILE, torch.float32, x.device)
        return TRANSFORMS["scale"], scale
    if mask is not None:
        _check_mask("mask", mask, x)
        return TRANSFORMS["mask"], mask
    if diag is not None:
        check_like("diag", diag, x, torch.float32)
        return TRANSFORMS["diag"], diag.view(-1)
    return TRANSFORMS["none"], None


def _check_tiles(name: str, tensor: Tensor, count: int, dtype: torch.dtype, device: torch.device) -> None:
    tiles = -(-count // _TILE)
    if tensor.shape != (tiles,) or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {dtype} of shape ({tiles},) on {device}, one per {_TILE}-tile; got "
            f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        )


def _check_mask(name: str, mask: Tensor, x: Tensor) -> None:
    size = -(-x.numel() // 8)
    if mask.dtype != torch.uint8 or mask.shape != (size,) or mask.device != x.device or not mask.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous uint8 of shape ({size},) on {x.device}, one bit per element; got "
            f"{mask.dtype} of shape {tuple(mask.shape)} on {mask.device}"
        )


def _count(seeds: Seeds) -> int:
    return seeds.numel() if isinstance(seeds, Tensor) else 1 if isinstance(seeds, int) else len(seeds)
