"""Which unit of a multiprocessor runs a SASS instruction, and how many lanes each unit takes a clock.

Sources, where they agree: the table "Throughput of Native Arithmetic Instructions" of NVIDIA's CUDA C++ Best Practices
Guide (13.0, section 12.1.1; https://docs.nvidia.com/cuda/cuda-c-best-practices-guide/), and the pipelines of the Nsight
Compute profiling guide with what NVIDIA says of them per chip (https://forums.developer.nvidia.com/t/302018): on 8.0
one FMA pipe runs fp32 and IMAD; from 9.0 on there are two, "heavy" for both and "lite" for fp32 alone.

Less certain, from public microbenchmarks of single instructions on A100, H100 and B300:

* IMAD.WIDE and IMAD.HI pass through the multiplier twice (32 lanes a clock); the Guide has one number for all of IMAD.
* F2FP, which packs two fp32 numbers, is on the ALU, as are compares of packed halves. The Guide's 16 a clock is for
  conversions one by one, on the XU.
* FFMA2 and HFMA2 occupy both FMA pipes, HFMA2.MMA the unit of fp64; VIADD, HADD2.F32 and FHADD are on the heavy one.
* The LSU takes a clock for every 128 bytes of a warp. Bank conflicts, and atomic additions to one address, take longer
  and are not seen here.

Left out, because nothing comes near them: the uniform datapath, branches, barriers and the constant cache take issue
slots only. Register banks too: on 9.0 each of the two seems to deliver about one operand a warp and clock, and the
kernels of add_noise_ ask each for 0.85 an instruction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import sass

# Lanes a clock and multiprocessor, by compute capability. "fma" is both pipes together, "fmaheavy" the one with IMAD.
RATES: dict[str, dict[str, int]] = {
    "8.0": {"issue": 128, "alu": 64, "fma": 64, "half": 64, "xu": 16, "fp64": 32, "lsu": 32},
    "9.0": {"issue": 128, "alu": 64, "fma": 128, "fmaheavy": 64, "xu": 16, "fp64": 64, "lsu": 32},
    "10.0": {"issue": 128, "alu": 64, "fma": 128, "fmaheavy": 64, "xu": 16, "fp64": 64, "lsu": 32},
}

_OPS = {
    "alu": """F2FP FMNMX FSEL FSET FSETP HSETP2 I2FP IABS IADD3 IMNMX ISETP LEA LOP3 MOV P2R PLOP3 PRMT R2P SEL SGXT SHF
              VIADDMNMX VIMNMX""",
    "fp32": "FADD FFMA FMUL",
    "two fp32": "FADD2 FFMA2 FMUL2",
    "half": "FHADD HADD2 HFMA2",
    "imad": "IMAD VIADD",
    "xu": "F2F F2I FCHK I2F MUFU",
    "fp64": "DADD DFMA DMUL DSETP",
    "lsu": "ATOMS LDG LDL LDS LDSM RED REDG SHFL STG STL STS",
    "none": """BAR BRA BREAK BSSY BSYNC CALL CS2R ENDCOLLECTIVE EXIT LDC LDCU NOP R2UR RET S2R S2UR VOTEU WARPSYNC
               UIADD3 UIMAD UISETP ULDC ULEA ULOP3 UMOV UPLOP3 UPRMT USEL USHF""",
}
_KIND = {op: kind for kind, ops in _OPS.items() for op in ops.split()}


def slots(instruction: sass.Instruction, capability: str) -> dict[str, int]:
    """How often an instruction passes through each pipe, "issue" included.

    Raises:
        KeyError: an instruction that is not in the table; find out where it runs and add it.
    """
    kind = _KIND.get(instruction.op)
    if kind is None:
        raise KeyError(f"{instruction.mnemonic}: no pipe is known for it; add it to _OPS in tests/sass_pipes.py")
    if kind == "none":
        used = {}
    elif kind == "fp32":
        used = {"fma": 1}
    elif kind == "two fp32":
        used = {"fma": 2, "fmaheavy": 1}
    elif kind == "imad":
        passes = 2 if {"WIDE", "HI"} & set(instruction.mnemonic.split(".")) else 1
        used = {"fma": passes, "fmaheavy": passes}
    elif kind == "half" and capability != "8.0":
        mixed = instruction.op == "FHADD" or instruction.mnemonic == "HADD2.F32"  # of fp32 and a half
        used = {"fma": 1 if mixed else 2, "fmaheavy": 1}
        if instruction.mnemonic.endswith(".MMA"):
            used = {"fp64": 1}
    elif kind == "lsu":
        used = {"lsu": 1 if instruction.op == "SHFL" else max(1, instruction.bits // 32)}
    else:
        used = {kind: 1}
    return {"issue": 1} | {pipe: count for pipe, count in used.items() if pipe in RATES[capability]}


def total(instructions: Iterable[sass.Instruction], capability: str, times: float = 1) -> Counter[str]:
    """The sum of :func:`slots`, ``times`` as often."""
    found: Counter[str] = Counter()
    for instruction in instructions:
        for pipe, count in slots(instruction, capability).items():
            found[pipe] += times * count
    return found


def rounded(use: Counter[str]) -> dict[str, float]:
    """Two digits, issue first; pipes that are hardly used are left out."""
    return {pipe: round(use[pipe], 2) for pipe in ("issue", *sorted(set(use) - {"issue"})) if use[pipe] >= 0.005}
