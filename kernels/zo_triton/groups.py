"""What elementwise noise kernels share: where a group stands, its rows in memory, its noise four or eight rows a time.

A group is described in ``noise.py``; ``launch.parts`` says which groups a launch covers.
"""

import triton
import triton.language as tl
from zoengine.kernels.noise import GAUSSIAN, LANES, fma, normals, rounding_words, signs, word
from zoengine.kernels.rounding import round_nearest, round_stochastic, widen

TILE = tl.constexpr(1024)


@triton.jit
def place(first, step, n, offset, EDGE: tl.constexpr, SPAN: tl.constexpr):
    """The group of this program, its first element relative to the pointers, and the elements ``[low, high)`` in it.

    EDGE false: groups ``first, first + 1, ...``; the pointers stand at the first of them. EDGE true: groups ``first``,
    ``first + step``, of which only indices ``offset .. offset + n`` exist; the pointers stand at index ``offset``.
    """
    program = tl.program_id(0).to(tl.int64)
    if EDGE:
        group = first.to(tl.int64) + program * step
        begin = group * SPAN - offset
        low = tl.maximum(-begin, 0).to(tl.int32)
        high = tl.minimum(n - begin, SPAN).to(tl.int32)
    else:
        group = first.to(tl.int64) + program
        begin = program * SPAN
        low, high = 0, SPAN
    return group, begin, low, high


@triton.jit
def load_row(ptr, at, low, high, EDGE: tl.constexpr):
    return tl.load(ptr + at, mask=(at >= low) & (at < high) if EDGE else None)


@triton.jit
def load_rows(
    ptr, index, low, high, ROW: tl.constexpr, PASS: tl.constexpr, EDGE: tl.constexpr, PTX: tl.constexpr
):  # fmt: skip
    """The fp32 values of the ``PASS`` rows from ``ROW`` on."""
    rows = ()
    for row in tl.static_range(PASS):
        rows += (widen(load_row(ptr, index + (ROW + row) * LANES, low, high, EDGE), PTX),)
    return rows


@triton.jit
def scaled(rows, factor_ptr, PASS: tl.constexpr):
    """The rows times the number at ``factor_ptr``, if there is one."""
    if factor_ptr is not None:
        result = ()
        for row in tl.static_range(PASS):
            result += (rows[row] * tl.load(factor_ptr),)
        return result
    else:
        return rows


@triton.jit
def store_row(ptr, at, value, low, high, EDGE: tl.constexpr):
    tl.store(ptr + at, value, mask=(at >= low) & (at < high) if EDGE else None)


@triton.jit
def noise_rows(
    seed, stream, group, zero, ROW: tl.constexpr, PASS: tl.constexpr,
    NOISE: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Noise of the ``PASS`` rows from ``ROW`` on: four with normals, which one Philox call serves."""
    if NOISE == GAUSSIAN:
        tl.static_assert(PASS == 4)
        return normals(seed, group, stream.to(tl.uint32), zero, ROW // 4, TILES, ROWS, PTX)
    else:
        bits = signs(seed, group, stream.to(tl.uint32), zero, TILES, ROWS, PTX)
        z = ()
        for row in tl.static_range(PASS):
            z += ((bits[ROW + row] | word(0x3F800000)).to(tl.float32, bitcast=True),)
        return z


@triton.jit
def add_noise_rows(
    acc, coeff, seed, stream, group, zero, ROW: tl.constexpr, PASS: tl.constexpr,
    NOISE: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """``fma(coeff, z, acc)`` for the rows of :func:`noise_rows`."""
    if NOISE == GAUSSIAN:
        return add_rows(coeff, noise_rows(seed, stream, group, zero, ROW, PASS, NOISE, TILES, ROWS, PTX), acc, PASS)
    else:
        bits = signs(seed, group, stream.to(tl.uint32), zero, TILES, ROWS, PTX)
        result = ()
        for row in tl.static_range(PASS):  # coeff times a sign is exact, so this is the fma
            term = (coeff.to(tl.uint32, bitcast=True) ^ bits[ROW + row]).to(tl.float32, bitcast=True)
            result += (acc[row] + term,)
        return result


@triton.jit
def add_rows(coeff, terms, acc, COUNT: tl.constexpr):
    """``fma(coeff, terms, acc)`` for tuples of ``COUNT`` rows."""
    result = ()
    for row in tl.static_range(COUNT):
        result += (fma(coeff.broadcast_to(terms[row].shape), terms[row], acc[row]),)
    return result


@triton.jit
def rounding_bits(sr_seed_ptr, group, zero, TILES: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr):
    """The words that :func:`rounded_row` takes its bits from; without a seed there are none."""
    if sr_seed_ptr is not None:
        return rounding_words(tl.load(sr_seed_ptr), group, zero, TILES, ROWS, PTX)
    else:
        return ()


@triton.jit
def rounded_row(acc, random, ROW: tl.constexpr, STOCHASTIC: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr):
    """Row ``ROW`` of a group, fp32, as ``dtype``."""
    if STOCHASTIC:
        half = random[ROW // 2] >> (ROW % 2 * 16)
        return round_stochastic(acc, half & word(0xFFFF), dtype, PTX)
    else:
        return round_nearest(acc, dtype)
