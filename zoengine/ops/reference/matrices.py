"""Ops on the matrices of an arena: LOREN's row-wise Kronecker covariance and low-rank additions.

``segments`` is the table of ``zoengine/ops/schema.py``. Elements of x outside the
matrices are neither read nor written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoengine.noise import reference as stream_reference
from zoengine.noise import table
from zoengine.noise.reference import fma
from zoengine.ops.reference.elementwise import rounded
from zoengine.ops.schema import ROW_BLOCK


def kron_rows_(x, a, kappa, segments, seeds, coeffs, keep, sr_seed, score, offset, noise, blocks, widest) -> None:
    kron_rows_out(x, a, kappa, segments, seeds, coeffs, keep, sr_seed, score, offset, noise, blocks, widest, out=x)


def kron_rows_out(
    x, a, kappa, segments, seeds, coeffs, keep, sr_seed, score, offset, noise, blocks, widest, *, out
) -> None:
    if score is not None:
        score.copy_(kron_score(a, segments, seeds, coeffs, offset, noise, blocks, widest))
    for s, (start, rows, columns, _, a_start) in enumerate(segments.tolist()):
        direction = a[a_start : a_start + columns]
        where = slice(start, start + rows * columns)
        acc = x[where].float() if keep is None else x[where].float() * keep
        acc = acc.view(rows, columns)
        for k in range(seeds.numel()):
            u = _noise(seeds[k], offset + start, rows, columns, noise)
            projection = (-(kappa[s] * row_dots(u, direction, offset + start))).unsqueeze(1)
            acc = fma(coeffs[k], fma(projection, direction, u), acc)
        out[where] = rounded(acc.reshape(-1), out.dtype, sr_seed, offset + start)


def kron_score(a, segments, seeds, coeffs, offset, noise, blocks, widest) -> Tensor:
    score = torch.empty_like(a)
    weight = torch.zeros((), dtype=torch.float64, device=a.device)
    for coefficient in coeffs:
        weight = weight + coefficient.double()
    for start, rows, columns, _, a_start in segments.tolist():
        direction = a[a_start : a_start + columns]
        u = [_noise(seed, offset + start, rows, columns, noise) for seed in seeds]
        weights = [c * row_dots(z, direction, offset + start) for c, z in zip(coeffs, u, strict=True)]
        total = torch.zeros(columns, dtype=torch.float64, device=a.device)
        for first in range(0, rows, ROW_BLOCK):
            part = torch.zeros(columns, device=a.device)
            for row in range(first, min(first + ROW_BLOCK, rows)):
                for w, z in zip(weights, u, strict=True):
                    part = fma(w[row], z[row], part)
            total = total + part.double()
        score[a_start : a_start + columns] = (total - weight * rows * direction.double()).float()
    return score


def row_dots(u: Tensor, a: Tensor, index: int) -> Tensor:
    """a . u_i for every row of ``u`` (rows, columns), whose first element stands at arena index ``index``; fp32.

    The order is that of the noise lanes, so that whoever generates a lane can sum it: lane l adds, by fused
    multiply-adds, the elements of the row whose arena index is l modulo 256, in ascending order; then lanes l and l + h
    are added for h = 128, 64, ..., 1.
    """
    rows, columns = u.shape
    first = index + torch.arange(rows, device=u.device) * columns
    slots = (first % table.LANES).unsqueeze(1) + torch.arange(columns, device=u.device)
    width = -(-(int(slots.max()) + 1) // table.LANES) * table.LANES
    spread = torch.zeros((2, rows, width), device=u.device)
    spread[0].scatter_(1, slots, u)
    spread[1].scatter_(1, slots, a.expand_as(u))
    lanes = torch.zeros((rows, table.LANES), device=u.device)
    for z, factor in zip(spread[0].split(table.LANES, 1), spread[1].split(table.LANES, 1), strict=True):
        lanes = fma(factor, z, lanes)
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes.squeeze(1)


def lowrank_add_(x, left, right, segments, coeff, keep, sr_seed, offset, rank, blocks, widest) -> None:
    lowrank_add_out(x, left, right, segments, coeff, keep, sr_seed, offset, rank, blocks, widest, out=x)


def lowrank_add_out(x, left, right, segments, coeff, keep, sr_seed, offset, rank, blocks, widest, *, out) -> None:
    for start, rows, columns, _, left_start, right_start in segments.tolist():
        where = slice(start, start + rows * columns)
        acc = x[where].float() if keep is None else x[where].float() * keep
        lefts = left[left_start:][: rows * rank].view(rows, rank)
        rights = right[right_start:][: columns * rank].view(columns, rank)
        product = torch.zeros((rows, columns), device=x.device)
        for k in range(rank):
            product = fma(lefts[:, k, None], rights[None, :, k], product)
        out[where] = rounded(fma(coeff, product.view(-1), acc), out.dtype, sr_seed, offset + start)


def _noise(seed: Tensor, index: int, rows: int, columns: int, noise: int) -> Tensor:
    return stream_reference.fill(seed, index, rows * columns, table.STREAM_DIRECTION, noise).view(rows, columns)
