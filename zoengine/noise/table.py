"""Constants of noise stream version 1: the one table every backend takes them from.

The torch reference and the Triton kernels import this module; the build writes it out as a C++ header
(:func:`cpp_header`) for the CPU and CUDA kernels. Importing it needs nothing but the standard library, so the
build can read it before torch or zoengine are importable.

Every floating constant is exact in fp32. docs/noise-stream.md derives them and states the error they give.
"""

from __future__ import annotations

VERSION = 1

# Streams: the third counter word. New purposes append; a number is never reused.
STREAM_DIRECTION = 0
STREAM_SECOND = 1
STREAM_FACTOR_U = 2
STREAM_FACTOR_V = 3
STREAM_ROUNDING = 4
STREAM_STATE = 5
STREAM_MASK = 6
STREAM_RUN_SEED = 7

# Distributions, as the integer the ops carry.
GAUSSIAN = 0
RADEMACHER = 1
NOISES = {"gaussian": GAUSSIAN, "rademacher": RADEMACHER}

# Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
PHILOX_ROUNDS = 10
PHILOX_M0 = 0xD2511F53
PHILOX_M1 = 0xCD9E8D57
PHILOX_W0 = 0x9E3779B9
PHILOX_W1 = 0xBB67AE85

# Tiles. One Philox call serves `per_call` elements, 256 apart; a tile is 256 calls.
LANES = 256
GAUSSIAN_PER_CALL = 4
ROUNDING_PER_CALL = 8
RADEMACHER_PER_CALL = 128

# u = fma(float(int(w >> 1)), U_SCALE, U_SHIFT) lies in (0, 1].
U_SCALE = 2.0**-31
U_SHIFT = 2.0**-32

# T = -2 ln u. Subtracting LOG_PIVOT (the bits of sqrt(1/2)) centres the mantissa on [sqrt(1/2), sqrt(2)).
LOG_PIVOT = 0x3F3504F3
LOG_EXPONENT_MASK = 0xFF800000
LOG_SCALE = -1.6525916635146132e-07  # fp32(-2 ln 2 * 2^-23)
LOG_FLOOR = 2.0**-96  # keeps T > 0 when u rounds to 1
LOG_POLY = (  # Q of degree 7, rising powers of m: -2 ln(1 + m) = m Q(m)
    -1.999999761581421,
    1.0000053644180298,
    -0.6667317152023315,
    0.49945732951164246,
    -0.39728185534477234,
    0.34392252564430237,
    -0.3289893567562103,
    0.21010822057724,
)

# x = float(int(w << 2)) * ANGLE_SCALE lies in [-pi/4, pi/4]; w + 2^29 carries the quadrant in its top two bits.
ANGLE_SCALE = 3.65729529994141e-10  # fp32(pi/2 * 2^-32)
QUADRANT_SHIFT = 0x20000000
SIN_POLY = (-0.16666655242443085, 0.008332189172506332, -0.00019518291810527444)  # sin x = fma(s x2, x, x)
COS_POLY = (-0.4999988377094269, 0.041655730456113815, -0.0013591342139989138)  # cos x = fma(c, x2, 1)


def cpp_header() -> str:
    """The table as a C++ header: every public number above, floats in hexadecimal so no digit is lost."""
    lines = [
        "// Generated from zoengine/noise/table.py by the build; edit that file.",
        "#pragma once",
        "#include <cstdint>",
        "",
        "namespace zo::table {",
    ]
    for name, value in globals().items():
        if not name.isupper():
            continue
        if isinstance(value, int):
            lines.append(f"constexpr uint32_t {name} = 0x{value:08X}u;")
        elif isinstance(value, float):
            lines.append(f"constexpr float {name} = {value.hex()}f;")
        elif isinstance(value, tuple):
            lines += [f"constexpr float {name}_{k} = {v.hex()}f;" for k, v in enumerate(value)]
    return "\n".join([*lines, "}  // namespace zo::table", ""])
