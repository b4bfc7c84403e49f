"""``python -m bench.gpu.parts PART --seconds N --out FILE``: one part of the check, in a process of its own.

The file is an object of rows (bench.rows), checks (bench.gpu.check), ``left_out`` (what did not fit, and why) and
``facts``; it is written anew whenever there is more to tell, so a process that is stopped has told what it knew.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import cases, figure, kernels, large, rows, updates, workload
from bench.environment import describe
from bench.gpu import safety, sync
from bench.gpu.check import Check
from zoengine import ops

SIZE = 1 << 28  # elements of all kernel cases
OTHER_SIZES = (1 << 26, 1 << 30, 1 << 32)  # of the main ones
ROUNDS = 3
MODELS = ("opt-1.3b", "llama-3.1-8b", "llama-3.2-1b")
_MARGIN = 8  # seconds before the end after which nothing is begun


class Part:
    """What a part knows so far. ``until`` is when the last thing may begin, by ``time.monotonic``."""

    def __init__(self, device: torch.device, out: Path, seconds: float, commit: str | None = None) -> None:
        self.device, self.out, self.until = device, out, time.monotonic() + seconds - _MARGIN
        self.environment = describe(device, commit)
        self.backends = kernels.fast_backends(device)
        self.rows: list[rows.Row] = []
        self.checks: list[Check] = []
        self.left_out: list[str] = []
        self.facts: dict[str, Any] = {}

    @property
    def over(self) -> bool:
        """Whether nothing more may begin."""
        return time.monotonic() >= self.until

    def write(self, more: list[rows.Row] | None = None) -> None:
        """Write the file, with ``more`` rows than the part has so far."""
        found = {"rows": self.rows + (more or []), "checks": self.checks}
        figure.write(self.out, {**found, "left_out": self.left_out, "facts": self.facts})


def probe(part: Part) -> None:
    """Which backends there are, and why not."""
    for name, backend in ops.backends().items():
        part.facts[name] = "available" if backend.available else backend.reason


def kernel_rows(part: Part) -> None:
    """All kernel cases at one size, bf16 first, and the main ones at others."""
    for dtype in ("bf16", "fp32", "fp16"):
        if part.over:
            part.left_out.append(f"kernels in {dtype}: no time left")
            continue
        part.rows += kernels.measure(
            part.device, part.environment, dtypes=[dtype], elements=SIZE, rounds=ROUNDS, save=part.write
        )
        if dtype == "bf16":
            _other_sizes(part)


def _other_sizes(part: Part) -> None:
    for elements in OTHER_SIZES:
        words = f"kernels on {elements:,} elements"
        if part.over:
            part.left_out.append(f"{words}: no time left")
        elif elements * 12 > free_bytes(part.device):  # x, a copy, today's temporary, and room
            part.left_out.append(f"{words}: they do not fit into memory")
        else:
            found = kernels.measure(
                part.device, part.environment, dtypes=["bf16"], elements=elements, rounds=ROUNDS, only=cases.is_main
            )
            part.rows += [{**row, "case": f"{row['case']}@{elements}"} for row in found]
            part.write()


def update_rows(part: Part) -> None:
    """All update cases, bf16 first."""
    for dtype in ("bf16", "fp32"):
        if part.over:
            part.left_out.append(f"updates in {dtype}: no time left")
            continue
        part.rows += updates.measure(part.device, part.environment, dtypes=[dtype], rounds=ROUNDS, save=part.write)


def step_rows(part: Part, models: tuple[str, ...] = MODELS) -> None:
    """The whole step of models of random weights, in bf16."""
    for name in models:
        if part.over:
            part.left_out.append(f"{name}: no time left")
            continue
        try:
            model = workload.load_model(name, "bf16", part.device, real=False)
        except torch.OutOfMemoryError:
            part.left_out.append(f"{name}: its weights do not fit into memory")
            continue
        part.rows += large.measure(
            model, name, part.environment, until=part.until, save=part.write, left_out=part.left_out.append
        )
        del model
        gc.collect()
        torch.cuda.empty_cache()


def sync_checks(part: Part) -> None:
    """bench.gpu.sync, with an empty folder for what Triton compiles."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        for check in sync.run(part.device, part.backends, Path(folder)):
            part.checks.append(check)
            part.write()
            if part.over:
                part.left_out.append("the rest of the synchronisation checks: no time left")
                return


def safety_checks(part: Part) -> None:
    """bench.gpu.safety: launches, then large arenas, then the sanitizer."""
    part.checks += safety.launches(part.device, part.backends)
    part.write()
    fit, rest = safety.arena_sizes(free_bytes(part.device))
    part.left_out += [f"an arena of {size:,} elements: it does not fit into memory" for size in rest]
    for size in fit:
        if part.over:
            part.left_out.append(f"an arena of {size:,} elements: no time left")
            continue
        part.checks += safety.large(part.device, part.backends, size)
        part.write()
    for found in safety.sanitized(part.backends, part.until, {}):
        part.left_out.append(found) if isinstance(found, str) else part.checks.append(found)
        part.write()


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
