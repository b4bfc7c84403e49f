"""Between memory and fp32: loads widened exactly, results rounded to nearest or stochastically."""

import triton
import triton.language as tl
from zoengine.kernels.noise import INTERPRETED, word

# The portable code below, for two elements. LLVM's own version of it differs from one Triton to the next.
_ROUND_TWO_STOCHASTICALLY = tl.constexpr("""{
    .reg .pred finite;
    .reg .b32 low, high;
    abs.f32 low, $1;
    setp.lt.f32 finite, low, 0f7F800000;
    selp.b32 low, $3, 0, finite;
    add.u32 low, low, $1;
    abs.f32 high, $2;
    setp.lt.f32 finite, high, 0f7F800000;
    selp.b32 high, $4, 0, finite;
    add.u32 high, high, $2;
    prmt.b32 $0, low, high, 0x7632;
}""")


@triton.jit
def widen(x, PTX: tl.constexpr):
    """fp32 of fp32, bf16 or fp16 ``x``."""
    if PTX and x.dtype == tl.bfloat16:
        # One instruction an element; the compiler's own code takes two for every second one.
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    elif INTERPRETED and x.dtype == tl.bfloat16:
        # The interpreter takes subnormal bf16 for zero.
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def round_nearest(x, dtype: tl.constexpr):
    """fp32 ``x`` rounded to ``dtype``, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter cuts the low half off.
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + word(0x7FFF) + ((bits >> 16) & word(1))) >> 16
        return tl.where(x != x, word(0x7FC0), rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def round_stochastic(x, random, dtype: tl.constexpr, PTX: tl.constexpr):
    """fp32 ``x`` rounded to bf16 or fp16 with the 16 bits ``random`` (uint32) added below the last bit kept.

    Infinities and NaN stay. fp16 takes the upper 13 random bits; below 2^-14, where its spacing is 2^-24, they are
    added to the integer trunc(|x| 2^37).
    """
    bits = x.to(tl.uint32, bitcast=True)
    if dtype == tl.bfloat16:
        # A NaN here is a widened bf16 or the quiet result of arithmetic: its upper half alone is a NaN.
        if PTX:
            return tl.inline_asm_elementwise(
                _ROUND_TWO_STOCHASTICALLY, "=r,r,r,r,r", [x, random], dtype=tl.bfloat16, is_pure=True, pack=2
            )
        else:
            bits += tl.where(tl.abs(x) < float("inf"), random, word(0))
            return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        small = tl.abs(x) < 2.0**-14
        fixed = (tl.where(small, tl.abs(x), 0.0) * (2.0**37)).to(tl.int32).to(tl.uint32, bitcast=True)
        kept = tl.where(small, fixed, (bits & word(0x7FFFFFFF)) - word(0x38000000))  # exponent bias 127 to 15
        half = tl.minimum((kept + (random >> 3)) >> 13, word(0x7C00)) | ((bits >> 16) & word(0x8000))
        half = tl.where(x != x, word(0x7E00), half)
        return half.to(tl.uint16).to(tl.float16, bitcast=True)
