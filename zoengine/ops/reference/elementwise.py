"""The elementwise ops: noise added, folded into a state, or put through an update rule."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from zoengine.noise import reference as stream_reference
from zoengine.noise import table
from zoengine.noise.reference import fma
from zoengine.ops.reference.segments import lane_sum
from zoengine.ops.schema import RULES, TRANSFORMS

_CHUNK = 1 << 20  # elements whose temporaries are alive at once
_TILE = 1024


def add_noise_(x, seeds, streams, coeffs, states, keep, sr_seed, offset, noise, transform, operand) -> None:
    add_noise_out(x, seeds, streams, coeffs, states, keep, sr_seed, offset, noise, transform, operand, out=x)


def add_noise_out(x, seeds, streams, coeffs, states, keep, sr_seed, offset, noise, transform, operand, *, out) -> None:
    count = seeds.numel()
    for piece in _pieces(x.numel()):
        acc = _kept(x[piece].float(), keep)
        for k in range(count):
            z = _noise(seeds[k], streams[k], offset, piece, noise)
            acc = fma(coeffs[k], _transformed(z, transform, operand, offset, piece), acc)
        for j, state in enumerate(states):
            acc = fma(coeffs[count + j], state[piece], acc)
        result = rounded(acc, out.dtype, sr_seed, offset + piece.start)
        if transform == TRANSFORMS["mask"]:
            result = torch.where(_bits(operand, piece), result, x[piece])
        out[piece] = result


def state_fold_(state, x, seeds, streams, coeffs, keep, x_coeffs, x_keep, sr_seed, valid, offset, noise) -> Tensor:
    count = seeds.numel()
    for piece in _pieces(state.numel()):
        z = [_noise(seeds[k], streams[k], offset, piece, noise) for k in range(count)]
        old = state[piece].clone()
        new = _kept(old, keep)
        for k in range(count):
            new = fma(coeffs[k], z[k], new)
        state[piece] = new
        if x is not None:
            acc = _kept(x[piece].float(), x_keep)
            for coefficient, term in zip(x_coeffs, [*z, old, new], strict=True):
                acc = fma(coefficient, term, acc)
            x[piece] = rounded(acc, x.dtype, sr_seed, offset + piece.start)
    if valid is None:
        return state.new_empty((0,), dtype=torch.float64)
    tiles = torch.nn.functional.pad(state.double(), (0, -state.numel() % _TILE)).view(-1, _TILE)
    inside = torch.arange(_TILE, device=state.device) < valid.unsqueeze(1)
    return lane_sum(lane_sum(torch.where(inside, tiles * tiles, 0.0)).unsqueeze(0))


def rule_step_(x, states, seeds, streams, coeffs, scalars, keep, sr_seed, offset, noise, rule) -> None:
    step = _RULES[rule]
    for piece in _pieces(x.numel()):
        z = [_noise(seed, stream, offset, piece, noise) for seed, stream in zip(seeds, streams, strict=True)]
        acc = _kept(x[piece].float(), keep)
        acc, *new = step(acc, [state[piece].clone() for state in states], z, coeffs, scalars)
        x[piece] = rounded(acc, x.dtype, sr_seed, offset + piece.start)
        for state, values in zip(states, new, strict=True):
            state[piece] = values


def _sign(acc, states, z, coeffs, s):
    g = _combined(coeffs, z)
    return (fma(s[0], (g > 0).float() - (g < 0).float(), acc),)


def _adam(acc, states, z, coeffs, s):
    m, v = _moments(states, _combined(coeffs, z), s)
    return fma(s[6], m / fma(_sqrt(v), s[4], s[5]), acc), m, v


def _amsgrad(acc, states, z, coeffs, s):
    m, v = _moments(states, _combined(coeffs, z), s)
    largest = torch.maximum(states[2], v)
    return fma(s[6], m / fma(_sqrt(largest), s[4], s[5]), acc), m, v, largest


def _moments(states, g, s):
    """Exponential averages of g and g^2; s = beta1, 1 - beta1, beta2, 1 - beta2."""
    return fma(s[1], g, s[0] * states[0]), fma(s[3] * g, g, s[2] * states[1])


def _adamu(acc, states, z, coeffs, s):
    h = states[0]
    m = fma(s[0], h, _combined(coeffs, z))
    first, second = s[1] * z[0], fma(s[2], z[1], h)
    v = fma(s[3] * first, first, s[4] * second * second)
    return fma(s[6], m / _sqrt(v + s[5]), acc), s[7] * m


def _hizoo(acc, states, z, coeffs, s):
    h, count = states[0], len(z)
    change = torch.zeros_like(h)
    for k in range(count):
        change = fma(coeffs[count + k], fma(z[k], z[k], -s[1]), change)
    new = torch.maximum(fma(change, h, s[0] * h), s[2])
    root = _sqrt(new if s[3] else h)
    for k in range(count):
        acc = fma(coeffs[k], z[k] / root, acc)
    return acc, new


def _adam_replay(acc, states, z, coeffs, s):
    count = len(z)
    m, v = _combined(coeffs[:count], z), torch.zeros_like(acc)
    for k in range(count):
        v = fma(coeffs[count + k] * z[k], z[k], v)
    return (fma(s[2], m / fma(_sqrt(v), s[0], s[1]), acc),)


_RULES = {
    RULES[name][0]: function
    for name, function in {
        "sign": _sign, "adam": _adam, "amsgrad": _amsgrad, "adamu": _adamu, "hizoo": _hizoo,
        "adam_replay": _adam_replay,
    }.items()
}  # fmt: skip


def mask_below_(bits, x, thresholds) -> None:
    tile = torch.arange(x.numel(), device=x.device) // _TILE
    inside = torch.nn.functional.pad((x.float().abs() <= thresholds[tile]).to(torch.uint8), (0, -x.numel() % 8))
    bits.copy_((inside.view(-1, 8) << torch.arange(8, device=x.device, dtype=torch.uint8)).sum(1, dtype=torch.uint8))


def rounded(acc: Tensor, dtype: torch.dtype, sr_seed: Tensor | None, index: int) -> Tensor:
    """fp32 ``acc``, whose element 0 stands at ``index``, as ``dtype``: to nearest, or stochastically with a seed."""
    if sr_seed is None or dtype == torch.float32:
        return acc.to(dtype)
    bits = stream_reference.fill(sr_seed.reshape(()), index, acc.numel(), table.STREAM_ROUNDING, "rounding")
    return round_stochastic(acc, bits, dtype)


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


def _pieces(count: int) -> Iterator[slice]:
    for start in range(0, count, _CHUNK):
        yield slice(start, min(start + _CHUNK, count))


def _kept(values: Tensor, keep: Tensor | None) -> Tensor:
    return values if keep is None else values * keep


def _noise(seed: Tensor, stream: Tensor, offset: int, piece: slice, noise: int) -> Tensor:
    return stream_reference.fill(seed, offset + piece.start, piece.stop - piece.start, int(stream), noise)


def _transformed(z: Tensor, transform: int, operand: Tensor | None, offset: int, piece: slice) -> Tensor:
    if transform == TRANSFORMS["scale"]:
        index = torch.arange(offset + piece.start, offset + piece.stop, device=z.device)
        return operand[index // _TILE - offset // _TILE] * z
    if transform == TRANSFORMS["diag"]:
        return z / _sqrt(operand[piece])
    return z


def _bits(operand: Tensor, piece: slice) -> Tensor:
    index = torch.arange(piece.start, piece.stop, device=operand.device)
    return operand[index >> 3].long() >> (index & 7) & 1 == 1


def _combined(coeffs: Tensor, z: list[Tensor]) -> Tensor:
    """sum_k coeffs[k] z_k, one fused multiply-add per term from 0."""
    total = torch.zeros_like(z[0])
    for coefficient, term in zip(coeffs, z, strict=False):  # further coefficients are the rule's own
        total = fma(coefficient, term, total)
    return total


def _sqrt(x: Tensor) -> Tensor:
    return x.double().sqrt().float()  # torch's fp32 sqrt on CPU is not correctly rounded
