"""Ops on all matrices of a flat tensor in one launch: row-wise Kronecker covariance (LOREN), low-rank additions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoengine.ops.checks import (
    Coefficients,
    Seeds,
    bump,
    check_flat,
    check_like,
    check_no_overlap,
    check_position,
    coefficient_tensor,
    keep_tensor,
    rounding_seed,
    seed_tensor,
)
from zoengine.ops.schema import ROW_BLOCK


@dataclass(frozen=True)
class Matrices:
    """Where matrices stand in a flat tensor, and their parts in packed operands; built once, used by every launch.

    Attributes:
        table: int64 on the device, see ``zoengine/ops/schema.py``.
        blocks: row blocks of all matrices.
        widest: most columns of any.
        sizes: elements of each packed operand.
    """

    table: Tensor
    blocks: int
    widest: int
    sizes: tuple[int, ...]

    @classmethod
    def for_kron(
        cls, starts: Sequence[int], shapes: Sequence[tuple[int, int]], device: torch.device | str = "cpu"
    ) -> Matrices:
        """For :func:`kron_rows_`: the vectors a, one element per column, are packed in the order given."""
        return cls._build(starts, shapes, [[columns for _, columns in shapes]], device)

    @classmethod
    def for_lowrank(
        cls, starts: Sequence[int], shapes: Sequence[tuple[int, int]], rank: int, device: torch.device | str = "cpu"
    ) -> Matrices:
        """For :func:`lowrank_add_`: left factors (rows, rank) and right ones (columns, rank) are packed in order."""
        return cls._build(starts, shapes, [[n * rank for n in sizes] for sizes in zip(*shapes, strict=True)], device)

    @classmethod
    def _build(
        cls,
        starts: Sequence[int],
        shapes: Sequence[tuple[int, int]],
        parts: Sequence[Sequence[int]],
        device: torch.device | str,
    ) -> Matrices:
        if len(starts) != len(shapes) or not starts:
            raise ValueError(
                f"there must be as many starts as shapes, and one at least; got {len(starts)}, {len(shapes)}"
            )
        blocks = [-(-rows // ROW_BLOCK) for rows, _ in shapes]
        firsts = [_exclusive(sizes) for sizes in (blocks, *parts)]
        rows, columns = zip(*shapes, strict=True)
        table = torch.tensor([starts, rows, columns, *firsts], dtype=torch.int64).t().contiguous()
        return cls(table.to(device), sum(blocks), max(columns), tuple(sum(sizes) for sizes in parts))


def kron_rows_(
    x: Tensor,
    a: Tensor,
    kappa: Tensor,
    matrices: Matrices,
    seeds: Seeds,
    coeffs: Coefficients,
    *,
    keep: float | Tensor = 1.0,
    offset: int = 0,
    noise: str = "gaussian",
    out: Tensor | None = None,
    score: Tensor | None = None,
    rounding: str = "nearest",
    sr_seed: int | Tensor = 0,
) -> Tensor:
    """``out = keep x + sum_k coeffs[k] w_k`` for matrices, each row w = u - kappa (a . u) a of normals u.

    w = sqrt(rho) Sigma^(1/2) u for Sigma = (rho I + a a')^-1 and kappa = 1 / (t (t + sqrt(rho))), where
    t = sqrt(rho + |a|^2): LOREN, section 3, with the root that is positive definite. The noise is that of stream 0 at
    the elements' arena indices. Elements of x outside the matrices are not touched, in ``out`` neither.

    Args:
        x: flat fp32, bf16 or fp16.
        a: packed fp32, one vector of ``columns`` elements per matrix.
        kappa: fp32, one per matrix.
        matrices: from :meth:`Matrices.for_kron`.
        score: fp32 of ``a``'s shape to write :func:`kron_score` to, from the normals that are drawn anyway.
        The others are as in :func:`zoengine.ops.add_noise_`.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, layout, device or range is not as above.
    """
    check_flat("x", x)
    device = x.device
    _check_packed("a", a, matrices.sizes[0], device)
    _check_packed("kappa", kappa, len(matrices.table), device)
    if score is not None:
        _check_packed("score", score, matrices.sizes[0], device)
        bump(score)
    seeds, count = seed_tensor(seeds, device)
    arguments = (
        a, kappa, matrices.table, seeds, coefficient_tensor("coeffs", coeffs, count, "one per seed", device),
        keep_tensor("keep", keep, device), rounding_seed(rounding, sr_seed, device), score, offset,
        check_position(offset, x.numel(), noise), matrices.blocks, matrices.widest,
    )  # fmt: skip
    return _launch("kron_rows", x, out, arguments)


def kron_score(
    a: Tensor,
    matrices: Matrices,
    seeds: Seeds,
    coeffs: Coefficients,
    *,
    offset: int = 0,
    noise: str = "gaussian",
) -> Tensor:
    """``sum_k coeffs[k] (sum_i (a . u_ki) u_ki - rows a)`` per matrix, packed like ``a``, fp32.

    The part of the gradient of LOREN's log density by ``a`` that needs the normals. Rows are summed in blocks of 64 in
    fp32 and blocks in float64, in order, so the bits depend on nothing.

    Raises:
        ValueError, TypeError: as :func:`kron_rows_`.
    """
    check_flat("a", a)
    _check_packed("a", a, matrices.sizes[0], a.device)
    seeds, count = seed_tensor(seeds, a.device)
    coeffs = coefficient_tensor("coeffs", coeffs, count, "one per seed", a.device)
    kind = check_position(offset, 0, noise)
    return torch.ops.zoengine.kron_score(
        a, matrices.table, seeds, coeffs, offset, kind, matrices.blocks, matrices.widest
    )


def lowrank_add_(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    matrices: Matrices,
    coeff: float | Tensor,
    *,
    rank: int,
    keep: float | Tensor = 1.0,
    offset: int = 0,
    out: Tensor | None = None,
    rounding: str = "nearest",
    sr_seed: int | Tensor = 0,
) -> Tensor:
    """``out = keep x + coeff left right'`` for matrices, the product summed in fp32 over the rank, in order.

    Args:
        x: flat fp32, bf16 or fp16; elements outside the matrices are not touched, in ``out`` neither.
        left, right: packed fp32 factors, row-major (rows, rank) and (columns, rank) for each matrix; fill them from the
            noise stream with :func:`zoengine.ops.segment_noise_fill_`, which costs r (m + n) normals for m n elements.
        matrices: from :meth:`Matrices.for_lowrank` with the same rank.
        offset: arena index of ``x``'s first element, for the rounding bits.
        The others are as in :func:`zoengine.ops.add_noise_`.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, layout, device or range is not as above.
    """
    check_flat("x", x)
    for name, factor, size in (("left", left, matrices.sizes[0]), ("right", right, matrices.sizes[1])):
        _check_packed(name, factor, size, x.device)
    check_position(offset, x.numel(), "gaussian")
    arguments = (
        left, right, matrices.table, coefficient_tensor("coeff", coeff, 1, "one", x.device),
        keep_tensor("keep", keep, x.device), rounding_seed(rounding, sr_seed, x.device), offset, rank, matrices.blocks,
        matrices.widest,
    )  # fmt: skip
    return _launch("lowrank_add", x, out, arguments)


def _launch(name: str, x: Tensor, out: Tensor | None, arguments: tuple) -> Tensor:
    if out is None or out is x:
        bump(x)
        getattr(torch.ops.zoengine, f"{name}_")(x, *arguments)
        return x
    check_like("out", out, x, x.dtype)
    check_no_overlap(out, x)
    bump(out)
    getattr(torch.ops.zoengine, f"{name}_out")(x, *arguments, out=out)
    return out


def _check_packed(name: str, tensor: Tensor, size: int, device: torch.device) -> None:
    if tensor.dtype != torch.float32 or tensor.shape != (size,) or tensor.device != device:
        raise ValueError(
            f"{name} must be float32 of shape ({size},) on {device}, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)} on {tensor.device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


def _exclusive(sizes: Sequence[int]) -> list[int]:
    """Where each part starts when they stand one after another."""
    starts, total = [], 0
    for size in sizes:
        starts.append(total)
        total += size
    return starts
