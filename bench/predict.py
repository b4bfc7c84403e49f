"""``python -m bench.predict``: what the kernels should reach on a card, from what they compile to. Needs no GPU.

Writes bench/results/predicted-sm80.json, -sm90.json and -sm100.json. For every kernel and dtype: how often an element
passes through each pipe of a multiprocessor (SASS counted as tests/sass.py says, pipes and their rates as
tests/sass_pipes.py says; CUDA C++ kernels stand in tests/budgets), the bytes it cannot avoid (bench/cases.py,
bench/update_cases.py), and for every card the floor they give: the longest of moving the bytes as fast as a copy does,
issuing the instructions, and each pipe. ``bound`` names it; the prediction is that floor as % of the copy's bytes a
second.

It is a bound, not a forecast: it takes every pipe as busy all the time, at the highest clock. Instructions of one warp
wait for each other, memory and arithmetic do not overlap perfectly, and a card under load may lower its clock; so
kernels near the border between two bounds will measure lower. Collisions of atomic additions (``quantile``) are not in
it at all.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bench import cases, figure, update_cases
from bench.cases import is_main
from bench.environment import ROOT
from bench.gpu.predictions import path
from bench.progress import say

sys.path.append(str(ROOT / "tests"))  # where kernels are compiled and read without a GPU

import sass
import sass_pipes

# NVIDIA's figures of the cards: bytes a second of the memory, multiprocessors, and the clock that their fp32 rate is
# stated for. A copy reaches nine tenths of the memory's figure: 3.0 TB/s were measured on an H100, 4.3 on an H200.
CARDS: dict[str, dict[str, Any]] = {
    "A100": {"capability": "8.0", "bytes_per_s": 2.039e12, "multiprocessors": 108, "hertz": 1.41e9},
    "H100": {"capability": "9.0", "bytes_per_s": 3.35e12, "multiprocessors": 132, "hertz": 1.98e9},
    "H200": {"capability": "9.0", "bytes_per_s": 4.8e12, "multiprocessors": 132, "hertz": 1.98e9},
    "B200": {"capability": "10.0", "bytes_per_s": 8.0e12, "multiprocessors": 148, "hertz": 1.965e9},
}
CAPABILITIES = tuple(dict.fromkeys(card["capability"] for card in CARDS.values()))
COPY = 0.9
BUDGETS = ROOT / "tests" / "budgets"
_TYPES = {"fp32": "Float32", "bf16": "BFloat16", "fp16": "Float16"}
# Labels of tests/budgets/cuda_updates_sm90.json: kernels of updates, counted for bf16 weights.
_CUDA_UPDATES = {
    "add_scaled": "scale", "add_masked": "mask", "add_diagonal": "diag", "momentum": "state-and-weights",
    "sign": "sign", "adam": "adam", "hizoo": "hizoo", "kron": "kron_rows",
}  # fmt: skip

Use = dict[str, float]  # passes through each pipe for an element, as sass_pipes.rounded gives them


def prediction(card: str, use: Use, moved: float) -> dict[str, Any]:
    """The floor in picoseconds of a kernel that needs so many passes and bytes an element, what it is, and in %."""
    found = CARDS[card]
    clocks = {pipe: count / sass_pipes.RATES[found["capability"]][pipe] for pipe, count in use.items()}
    seconds = {pipe: count / (found["multiprocessors"] * found["hertz"]) for pipe, count in clocks.items()}
    seconds = {"bytes": moved / (COPY * found["bytes_per_s"])} | seconds
    bound = max(seconds, key=seconds.__getitem__)
    return {
        "bound": bound,
        "floor_ps": 1e12 * seconds[bound],
        "percent_of_copy": 100 * seconds["bytes"] / seconds[bound],
    }


@dataclass(frozen=True)
class Compiled:
    """A kernel to compile and count.

    ``trips`` says how often a loop runs, from its number (0: the longest) and its instructions by op; ``passes`` how
    often the whole kernel does for each element; ``aligned`` whether the case takes accesses of 16 bytes.
    """

    case: str
    bytes: float
    variant: Any  # of tests/triton_aot.py
    trips: Callable[[int, Counter[str]], float] | None = None
    passes: float = 1
    aligned: bool = True


def _terms(count: int) -> Callable[[int, Counter[str]], float] | None:
    """A loop over terms for each pass over some of the rows, and no others."""
    return None if count == 1 else lambda number, ops: count


def _rank(rank: int, elements: int) -> Callable[[int, Counter[str]], float]:
    """The loop over the rank is unrolled four times; another one takes what is left over. Neither: the search."""
    return lambda number, ops: {4 * elements: rank // 4, elements: rank % 4}.get(ops["FFMA"] + 2 * ops["FFMA2"], 1)


def triton_kernels() -> Iterator[Compiled]:
    """Every Triton kernel that has a case."""
    import triton_aot as aot
    from zoengine.kernels.segments import DOT, DOT_NOISE, STATS, segment_blocks_kernel

    from zoengine.noise import table

    for case in cases.cases(cases.DTYPES):
        moved, noise = case.bytes(1), table.NOISES[case.noise]
        if case.op == "noise_fill":
            yield Compiled(case.name, moved, aot.noise_fill(case.dtype, noise))
        elif case.op == "add_noise":
            variant = aot.add_noise(
                case.dtype, noise, 1 if case.terms == 1 else -1, case.states, case.decay,
                case.rounding == "stochastic", case.out,
            )  # fmt: skip
            yield Compiled(case.name, moved, variant, _terms(case.terms))
        elif case.op.startswith("segment"):
            kind = {"segment_stats": STATS, "segment_dot": DOT, "segment_dot_noise": DOT_NOISE}[case.op]
            yield Compiled(case.name, moved, aot.segments(segment_blocks_kernel, kind, noise, case.dtype))
    for dtype in ("fp32", "bf16"):
        histogram = aot.segment_histogram(dtype)
        chunks = histogram.constants["CHUNKS"]
        replay = aot.rule_step("adam_replay", dtype, count=-1)
        factors = aot.lowrank_add(dtype)
        for name, variant, *more in (
            *((f"add_{word}", aot.add_noise(dtype, transform=kind)) for word, kind in
              (("scaled", "scale"), ("masked", "mask"), ("diagonal", "diag"))),
            ("momentum", aot.state_fold(dtype, norm=False)),
            ("fold_norm", aot.state_fold(dtype, fused=False)),
            *((rule, aot.rule_step(rule, dtype)) for rule in ("sign", "adam", "amsgrad", "adamu", "hizoo")),
            ("adam_replay", replay, _terms(4)),
            ("kron", aot.kron_rows(dtype)),
            ("kron_and_score", aot.kron_rows(dtype, score=True)),
            ("kron_score", aot.kron_rows(dtype, rows=False, score=True)),
            *((f"lowrank{rank}", factors, _rank(rank, factors.elements)) for rank in (2, 8)),
            ("packed_noise", aot.segment_noise_fill(dtype), _terms(1), 1, False),
            # Three histograms. Of a program's loops the longest is over blocks, the one in it over their chunks.
            ("quantile", histogram, lambda number, ops, chunks=chunks: chunks if number == 1 else 1, 3 / chunks),
            ("mask_below", aot.mask_below(dtype)),
        ):  # fmt: skip
            yield Compiled(
                f"{name}/{dtype}", update_cases.UPDATES[name].bytes(dtype, 1 << 20) / (1 << 20), variant, *more
            )


def main_way(kernel: sass.Kernel, aligned: bool = True) -> tuple[int, ...]:
    """The longest way, past accesses of single elements where there is one: those of 16 bits, and masked ones of 32
    unless that leaves a loop out, as they may be something else."""

    def narrow(one: sass.Instruction) -> bool:
        return one.op in ("LDG", "STG") and one.bits < 32

    def masked(one: sass.Instruction) -> bool:
        return one.op in ("LDG", "STG") and one.bits <= 32 and bool(one.predicate)

    def loops(way: tuple[int, ...]) -> int:
        return sum(loop.start in way for loop in kernel.loops())

    way = (kernel.way(narrow) if aligned else None) or kernel.way()
    wider = kernel.way(lambda one: narrow(one) or masked(one)) if aligned else None
    return wider if wider and loops(wider) == loops(way) else way


def triton_use(one: Compiled, capability: str) -> Use | None:
    """What an element of the kernel costs each pipe, on the path that whole groups take.

    None: the loops that count do not lie on the way forwards, as the compiler has put what follows them before them.
    """
    import triton_aot as aot
    from triton.backends.compiler import GPUTarget

    kernel = aot.read(one.variant.compile(GPUTarget("cuda", int(capability.replace(".", "")), 32)))
    way = main_way(kernel, one.aligned)
    use = sass_pipes.total(kernel.at(way), capability)
    if one.trips is not None:
        found = []
        for number, loop in enumerate(loop for loop in kernel.loops() if loop.start in way):
            body = kernel.at(place for place in way if place in loop)
            found.append(one.trips(number, Counter(instruction.op for instruction in body)))
            for pipe, count in sass_pipes.total(body, capability, found[-1] - 1).items():
                use[pipe] += count
        if all(trips == 1 for trips in found):
            return None
    scale = one.passes / one.variant.elements
    return sass_pipes.rounded(Counter({pipe: scale * count for pipe, count in use.items()}))


def cuda_kernels(capability: str) -> Iterator[tuple[str, float, Use]]:
    """(case, bytes, passes an element) of the CUDA C++ kernels that tests/test_cuda_build.py counts."""
    stored = json.loads((BUDGETS / f"cuda_sm{capability.replace('.', '')}.json").read_text())
    for case in cases.cases(cases.DTYPES):
        kind = f"{_TYPES[case.dtype]}-{case.noise}" + "-stochastic" * (case.rounding == "stochastic")
        label = f"{kind}-fill" if case.op == "noise_fill" else f"{kind}-1"
        if case.op == "add_noise" and (case.terms > 1 or case.states or case.decay):  # the kernel for any number
            label = f"{kind}-any"
        if case.op not in ("noise_fill", "add_noise") or label not in stored:
            continue
        use = Counter(stored[label]["pipes"])
        if label.endswith("any"):
            for part, count in (("term", case.terms), ("state", case.states)):
                for pipe, passes in stored[f"{label}-{part}"]["pipes"].items():
                    use[pipe] += count * passes
            use.update({"issue": case.decay, "fma": case.decay})  # one product
        yield case.name, case.bytes(1), sass_pipes.rounded(use)
    if capability == "9.0":
        stored = json.loads((BUDGETS / "cuda_updates_sm90.json").read_text())
        for name, label in _CUDA_UPDATES.items():
            moved = update_cases.UPDATES[name].bytes("bf16", 1 << 20) / (1 << 20)
            yield f"{name}/bf16", moved, stored[f"{label}-BFloat16"]["pipes"]


def predict(capability: str, main_only: bool = False) -> dict[str, Any]:
    """The whole file for cards of this compute capability; ``main_only`` compiles one term in place and the noise."""
    import triton

    main = {case.name for case in cases.cases(cases.DTYPES) if is_main(case)}
    triton_counted = [
        (one.case, "triton", one.bytes, triton_use(one, capability))
        for one in triton_kernels()
        if one.case in main or not main_only
    ]
    left_out = [case for case, _, _, use in triton_counted if use is None]
    counted = [kernel for kernel in triton_counted if kernel[-1] is not None]
    counted += [(case, "cuda", moved, use) for case, moved, use in cuda_kernels(capability)]
    cards = {name: card for name, card in CARDS.items() if card["capability"] == capability}
    kernels = [
        {
            "case": case,
            "backend": backend,
            "bytes": moved,
            "pipes": use,
            "cards": {card: prediction(card, use, moved) for card in cards},
        }
        for case, backend, moved, use in counted
    ]
    rates = {"copy": COPY, "lanes_per_clock": sass_pipes.RATES[capability]}
    return {
        "capability": capability,
        "triton": triton.__version__,
        "cards": cards,
        **rates,
        "left_out": left_out,
        "kernels": kernels,
    }


def main() -> int:
    """Write the predictions asked for."""
    p = argparse.ArgumentParser(prog="python -m bench.predict", description=__doc__.split("\n\n")[0])
    p.add_argument("--capability", choices=CAPABILITIES, nargs="+", default=list(CAPABILITIES))
    p.add_argument("--main-only", action="store_true", help="one term in place and the noise alone: a minute a card")
    args = p.parse_args()
    for capability in args.capability:
        figure.write(path(capability), predict(capability, args.main_only))
        say(f"predictions: {path(capability)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
