"""``out = keep x + coeff left right'`` for matrices: 64 rows and 64 columns a program, the rank in order."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from zoengine.kernels import launch
from zoengine.kernels.matrices import BLOCK, find_block
from zoengine.kernels.noise import anchor, fma, rounding_at
from zoengine.kernels.rounding import round_nearest, round_stochastic, widen

_PIECES = tl.constexpr(4)  # that share the search for their matrix
_COLUMNS = tl.constexpr(64)  # fewer than threads, or Triton passes the factors' columns through shared memory


@triton.jit
def _piece(
    x_ptr, target, left_ptr, right_ptr, coeff_ptr, keep_ptr, sr_seed_ptr,
    start, offset, first_row, rows, column, columns, rank, EVEN: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Rows ``first_row ...`` and columns ``column ...`` of a matrix that starts at element ``start``.

    ``EVEN`` says that ``start`` and ``columns`` are multiples of 16; the products tell the compiler.
    """
    if EVEN:
        start, columns = start // 16 * 16, columns // 16 * 16
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    i, j = tl.arange(0, BLOCK)[:, None], column + tl.arange(0, _COLUMNS)[None, :]
    there = (i < rows) & (j < columns)
    corner = start + first_row * columns
    at = i * columns + j
    x = widen(tl.load(x_ptr + corner + at, mask=there), PTX)
    acc = x if keep_ptr is None else x * tl.load(keep_ptr)
    lefts = left_ptr + (first_row + i) * rank
    rights = right_ptr + j.to(tl.int64) * rank
    product = anchor(x, PTX).to(tl.float32, bitcast=True)  # a zero in the layout of x
    for k in tl.range(0, rank, loop_unroll_factor=4):
        u = tl.load(lefts + k, mask=i < rows)
        v = tl.load(rights + k, mask=j < columns)
        product = fma(u.broadcast_to(x.shape), v.broadcast_to(x.shape), product)
    acc = fma(tl.load(coeff_ptr).broadcast_to(x.shape), product, acc)
    if sr_seed_ptr is not None:
        value = round_stochastic(acc, rounding_at(tl.load(sr_seed_ptr), offset + corner, at, PTX), dtype, PTX)
    else:
        value = round_nearest(acc, dtype)
    tl.store(target + corner + at, value, mask=there)


@triton.jit(do_not_specialize=["offset", "matrices", "rank"])
def lowrank_add_kernel(
    x_ptr,
    out_ptr,
    left_ptr,
    right_ptr,
    table_ptr,
    coeff_ptr,
    keep_ptr,
    sr_seed_ptr,
    offset: tl.int64,
    matrices: tl.int32,
    rank: tl.int32,
    PTX: tl.constexpr,
):
    """Four pieces of a row block a program; where the matrix is narrower than the widest there is nothing to do."""
    _, entry, first_row, rows, columns = find_block(table_ptr, matrices, tl.program_id(0).to(tl.int64), 6)
    start = tl.load(entry)
    left_ptr += tl.load(entry + 4)
    right_ptr += tl.load(entry + 5)
    target = x_ptr if out_ptr is None else out_ptr
    begin = tl.program_id(1) * (_PIECES * _COLUMNS)
    for column in range(begin, tl.minimum(begin + _PIECES * _COLUMNS, columns), _COLUMNS):
        if (start | columns) % 16 == 0:
            _piece(
                x_ptr, target, left_ptr, right_ptr, coeff_ptr, keep_ptr, sr_seed_ptr,
                start, offset, first_row, rows, column, columns, rank, True, PTX,
            )  # fmt: skip
        else:
            _piece(
                x_ptr, target, left_ptr, right_ptr, coeff_ptr, keep_ptr, sr_seed_ptr,
                start, offset, first_row, rows, column, columns, rank, False, PTX,
            )  # fmt: skip


def lowrank_config(stochastic: bool) -> tuple[int | None, int]:
    """Cap on registers, and warps: 16 elements a thread, two programs at once on a multiprocessor unless they spill."""
    return None if stochastic else 128, 8


def lowrank_add_(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    segments: Tensor,
    coeff: Tensor,
    keep: Tensor | None,
    sr_seed: Tensor | None,
    offset: int,
    rank: int,
    blocks: int,
    widest: int,
    *,
    out: Tensor | None = None,
) -> None:
    """As ``zoengine.ops.schema`` says of ``lowrank_add_`` and, with ``out``, of ``lowrank_add_out``."""
    if out is not None and out.data_ptr() == x.data_ptr():
        out = None
    if x.dtype == torch.float32:
        sr_seed = None
    registers, warps = lowrank_config(sr_seed is not None)
    ptx, grid = launch.uses_ptx(x), (blocks, -(-widest // (_PIECES.value * _COLUMNS.value)))
    arguments = (x, out, left, right, segments, coeff, keep, sr_seed, offset, segments.shape[0], rank)
    with launch.on_device(x):
        lowrank_add_kernel[grid](*arguments, PTX=ptx, **launch.compile_options(ptx, registers, warps))


lowrank_add_out = lowrank_add_
