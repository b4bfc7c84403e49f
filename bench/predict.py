"""``python -m bench.predict``: what the kernels should reach on a card, from what they compile to. Needs no GPU.

Writes bench/results/predicted-sm80.json, -sm90.json and -sm100.json. For every kernel and dtype: SASS instructions an
element (counted as tests/sass.py says; those of CUDA C++ stand in tests/budgets), the bytes it cannot avoid
(bench/cases.py, bench/update_cases.py), and the floor they give: the longer of moving the bytes as fast as a copy does
and issuing the instructions at one warp instruction a clock and scheduler. The prediction is that floor as % of the
copy's bytes a second.

It is a bound, not a forecast: it takes every issue slot as used. Integer instructions run at half of that rate on these
cards, and instructions of one warp wait for each other, so kernels near the border between the two bounds will
measure lower.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from bench import cases, figure, update_cases
from bench.cases import is_main
from bench.environment import ROOT
from bench.gpu.predictions import path
from bench.progress import say

sys.path.append(str(ROOT / "tests"))  # where kernels are compiled and read without a GPU

# Public figures of the cards: bytes a second of the memory, multiprocessors, boost clock. A multiprocessor has four
# schedulers that issue one instruction for 32 threads a clock. A copy reaches nine tenths of the memory's figure.
CARDS: dict[str, dict[str, Any]] = {
    "8.0": {"card": "A100 SXM 80 GB", "bytes_per_s": 2.039e12, "multiprocessors": 108, "hertz": 1.41e9},
    "9.0": {"card": "H100 SXM 80 GB", "bytes_per_s": 3.35e12, "multiprocessors": 132, "hertz": 1.755e9},
    "10.0": {"card": "B200", "bytes_per_s": 8.0e12, "multiprocessors": 148, "hertz": 1.965e9},
}
COPY = 0.9
BUDGETS = ROOT / "tests" / "budgets"
LANES = 4 * 32
_TYPES = {"fp32": "Float32", "bf16": "BFloat16", "fp16": "Float16"}
# Labels of tests/budgets/cuda_updates_sm90.json: kernels of updates, counted for bf16 weights.
_CUDA_UPDATES = {
    "add_scaled": "scale", "add_masked": "mask", "add_diagonal": "diag", "momentum": "state-and-weights",
    "sign": "sign", "adam": "adam", "hizoo": "hizoo", "kron": "kron_rows",
}  # fmt: skip


def prediction(capability: str, instructions: float, moved: float) -> dict[str, Any]:
    """The floor of a kernel with so many instructions and bytes an element, in picoseconds, and what it is in %."""
    card = CARDS[capability]
    by_bytes = moved / (COPY * card["bytes_per_s"])
    by_instructions = instructions / (card["multiprocessors"] * LANES * card["hertz"])
    floor = max(by_bytes, by_instructions)
    return {
        "instructions": instructions,
        "bytes": moved,
        "floor_ps": 1e12 * floor,
        "bound": "bytes" if by_bytes >= by_instructions else "instructions",
        "percent_of_copy": 100 * by_bytes / floor,
    }


def triton_variants() -> Iterator[tuple[str, float, Any, int]]:
    """(case as in the rows, bytes an element, variant of tests/triton_aot.py, noise terms or passes)."""
    import triton_aot as aot
    from zoengine.kernels.segments import DOT, DOT_NOISE, STATS, segment_blocks_kernel

    from zoengine.noise import table

    for case in cases.cases(cases.DTYPES):
        moved, noise = case.bytes(1), table.NOISES[case.noise]
        if case.op == "noise_fill":
            yield case.name, moved, aot.noise_fill(case.dtype, noise), 1
        elif case.op == "add_noise":
            variant = aot.add_noise(
                case.dtype, noise, 1 if case.terms == 1 else -1, case.states, case.decay,
                case.rounding == "stochastic", case.out,
            )  # fmt: skip
            yield case.name, moved, variant, case.terms
        elif case.op.startswith("segment"):
            kind = {"segment_stats": STATS, "segment_dot": DOT, "segment_dot_noise": DOT_NOISE}[case.op]
            yield case.name, moved, aot.segments(segment_blocks_kernel, kind, noise, case.dtype), 1
    for dtype in ("fp32", "bf16"):
        for name, variant, terms in (
            *((f"add_{word}", aot.add_noise(dtype, transform=kind), 1) for word, kind in
              (("scaled", "scale"), ("masked", "mask"), ("diagonal", "diag"))),
            ("momentum", aot.state_fold(dtype, norm=False), 1),
            ("fold_norm", aot.state_fold(dtype, fused=False), 1),
            *((rule, aot.rule_step(rule, dtype), 1) for rule in ("sign", "adam", "amsgrad", "adamu", "hizoo")),
            ("adam_replay", aot.rule_step("adam_replay", dtype, count=-1), 4),
            ("kron", aot.kron_rows(dtype), 1),
            ("kron_and_score", aot.kron_rows(dtype, score=True), 1),
            ("packed_noise", aot.segment_noise_fill(dtype), 1),
            ("mask_below", aot.mask_below(dtype), 1),
        ):  # fmt: skip
            yield f"{name}/{dtype}", update_cases.UPDATES[name].bytes(dtype, 1 << 20) / (1 << 20), variant, terms


def triton_instructions(variant: Any, terms: int, target: Any) -> float:
    """Instructions an element; a loop over terms counts once for each."""
    import triton_aot as aot

    kernel = aot.read(variant.compile(target))
    count = kernel.path(avoid=aot.narrow) or kernel.path()
    loop = kernel.loops()[0] if terms > 1 else 0
    return round((count + (terms - 1) * loop) / variant.elements, 2)


def cuda_kernels(capability: str) -> Iterator[tuple[str, float, float]]:
    """(case, bytes and instructions an element) of the CUDA C++ kernels that tests/test_cuda_build.py counts."""
    stored = json.loads((BUDGETS / f"cuda_sm{capability.replace('.', '')}.json").read_text())
    for case in cases.cases(cases.DTYPES):
        kind = f"{_TYPES[case.dtype]}-{case.noise}" + "-stochastic" * (case.rounding == "stochastic")
        plain = not (case.states or case.decay)
        label = kind + ("-fill" if case.op == "noise_fill" else "-1" if plain else "-any")
        if label in stored and (case.op == "noise_fill" or (case.op == "add_noise" and case.terms == 1)):
            yield case.name, case.bytes(1), stored[label]["instructions_per_element"]
    if capability == "9.0":
        stored = json.loads((BUDGETS / "cuda_updates_sm90.json").read_text())
        for name, label in _CUDA_UPDATES.items():
            moved = update_cases.UPDATES[name].bytes("bf16", 1 << 20) / (1 << 20)
            yield f"{name}/bf16", moved, stored[f"{label}-BFloat16"]["instructions_per_element"]


def predict(capability: str, main_only: bool = False) -> dict[str, Any]:
    """The whole file for cards of this compute capability; ``main_only`` compiles one term in place and the noise."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", int(capability.replace(".", "")), 32)
    main = {case.name for case in cases.cases(cases.DTYPES) if is_main(case)}
    found = []
    for case, moved, variant, terms in triton_variants():
        if case in main or not main_only:
            one = prediction(capability, triton_instructions(variant, terms, target), moved)
            found.append({"case": case, "backend": "triton", **one})
    for case, moved, count in cuda_kernels(capability):
        found.append({"case": case, "backend": "cuda", **prediction(capability, count, moved)})
    card = {**CARDS[capability], "copy": COPY, "lanes_per_clock": LANES}
    return {"capability": capability, "triton": triton.__version__, **card, "kernels": found}


def main() -> int:
    """Write the predictions asked for."""
    p = argparse.ArgumentParser(prog="python -m bench.predict", description=__doc__.split("\n\n")[0])
    p.add_argument("--capability", choices=tuple(CARDS), nargs="+", default=list(CARDS))
    p.add_argument("--main-only", action="store_true", help="one term in place and the noise alone: a minute a card")
    args = p.parse_args()
    for capability in args.capability:
        figure.write(path(capability), predict(capability, args.main_only))
        say(f"predictions: {path(capability)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
