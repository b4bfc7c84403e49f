"""Most of the way from a Philox counter to its words, or to four normals, as one piece of PTX.

The steps and their order are those of ``noise.philox`` and ``noise.box_muller``. What differs is what Triton has to
look at: its passes over a kernel take time that grows with the cube of the number of operations, and this is one
instead of some two hundred for each place where noise is drawn.
"""

import struct

from zoengine.noise import table

FIRST_ROUNDS = 2  # of Philox, outside: much of them is the same for the whole program
LAST_ROUNDS = table.PHILOX_ROUNDS - FIRST_ROUNDS


def _float(value: float) -> str:
    return "0f" + struct.pack(">f", value).hex().upper()


def _word(value: int) -> str:
    return f"0x{value:08X}"


def _horner(out: str, x: str, coefficients: tuple[float, ...]) -> list[str]:
    rising = [_float(c) for c in coefficients]
    lines = [f"fma.rn.f32 {out}, {rising[-1]}, {x}, {rising[-2]};"]
    return lines + [f"fma.rn.f32 {out}, {out}, {x}, {c};" for c in reversed(rising[:-2])]


def _round(k0: str, k1: str) -> list[str]:
    """One round of Philox on c0 .. c3."""
    return [
        f"mul.wide.u32 p, c0, {_word(table.PHILOX_M0)};",
        f"mul.wide.u32 q, c2, {_word(table.PHILOX_M1)};",
        f"xor.b32 x, c1, {k0};",
        f"xor.b32 y, c3, {k1};",
        "mov.b64 {c3, c2}, p;",
        "mov.b64 {c1, c0}, q;",
        "xor.b32 c0, c0, x;",
        "xor.b32 c2, c2, y;",
    ]


def _box_muller(w: str, v: str, first: str, second: str) -> list[str]:
    """Normals ``first`` and ``second`` of the words ``w`` and ``v``, which are lost."""
    return [
        f"shr.u32 {w}, {w}, 1;",
        f"cvt.rn.f32.s32 {w}, {w};",
        f"fma.rn.f32 {w}, {w}, {_float(table.U_SCALE)}, {_float(table.U_SHIFT)};",
        f"sub.u32 e, {w}, {_word(table.LOG_PIVOT)};",
        f"and.b32 e, e, {_word(table.LOG_EXPONENT_MASK)};",
        f"sub.u32 m, {w}, e;",
        f"sub.rn.f32 m, m, {_float(1.0)};",
        "cvt.rn.f32.s32 e, e;",
        f"fma.rn.f32 e, e, {_float(table.LOG_SCALE)}, {_float(table.LOG_FLOOR)};",
        *_horner("r", "m", table.LOG_POLY),
        "fma.rn.f32 e, m, r, e;",
        "rsqrt.approx.ftz.f32 y, e;",  # as noise.square_root
        "mul.rn.f32 r, e, y;",
        f"mul.rn.f32 y, y, {_float(0.5)};",
        "neg.f32 m, r;",
        "fma.rn.f32 e, m, r, e;",
        "fma.rn.f32 r, e, y, r;",
        f"add.u32 e, {v}, {_word(table.QUADRANT_SHIFT)};",
        f"shl.b32 {v}, {v}, 2;",
        f"cvt.rn.f32.s32 {v}, {v};",
        f"mul.rn.f32 x, {v}, {_float(table.ANGLE_SCALE)};",
        "mul.rn.f32 y, x, x;",
        *_horner("s", "y", table.SIN_POLY),
        "mul.rn.f32 s, s, y;",
        "fma.rn.f32 s, s, x, x;",
        *_horner("c", "y", table.COS_POLY),
        f"fma.rn.f32 c, c, y, {_float(1.0)};",
        f"and.b32 x, e, {_word(1 << 31)};",
        "xor.b32 r, r, x;",
        f"and.b32 e, e, {_word(1 << 30)};",
        "setp.ne.u32 swap, e, 0;",
        "neg.f32 m, s;",
        "selp.f32 m, m, c, swap;",
        "selp.f32 c, c, s, swap;",
        f"mul.rn.f32 {first}, r, m;",
        f"mul.rn.f32 {second}, r, c;",
    ]


def _block(outputs: list[str], end: list[str]) -> str:
    """Operands: four results, the counter after the first rounds, two keys for each of the last rounds."""
    lines = ["{", ".reg .b64 p, q;", ".reg .b32 c0, c1, c2, c3, x, y, w, e, m, r, s, c;", ".reg .pred swap;"]
    lines += [f"mov.b32 c{i}, ${4 + i};" for i in range(4)]
    for i in range(LAST_ROUNDS):
        lines += _round(f"${8 + 2 * i}", f"${9 + 2 * i}")
    return "\n".join([*lines, *end, *(f"mov.b32 ${i}, {name};" for i, name in enumerate(outputs)), "}"])


WORDS = _block(["c0", "c1", "c2", "c3"], [])
NORMALS = _block(["w", "c1", "c0", "c3"], _box_muller("c0", "c1", "w", "c1") + _box_muller("c2", "c3", "c0", "c3"))
CONSTRAINTS = ",".join(["=r"] * 4 + ["r"] * (4 + 2 * LAST_ROUNDS))
