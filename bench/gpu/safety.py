"""The same bits from a thousand launches, arenas beyond 2^32 elements, and the sanitizer on small data.

``python -m bench.gpu.safety BACKEND`` runs every op once on small data: what compute-sanitizer watches.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.gpu.calls import Call, calls
from bench.gpu.check import Check, attempt, make, same
from zoengine import ops

PART = "safety"
LAUNCHES = 1000
TOOLS = ("memcheck", "racecheck")
WINDOW = 70_000  # elements compared at a place in a large arena
_FAILED = 9  # exit status that compute-sanitizer is told to give
_OPTIONS = {"memcheck": ("--report-api-errors", "no")}  # torch probes the driver with calls that fail


def launches(device: torch.device, backends: list[str], count: int = LAUNCHES) -> Iterator[Check]:
    """``count`` launches of every op from the same inputs give the same bits."""
    for backend in backends:
        with ops.use(backend):
            for call in calls("bf16", device):
                what = f"{call.name}, bf16, {backend}"
                yield attempt(PART, f"{count:,} launches, same bits", what, lambda c=call: stable(c, count))


def stable(call: Call, count: int) -> tuple[bool, str]:
    """(whether all launches agree with the first, how many do not)."""
    first = [tensor.clone() for tensor in call.run()]
    differ = torch.zeros((), dtype=torch.int64, device=first[0].device)
    for _ in range(count - 1):
        agree = torch.stack([same(a, b) for a, b in zip(call.run(), first, strict=True)]).all()
        differ += ~agree
    return int(differ) == 0, f"{int(differ)} of {count} differ" if int(differ) else ""


def arena_sizes(free_bytes: int) -> tuple[list[int], list[int]]:
    """(sizes above 2^31 and 2^32 elements that fit, those that do not): a bf16 arena, an fp32 state and a spare."""
    sizes = [2**31 + 2**20, 2**32 + 2**20]
    fit = [size for size in sizes if size * 8 <= 0.9 * free_bytes]
    return fit, [size for size in sizes if size not in fit]


def large(device: torch.device, backends: list[str], elements: int) -> Iterator[Check]:
    """Ops on an arena of ``elements``: the beginning, what lies around 2^31 and 2^32, and the end have right bits."""
    for backend in backends:
        with ops.use(backend):
            for name, function in LARGE.items():
                what = f"{name}, {elements:,} elements, {backend}"
                yield attempt(PART, "large arenas", what, lambda f=function: f(device, elements))
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def windows(elements: int) -> list[slice]:
    """Where a large arena is looked at: multiples of 1024, so that tiles are whole."""
    starts = [0, 2**31 - WINDOW // 2, 2**32 - WINDOW // 2, elements - WINDOW]
    inside = sorted({max(0, start) // 1024 * 1024 for start in starts if start + WINDOW <= elements})
    return [slice(start, start + WINDOW) for start in inside]


def _compare(actual: Tensor, expected: Tensor, at: slice) -> list[int]:
    """The start of ``at`` if the bits there differ."""
    return [] if bool(same(actual.cpu(), expected)) else [at.start]


def _verdict(wrong: list[int]) -> tuple[bool, str]:
    return not wrong, f"other bits from element {wrong[0]:,}" if wrong else ""


def _bf16(device: torch.device, elements: int) -> Tensor:
    return torch.zeros(elements, dtype=torch.bfloat16, device=device)


def _add_noise(device: torch.device, elements: int) -> tuple[bool, str]:
    x = _bf16(device, elements)
    ops.add_noise_(x, 5, 0.5, rounding="stochastic", sr_seed=6)
    wrong = []
    for at in windows(elements):
        expected = torch.zeros(WINDOW, dtype=torch.bfloat16)
        with ops.use("reference"):
            ops.add_noise_(expected, 5, 0.5, rounding="stochastic", sr_seed=6, offset=at.start)
        wrong += _compare(x[at], expected, at)
    return _verdict(wrong)


def _noise_fill(device: torch.device, elements: int) -> tuple[bool, str]:
    x = _bf16(device, elements)
    wrong = []
    for noise in ("gaussian", "rademacher"):
        ops.noise_fill_(x, 5, noise=noise)
        for at in windows(elements):
            with ops.use("reference"):
                expected = ops.noise_fill(WINDOW, 5, offset=at.start, noise=noise, dtype=torch.bfloat16)
            wrong += _compare(x[at], expected, at)
    return _verdict(wrong)


def _fold(device: torch.device, elements: int) -> tuple[bool, str]:
    x, state = _bf16(device, elements), torch.zeros(elements, device=device)
    ops.state_fold_(state, 5, 0.5, keep=0.5, x=x, x_keep=0.5, x_coeffs=[0.1, 0.0, -1.0])
    wrong = []
    for at in windows(elements):
        small, m = torch.zeros(WINDOW, dtype=torch.bfloat16), torch.zeros(WINDOW)
        with ops.use("reference"):
            ops.state_fold_(m, 5, 0.5, keep=0.5, x=small, x_keep=0.5, x_coeffs=[0.1, 0.0, -1.0], offset=at.start)
        wrong += _compare(x[at], small, at) + _compare(state[at], m, at)
    return _verdict(wrong)


def _sign(device: torch.device, elements: int) -> tuple[bool, str]:
    x = _bf16(device, elements)
    ops.rule_step_(x, "sign", [], 5, 0.5, {"step": -0.25})
    wrong = []
    for at in windows(elements):
        small = torch.zeros(WINDOW, dtype=torch.bfloat16)
        with ops.use("reference"):
            ops.rule_step_(small, "sign", [], 5, 0.5, {"step": -0.25}, offset=at.start)
        wrong += _compare(x[at], small, at)
    return _verdict(wrong)


def _segments(device: torch.device, elements: int) -> tuple[bool, str]:
    x = _bf16(device, elements)
    ops.noise_fill_(x, 7)
    starts = [at.start for at in windows(elements)]
    lengths = [WINDOW] * len(starts)
    on_device = [torch.tensor(values, device=device) for values in (starts, lengths)]
    found = (ops.segment_stats(x, *on_device), ops.segment_dot(x, *on_device, seed=9))
    wrong = []
    for k, at in enumerate(windows(elements)):
        small, alone = x[at].cpu(), (torch.tensor([0]), torch.tensor([WINDOW]))
        with ops.use("reference"):
            expected = (ops.segment_stats(small, *alone), ops.segment_dot(small, *alone, seed=9, offset=at.start))
        for actual, wanted in zip(found, expected, strict=True):
            wrong += _compare(actual[k : k + 1], wanted, at)
    return _verdict(wrong)


def _matrices(device: torch.device, elements: int) -> tuple[bool, str]:
    x = _bf16(device, elements)
    starts, shape = [at.start for at in windows(elements)], (64, 1040)
    wrong = []
    table = ops.Matrices.for_kron(starts, [shape] * len(starts), device)
    a = torch.full((table.sizes[0],), 0.02)
    ops.kron_rows_(x, a.to(device), torch.full((len(starts),), 0.3, device=device), table, 5, 0.5)
    for at in windows(elements):
        small, one = torch.zeros(WINDOW, dtype=torch.bfloat16), ops.Matrices.for_kron([0], [shape])
        with ops.use("reference"):
            ops.kron_rows_(small, a[: shape[1]], torch.tensor([0.3]), one, 5, 0.5, offset=at.start)
        wrong += _compare(x[at], small, at)
    x.zero_()
    table = ops.Matrices.for_lowrank(starts, [shape] * len(starts), 2, device)
    left, right = (torch.full((size,), 0.1, device=device) for size in table.sizes)
    ops.lowrank_add_(x, left, right, table, 0.5, rank=2)
    for at in windows(elements):
        small, one = torch.zeros(WINDOW, dtype=torch.bfloat16), ops.Matrices.for_lowrank([0], [shape], 2)
        with ops.use("reference"):
            sides = (torch.full((size,), 0.1) for size in one.sizes)
            ops.lowrank_add_(small, *sides, one, 0.5, rank=2, offset=at.start)
        wrong += _compare(x[at], small, at)
    return _verdict(wrong)


LARGE = {
    "add_noise_": _add_noise,
    "noise_fill_": _noise_fill,
    "state_fold_": _fold,
    "rule_step_ sign": _sign,
    "segment_stats, segment_dot": _segments,
    "kron_rows_, lowrank_add_": _matrices,
}


def sanitized(backends: list[str], until: float) -> Iterator[Check | str]:
    """compute-sanitizer's memcheck and racecheck over every op of each backend; a string is a reason to leave one out.

    A tool that refuses the device, as it does in some sandboxes, has checked nothing: that is left out, not failed.
    """
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        yield "compute-sanitizer is not installed"
        return
    for tool in TOOLS:
        for backend in backends:
            left = until - time.monotonic()
            if left < 10:
                yield f"compute-sanitizer {tool}, {backend}: no time left"
                continue
            command = [program, "--tool", tool, "--error-exitcode", str(_FAILED), *_OPTIONS.get(tool, ())]
            found = _run([*command, sys.executable, "-m", __spec__.name, backend], left)
            if found is None:
                yield f"compute-sanitizer {tool}, {backend}: not done after {left:.0f} s"
            else:
                yield judged(tool, backend, *found)


def _run(command: list[str], seconds: float) -> tuple[int, str] | None:
    """Exit status and output of a command, or None where it was ended, with its children, after ``seconds``."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # in a shared block, no access is out of bounds
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            status = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            return None
        output.seek(0)
        return status, output.read()


def judged(tool: str, backend: str, status: int, output: str) -> Check | str:
    """What a run of compute-sanitizer says: a check, or why it checked nothing."""
    lines = [line for line in output.splitlines() if line.strip()]
    if "Device not supported" in output or "Unable to find" in output:
        return f"compute-sanitizer {tool}, {backend}: it does not support this device"
    if status not in (0, _FAILED):
        return make(PART, tool, f"every op, {backend}", False, f"exit status {status}: {' '.join(lines[-3:])[-300:]}")
    summary = next((line.strip("= ") for line in reversed(lines) if "SUMMARY" in line), "no summary")
    return make(PART, tool, f"every op, {backend}", status == 0, summary[:300])


def main(arguments: list[str]) -> int:
    """Run every op of one backend once on the GPU."""
    with ops.use(arguments[0]):
        for dtype in ("bf16", "fp32"):
            for call in calls(dtype, torch.device("cuda")):
                call.run()
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
