"""The table of matrices that the matrix ops take, see ``zoengine.ops.schema``."""

import triton
import triton.language as tl

from zoengine.ops.schema import ROW_BLOCK

BLOCK = tl.constexpr(ROW_BLOCK)


@triton.jit
def find_block(table_ptr, matrices, block, WIDTH: tl.constexpr):
    """Which matrix the row block ``block`` (int64) belongs to, where it stands and what the block covers.

    Returns:
        number of the matrix; pointer to its row of the table; first row of the block; rows in the block; columns.
    """
    low = block * 0
    high = low + matrices - 1
    while low < high:  # the last matrix with no more blocks before it
        middle = (low + high + 1) // 2
        there = tl.load(table_ptr + middle * WIDTH + 3) <= block
        low = tl.where(there, middle, low)
        high = tl.where(there, high, middle - 1)
    entry = table_ptr + low * WIDTH
    first = (block - tl.load(entry + 3)) * BLOCK
    rows = tl.minimum(tl.load(entry + 1) - first, BLOCK).to(tl.int32)
    return low, entry, first, rows, tl.load(entry + 2).to(tl.int32)
