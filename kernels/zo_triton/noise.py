"""Noise stream version 1 as Triton helpers: Philox, Box-Muller, signs and rounding bits.

Every floating-point step is an explicit fused multiply-add or a single IEEE operation, and kernels that use these
helpers are compiled with ``enable_fp_fusion=False``: the bits are those of ``zoengine.noise.reference``.

Kernels work on groups of ``TILES x ROWS x 256`` elements that start at multiples of their size in the arena. A group
is held as ``ROWS`` tensors of shape ``(TILES, 256)``; element ``(t, l)`` of row ``r`` is ``(t ROWS + r) 256 + l``.
So one Philox call fills the same place of several rows, and each row is contiguous memory.

``PTX`` is a constexpr: true where NVIDIA inline assembly may be used, false on other GPUs and in the interpreter.
"""

import triton
import triton.language as tl
from zoengine.kernels import noise_ptx

from zoengine.noise import table

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# The interpreter of Triton 3.6 multiplies, rounds and adds where it should fuse; later ones have this function.
_ROUNDS_TWICE = tl.constexpr(INTERPRETED.value and not hasattr(triton._C.libtriton.interpreter, "fma_fp32"))
LANES = tl.constexpr(table.LANES)
GAUSSIAN = tl.constexpr(table.GAUSSIAN)

_ROUNDING_PER_CALL = tl.constexpr(table.ROUNDING_PER_CALL)
_STREAM_ROUNDING = tl.constexpr(table.STREAM_ROUNDING)
_PHILOX_ROUNDS = tl.constexpr(table.PHILOX_ROUNDS)
_M0 = tl.constexpr(table.PHILOX_M0)
_M1 = tl.constexpr(table.PHILOX_M1)
_W0 = tl.constexpr(table.PHILOX_W0)
_W1 = tl.constexpr(table.PHILOX_W1)
_FIRST_ROUNDS = tl.constexpr(noise_ptx.FIRST_ROUNDS)
_LAST_ROUNDS = tl.constexpr(noise_ptx.LAST_ROUNDS)
_NORMALS = tl.constexpr(noise_ptx.NORMALS)
_WORDS = tl.constexpr(noise_ptx.WORDS)
_PIECE_CONSTRAINTS = tl.constexpr(noise_ptx.CONSTRAINTS)
_U_SCALE = tl.constexpr(table.U_SCALE)
_U_SHIFT = tl.constexpr(table.U_SHIFT)
_LOG_PIVOT = tl.constexpr(table.LOG_PIVOT)
_LOG_EXPONENT_MASK = tl.constexpr(table.LOG_EXPONENT_MASK)
_LOG_SCALE = tl.constexpr(table.LOG_SCALE)
_LOG_FLOOR = tl.constexpr(table.LOG_FLOOR)
_LOG_POLY = tl.constexpr(table.LOG_POLY)
_LOG_DEGREE = tl.constexpr(len(table.LOG_POLY) - 1)
_ANGLE_SCALE = tl.constexpr(table.ANGLE_SCALE)
_QUADRANT_SHIFT = tl.constexpr(table.QUADRANT_SHIFT)
_SIN_POLY = tl.constexpr(table.SIN_POLY)
_SIN_DEGREE = tl.constexpr(len(table.SIN_POLY) - 1)
_COS_POLY = tl.constexpr(table.COS_POLY)
_COS_DEGREE = tl.constexpr(len(table.COS_POLY) - 1)


@triton.jit
def word(value: tl.constexpr):
    """A uint32 scalar; mixed with a plain Python integer, Triton would widen to int64."""
    return tl.full((), value, tl.uint32)


@triton.jit
def constant(value: tl.constexpr, like):
    """``value`` in the dtype and shape of ``like``; a plain Python float costs an instruction at each use."""
    return tl.full(like.shape, value, like.dtype)


@triton.jit
def anchor(like, PTX: tl.constexpr):
    """A uint32 zero in the layout of the 32-bit tensor ``like``; it compiles to nothing.

    Added to the index, it makes Triton compute the noise in the layout in which 16 bytes a thread are loaded and
    stored. Without it the noise is computed in another layout and converted through shared memory.
    """
    if PTX:
        return tl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [like], dtype=tl.uint32, is_pure=True, pack=1)
    else:
        return tl.zeros(like.shape, tl.uint32)


@triton.jit
def fma(a, b, c):
    """fp32 ``a * b + c``, rounded once."""
    if _ROUNDS_TWICE:
        # The product is exact in float64; rounding the sum to odd there makes the conversion to fp32 round as if from
        # the exact value (Boldo and Melquiond 2008).
        product = a.to(tl.float64) * b.to(tl.float64)
        addend = c.to(tl.float64)
        total = product + addend
        part = total - product
        error = (product - (total - part)) + (addend - part)
        bits = total.to(tl.int64, bitcast=True)
        finite = (bits & 0x7FF0000000000000) != 0x7FF0000000000000
        step = tl.where((error > 0) == (total > 0), 1, -1)
        odd = tl.where((error != 0) & ((bits & 1) == 0) & finite, bits + step, bits)
        return odd.to(tl.float64, bitcast=True).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def negated(x):
    """``-x``, which some versions of Triton compute as ``0 - x``: an instruction more, and +0 for x = +0."""
    return x * constant(-1.0, x)


@triton.jit
def polynomial(x, coefficients: tl.constexpr, DEGREE: tl.constexpr):
    """Horner's rule with one :func:`fma` a step; ``coefficients`` in rising powers."""
    value = constant(coefficients[DEGREE], x)
    for i in tl.static_range(DEGREE):
        value = fma(value, x, constant(coefficients[DEGREE - 1 - i], x))
    return value


@triton.jit
def multiply_wide(a: tl.constexpr, b, PTX: tl.constexpr):
    """High and low words of the 64-bit product of ``a`` and the uint32 ``b``."""
    factor = tl.full(b.shape, a, tl.uint32)
    if PTX:
        # One instruction. A 64-bit product in plain Triton is rewritten by LLVM into longer code.
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b64 p; mul.wide.u32 p, $2, $3; mov.b64 {$0, $1}, p; }",
            "=r,=r,r,r",
            [b, factor],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
        return high, low
    else:
        return tl.umulhi(b, factor), b * factor


@triton.jit
def philox(seed, low, high, stream, PTX: tl.constexpr):
    """Philox4x32-10 of key ``seed`` (int64 scalar) and counter ``(low, high, stream, 0)``: four uint32 words.

    ``low`` is a tensor, ``high`` and ``stream`` are scalars: much of the first two rounds is scalar too, and the
    bracketing keeps it so.
    """
    c0, c1, c2, c3, _, _ = _rounds(seed, low, high, stream, _PHILOX_ROUNDS, PTX)
    return c0, c1, c2, c3


@triton.jit
def _rounds(seed, low, high, stream, ROUNDS: tl.constexpr, PTX: tl.constexpr):
    """The counter of :func:`philox` after the first rounds, and the key of the next."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0, c1, c2, c3 = low, high, stream, word(0)
    for _ in tl.static_range(ROUNDS):
        h0, l0 = multiply_wide(_M0, c0, PTX)
        h1, l1 = multiply_wide(_M1, c2, PTX)
        c0, c1, c2, c3 = h1 ^ (c1 ^ k0), l1, h0 ^ (c3 ^ k1), l0
        k0 += word(_W0)
        k1 += word(_W1)
    return c0, c1, c2, c3, k0, k1


@triton.jit
def _last_rounds(seed, low, high, stream, PIECE: tl.constexpr):
    """What a piece of PTX of ``noise_ptx`` makes of a Philox call, as uint32."""
    c0, c1, c2, c3, k0, k1 = _rounds(seed, low, high, stream, _FIRST_ROUNDS, True)
    operands = (c0, c1, c2, c3)
    for _ in tl.static_range(_LAST_ROUNDS):
        operands += (k0, k1)
        k0 += word(_W0)
        k1 += word(_W1)
    return tl.inline_asm_elementwise(
        PIECE, _PIECE_CONSTRAINTS, operands, dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1
    )


@triton.jit
def _block_words(seed, low, high, stream, PTX: tl.constexpr):
    """:func:`philox`, of fewer operations."""
    if PTX:
        return _last_rounds(seed, low, high, stream, _WORDS)
    else:
        return philox(seed, low, high, stream, PTX)


@triton.jit
def _block_normals(seed, low, high, stream, SHORT: tl.constexpr, PTX: tl.constexpr):
    """The four normals of a Philox call, see :func:`philox`; ``SHORT``: of fewer operations."""
    if PTX and SHORT:
        z0, z1, z2, z3 = _last_rounds(seed, low, high, stream, _NORMALS)
        z0, z1 = z0.to(tl.float32, bitcast=True), z1.to(tl.float32, bitcast=True)
        return z0, z1, z2.to(tl.float32, bitcast=True), z3.to(tl.float32, bitcast=True)
    else:
        w0, w1, w2, w3 = philox(seed, low, high, stream, PTX)
        z0, z1 = box_muller(w0, w1, PTX)
        z2, z3 = box_muller(w2, w3, PTX)
        return z0, z1, z2, z3


@triton.jit
def square_root(x, PTX: tl.constexpr):
    """The correctly rounded root of fp32 ``x`` in [2^-101, 2^100]."""
    if PTX:
        # What sqrt.rn compiles to, without its branch for the arguments we never have.
        y = tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        root = x * y
        return fma(fma(negated(root), root, x), y * constant(0.5, x), root)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def minus_two_log(u):
    """-2 ln u for fp32 u in (0, 1]."""
    bits = u.to(tl.uint32, bitcast=True)
    exponent = (bits - word(_LOG_PIVOT)) & word(_LOG_EXPONENT_MASK)
    m = (bits - exponent).to(tl.float32, bitcast=True) - constant(1.0, u)
    e = exponent.to(tl.int32, bitcast=True).to(tl.float32)
    return fma(m, polynomial(m, _LOG_POLY, _LOG_DEGREE), fma(e, constant(_LOG_SCALE, u), constant(_LOG_FLOOR, u)))


@triton.jit
def box_muller(w_radius, w_angle, PTX: tl.constexpr):
    """Two standard normals (fp32) from two uint32 words."""
    w = (w_radius >> 1).to(tl.int32, bitcast=True).to(tl.float32)
    radius = square_root(minus_two_log(fma(w, constant(_U_SCALE, w), constant(_U_SHIFT, w))), PTX)

    angle = (w_angle << 2).to(tl.int32, bitcast=True).to(tl.float32)
    x = angle * constant(_ANGLE_SCALE, angle)
    x2 = x * x
    sine = fma(polynomial(x2, _SIN_POLY, _SIN_DEGREE) * x2, x, x)
    cosine = fma(polynomial(x2, _COS_POLY, _COS_DEGREE), x2, constant(1.0, x))
    quadrant = w_angle + word(_QUADRANT_SHIFT)  # in its top two bits
    radius = (radius.to(tl.uint32, bitcast=True) ^ (quadrant & word(0x80000000))).to(tl.float32, bitcast=True)
    swap = (quadrant & word(0x40000000)) != 0
    return radius * tl.where(swap, negated(sine), cosine), radius * tl.where(swap, cosine, sine)


@triton.jit
def counters(zero, block, TILES: tl.constexpr, STRIDE: tl.constexpr):
    """Low words of the blocks ``block + t STRIDE + l``, shape (TILES, 256), and their common high word.

    ``block`` (int64 scalar) is a multiple of ``TILES STRIDE``, a power of two, so no carry reaches the high word.
    """
    place = tl.arange(0, TILES)[:, None] * STRIDE + tl.arange(0, LANES)[None, :]
    return zero + (block.to(tl.uint32) + place.to(tl.uint32)), (block >> 32).to(tl.uint32)


@triton.jit
def normals(seed, group, stream, zero, CALL: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr):
    """Standard normals of the four rows ``4 CALL ...`` of a group."""
    CALLS: tl.constexpr = ROWS // 4
    low, high = counters(zero, group * (TILES * CALLS * LANES), TILES, CALLS * LANES)
    w0, w1, w2, w3 = philox(seed, low + word(CALL * LANES), high, stream, PTX)
    z0, z1 = box_muller(w0, w1, PTX)
    z2, z3 = box_muller(w2, w3, PTX)
    return z0, z1, z2, z3


@triton.jit
def signs(seed, group, stream, zero, TILES: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr):
    """The ``ROWS`` tensors of Rademacher signs of a group, as uint32 sign bits; ``TILES ROWS`` must be 32 or 16.

    A group then takes all the bits of one of the four words, or half of them: the same calls at every ``t``, other bits
    of the word.
    """
    tl.static_assert((TILES * ROWS == 32) | (TILES * ROWS == 16))
    HALF: tl.constexpr = 1 if TILES * ROWS == 16 else 0
    low, high = counters(zero, (group >> (2 + HALF)) * LANES, TILES, 0)
    w0, w1, w2, w3 = philox(seed, low, high, stream, PTX)
    w = choose((group >> HALF) & 3, w0, w1, w2, w3) ^ word(0xFFFFFFFF)
    first = tl.arange(0, TILES)[:, None] * ROWS
    if HALF:
        first += (group & 1).to(tl.int32) * 16
    w = w >> first.to(tl.uint32)
    bits = ()
    for row in tl.static_range(ROWS):
        bits += ((w << (31 - row)) & word(0x80000000),)
    return bits


@triton.jit
def rounding_words(seed, group, zero, TILES: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr):
    """Four words of random bits for stochastic rounding of a group; row r takes half r & 1 of word r >> 1."""
    tl.static_assert(ROWS == _ROUNDING_PER_CALL)
    low, high = counters(zero, group * (TILES * LANES), TILES, LANES)
    return philox(seed, low, high, word(_STREAM_ROUNDING), PTX)


@triton.jit
def sign_of(bit):
    """fp32 +1 where bit 0 of the uint32 is set, -1 elsewhere."""
    return ((((bit & word(1)) ^ word(1)) << 31) | word(0x3F800000)).to(tl.float32, bitcast=True)


@triton.jit
def choose(which, a, b, c, d):
    """``(a, b, c, d)[which]``, elementwise."""
    return tl.where(which < 2, tl.where(which == 0, a, b), tl.where(which == 2, c, d))


@triton.jit
def tile_noise(seed, tile, stream, zero, NOISE: tl.constexpr, PTX: tl.constexpr, SHORT: tl.constexpr = False):
    """Noise of the tiles of 1024 numbered by int64 ``tile`` (T, 1): the four rows of 256 lanes, each (T, 256).

    ``SHORT``: of few operations, for kernels with so many that Triton takes long to compile them.
    """
    lane = zero + tl.arange(0, LANES)[None, :].to(tl.uint32)
    if NOISE == GAUSSIAN:
        low, high = (tile << 8).to(tl.uint32) + lane, (tile >> 24).to(tl.uint32)
        z0, z1, z2, z3 = _block_normals(seed, low, high, stream, SHORT, PTX)
    else:
        large = tile >> 5  # tile of 32768
        w0, w1, w2, w3 = philox(seed, (large << 8).to(tl.uint32) + lane, (large >> 24).to(tl.uint32), stream, PTX)
        bits = choose((tile >> 3) & 3, w0, w1, w2, w3) >> ((tile & 7) * 4).to(tl.uint32)
        z0, z1, z2, z3 = sign_of(bits), sign_of(bits >> 1), sign_of(bits >> 2), sign_of(bits >> 3)
    return z0, z1, z2, z3


@triton.jit
def tile_rounding_words(seed, tile, zero, PTX: tl.constexpr):
    """Two words of random bits for the tile of 1024 numbered by the int64 scalar; row r takes half r & 1 of r >> 1."""
    large = tile >> 1  # tile of 2048
    lane = zero + tl.arange(0, LANES)[None, :].to(tl.uint32)
    low, high = (large << 8).to(tl.uint32) + lane, (large >> 24).to(tl.uint32)
    w0, w1, w2, w3 = _block_words(seed, low, high, word(_STREAM_ROUNDING), PTX)
    odd = (tile & 1) != 0
    return tl.where(odd, w2, w0), tl.where(odd, w3, w1)


@triton.jit
def rounding_at(seed, base, delta, PTX: tl.constexpr):
    """16 bits for stochastic rounding at the arena indices ``base + delta``, one Philox call each.

    ``base`` is an int64 scalar, ``delta`` an int32 tensor of numbers that are not negative.
    """
    start = base // (_ROUNDING_PER_CALL * LANES)
    inside = delta + (base % (_ROUNDING_PER_CALL * LANES)).to(tl.int32)
    tile = start + (inside // (_ROUNDING_PER_CALL * LANES)).to(tl.int64)
    low = (tile << 8).to(tl.uint32) + (inside & (LANES - 1)).to(tl.uint32)  # the sum does not carry
    w0, w1, w2, w3 = philox(seed, low, (tile >> 24).to(tl.uint32), word(_STREAM_ROUNDING), PTX)
    half = (inside >> 8) & (_ROUNDING_PER_CALL - 1)
    return (choose(half >> 1, w0, w1, w2, w3) >> ((half & 1) << 4).to(tl.uint32)) & word(0xFFFF)


@triton.jit
def noise_at(seed, index, stream, NOISE: tl.constexpr, PTX: tl.constexpr):
    """Noise of any arena indices (int64 tensor), one Philox call each: for ranges that start inside a tile."""
    row = index >> 8
    lane = index & 255
    if NOISE == GAUSSIAN:
        block = ((row >> 2) << 8) + lane
        w0, w1, w2, w3 = philox(seed, block.to(tl.uint32), (block >> 32).to(tl.uint32), stream, PTX)
        second = (row & 2) != 0
        z0, z1 = box_muller(tl.where(second, w2, w0), tl.where(second, w3, w1), PTX)
        return tl.where((row & 1) != 0, z1, z0)
    else:
        block = ((row >> 7) << 8) + lane
        w0, w1, w2, w3 = philox(seed, block.to(tl.uint32), (block >> 32).to(tl.uint32), stream, PTX)
        return sign_of(choose((row >> 5) & 3, w0, w1, w2, w3) >> (row & 31).to(tl.uint32))
