"""``python -m bench.gpu.parts PART --seconds N --out FILE``: one part of the check, in a process of its own.

The file is an object of rows (bench.rows), checks (bench.gpu.check), ``left_out`` (what did not fit, and why) and
``facts``; it is written anew whenever there is more to tell, so a process that is stopped has told what it knew.
"""

from __future__ import annotations

import argparse
import functools
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import cases, figure, kernels, large, rows, updates, workload
from bench.environment import describe
from bench.gpu import safety, sync
from bench.gpu.check import Check, make
from zoengine import ops

SIZE = 1 << 28  # elements of all kernel cases
MAIN_SIZES = (SIZE, 1 << 26, 1 << 30, 1 << 32)  # of the main ones, which come first
ROUNDS = 3
MODELS = ("opt-1.3b", "llama-3.2-1b", "llama-3.1-8b")
_EACH_MODEL = 20  # seconds kept for each model after the one that is measured
_MARGIN = 8  # seconds before the end after which nothing is begun


class Part:
    """What a part knows so far. ``until`` is when the last thing may begin, by ``time.monotonic``."""

    def __init__(self, device: torch.device, out: Path, seconds: float, commit: str | None = None) -> None:
        self.device, self.out, self.until = device, out, time.monotonic() + seconds - _MARGIN
        self.environment = describe(device, commit)
        self.backends = kernels.fast_backends(device)
        self.rows: list[rows.Row] = []
        self._unfinished: list[rows.Row] = []
        self.checks: list[Check] = []
        self.left_out: list[str] = []
        self.facts: dict[str, Any] = {}

    @property
    def over(self) -> bool:
        """Whether nothing more may begin."""
        return time.monotonic() >= self.until

    def write(self, unfinished: list[rows.Row] | None = None) -> None:
        """Write the file. ``unfinished`` rows of a measurement under way stay in it, should that break."""
        if unfinished is not None:
            self._unfinished = list(unfinished)
        found = {"rows": self.rows + self._unfinished, "checks": self.checks}
        figure.write(self.out, {**found, "left_out": self.left_out, "facts": self.facts})

    def measure(self, words: str, function: Callable[[], list[rows.Row]]) -> None:
        """Add the rows of ``function``, unless the time is over or the device's memory does not suffice."""
        if self.over:
            self.left_out.append(f"{words}: no time left")
            return
        try:
            self.rows += function()
            self._unfinished = []
        except torch.OutOfMemoryError:
            self.left_out.append(f"{words}: not enough memory")
            self.rows, self._unfinished = self.rows + self._unfinished, []
        torch.cuda.empty_cache()
        self.write()


def probe(part: Part) -> None:
    """Which backends there are, and why not."""
    for name, backend in ops.backends().items():
        part.facts[name] = "available" if backend.available else backend.reason


def kernel_rows(part: Part) -> None:
    """The main cases in bf16 at every size, then all cases at one size, bf16 first."""
    for elements in MAIN_SIZES:
        if elements * 12 > free_bytes(part.device):  # x, a copy, today's temporary, and room
            part.left_out.append(f"kernels on {elements:,} elements: they do not fit into memory")
        else:
            part.measure(f"kernels on {elements:,} elements", functools.partial(_main_kernels, part, elements))
    for dtype in ("bf16", "fp32", "fp16"):
        part.measure(f"kernels in {dtype}", functools.partial(_other_kernels, part, dtype))


def _main_kernels(part: Part, elements: int) -> list[rows.Row]:
    found = kernels.measure(
        part.device, part.environment, dtypes=["bf16"], elements=elements, rounds=ROUNDS, only=cases.is_main
    )
    return found if elements == SIZE else [{**row, "case": f"{row['case']}@{elements}"} for row in found]


def _other_kernels(part: Part, dtype: str) -> list[rows.Row]:
    known = {row["case"] for row in part.rows}

    def fresh(found: list[rows.Row]) -> list[rows.Row]:
        return [row for row in found if row["case"] not in known]

    return fresh(
        kernels.measure(
            part.device, part.environment, dtypes=[dtype], elements=SIZE, rounds=ROUNDS,
            only=lambda case: case.name not in known, save=lambda found: part.write(fresh(found)),
        )
    )  # fmt: skip


def update_rows(part: Part) -> None:
    """All update cases, bf16 first."""
    for dtype in ("bf16", "fp32"):
        measure = functools.partial(
            updates.measure, part.device, part.environment, dtypes=[dtype], rounds=ROUNDS, save=part.write
        )
        part.measure(f"updates in {dtype}", measure)


def step_rows(part: Part, models: tuple[str, ...] = MODELS) -> None:
    """The whole step of models of random weights, in bf16, with the default backend."""
    part.facts["backend"] = ops.current(part.device)
    for k, name in enumerate(models):
        until = part.until - _EACH_MODEL * (len(models) - 1 - k)
        part.measure(name, functools.partial(_steps, part, name, until))


def _steps(part: Part, name: str, until: float) -> list[rows.Row]:
    model = workload.load_model(name, "bf16", part.device, real=False)
    found = large.measure(
        model, name, part.environment, until=until, save=part.write, left_out=part.left_out.append,
        broken=lambda reason: part.checks.append(make("step", "steps run", name, False, reason)),
    )  # fmt: skip
    del model
    gc.collect()
    return found


def sync_checks(part: Part) -> None:
    """bench.gpu.sync."""
    for check in sync.run(part.device, part.backends):
        part.checks.append(check)
        part.write()
        if part.over:
            part.left_out.append("the rest of the synchronisation checks: no time left")
            return


def safety_checks(part: Part) -> None:
    """bench.gpu.safety: launches, then large arenas, then the sanitizer."""
    _collect(part, safety.launches(part.device, part.backends), f"{safety.LAUNCHES:,} launches")
    fit, rest = safety.arena_sizes(free_bytes(part.device))
    part.left_out += [f"an arena of {size:,} elements: it does not fit into memory" for size in rest]
    for size in fit:
        _collect(part, safety.large(part.device, part.backends, size), f"an arena of {size:,} elements")
    _collect(part, safety.sanitized(part.backends, part.until), "compute-sanitizer")


def _collect(part: Part, found: Iterator[Check | str], words: str) -> None:
    """Checks, and strings that say what was left out, as long as there is time."""
    while not part.over:
        one = next(found, None)
        if one is None:
            return
        part.left_out.append(one) if isinstance(one, str) else part.checks.append(one)
        part.write()
    part.left_out.append(f"{words}: the rest, no time left")


def free_bytes(device: torch.device) -> int:
    """Memory of the GPU that nobody uses."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


PARTS: dict[str, Callable[[Part], None]] = {
    "probe": probe,
    "kernels": kernel_rows,
    "updates": update_rows,
    "step": step_rows,
    "sync": sync_checks,
    "safety": safety_checks,
}


def main() -> int:
    """Run one part on the GPU."""
    p = argparse.ArgumentParser(prog="python -m bench.gpu.parts", description="One part of bench.gpu_check.")
    p.add_argument("part", choices=tuple(PARTS))
    p.add_argument("--seconds", type=float, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--commit")
    args = p.parse_args()
    part = Part(torch.device("cuda"), args.out, args.seconds, args.commit)
    try:
        PARTS[args.part](part)
    finally:
        part.write()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
