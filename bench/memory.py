"""The memory of training: what the engine allocates, and what a step adds to the peak of a forward.

Every contestant runs in a process of its own (``python -m bench.memory``), because the peak of a process includes what
ran in it before. There, one forward is run, the peak is reset, the optimizer is built, two steps are taken, and the
highest memory since is compared with that of the forward: resident memory on a CPU, torch's allocations on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench import baselines, cases, rows
from bench.environment import ROOT
from bench.progress import Progress, say
from bench.step import CONTESTANTS, EPS, LR
from bench.workload import MODELS, Task, load_model
from zoengine import methods
from zoengine.methods import ZOOptimizer

BATCH, TOKENS = 1, 16  # little, so that activations do not hide a temporary of the size of a weight matrix
_TODAY = "today"


def measure(
    device: torch.device,
    environment: dict[str, Any],
    *,
    dtypes: Sequence[str] | None = None,
    model_name: str = "smollm2-135m",
    save: Callable[[list[rows.Row]], None] = lambda found: None,
) -> list[rows.Row]:
    """Rows of today's loop and every contestant for each dtype (default fp32 and bf16). ``save`` gets all rows so far.

    Raises:
        RuntimeError: a child process failed; carries its last words.
    """
    contestants = [
        (dtype, method, mode) for dtype in dtypes or ("fp32", "bf16") for method, mode in ((_TODAY, None), *CONTESTANTS)
    ]
    say(f"memory of a step of {model_name}: {len(contestants)} processes, two at a time, about 10 s each")
    progress, found = Progress(len(contestants)), []
    with ThreadPoolExecutor(max_workers=2) as pool:
        results = pool.map(lambda c: _in_child(device, model_name, *c), contestants)
        for (dtype, method, mode), measures in zip(contestants, results, strict=True):
            case = f"memory/{model_name}/{dtype}/{method}" + (f"/{mode}" if mode else "")
            options = {
                "model": model_name, "dtype": dtype, "method": method, "mode": mode, "batch": BATCH, "tokens": TOKENS
            }  # fmt: skip
            found.append(rows.make("memory", case, options, measures, environment))
            progress.advance(1, case)
            save(found)
    progress.finish()
    return found


def engine_bytes(optimizer: ZOOptimizer, weight_bytes: int) -> dict[str, float]:
    """What ``optimizer`` holds: its arena (the weights, padded), states and the copies of its mode."""
    arena = optimizer.arena.nbytes
    states = sum(buffer.nbytes for buffers in optimizer.states.values() for buffer in buffers)
    copies = sum(copy.nbytes for copy in getattr(optimizer._mode, "_copies", ()))
    return {
        "arena_bytes": arena,
        "state_bytes": states,
        "copy_bytes": copies,
        "added_percent": 100 * (arena + states + copies - weight_bytes) / weight_bytes,
    }


def _in_child(device: torch.device, model_name: str, dtype: str, method: str, mode: str | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.memory", model_name, dtype, device.type, method, mode or "-"]
    # Without this, glibc keeps freed blocks of up to 32 MiB, and what a step needs is not what it shows.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed: {child.stderr.strip()[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def _child(model_name: str, dtype: str, device: torch.device, method: str, mode: str) -> dict[str, Any]:
    model = load_model(model_name, dtype, device, real=False)
    weight_bytes = sum(p.nbytes for p in model.parameters())
    closure = Task(model, BATCH, TOKENS).loss
    with torch.no_grad():
        closure()
        _reset_peak(device)
        closure()
    forward_peak = _peak(device)
    _reset_peak(device)
    held: dict[str, float | None] = dict.fromkeys(("arena_bytes", "state_bytes", "copy_bytes", "added_percent"))
    if method == _TODAY:
        parameters = list(model.parameters())
        for seed in (1, 2):
            baselines.mezo_step(parameters, closure, seed, lr=LR, eps=EPS)
    else:
        optimizer = methods.create(method, model, lr=LR, zo_eps=EPS, mode=mode)
        held = engine_bytes(optimizer, weight_bytes)
        _reset_peak(device)  # what building takes for a moment is a matter of one parameter
        for _ in range(2):
            optimizer.step(closure)
    growth = _peak(device) - forward_peak
    return {
        "weight_bytes": weight_bytes,
        **held,
        "peak_growth_bytes": growth,
        "peak_growth_percent": 100 * growth / weight_bytes,
    }


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM; peak memory can be measured on Linux only")


def _main() -> None:
    p = argparse.ArgumentParser(prog="python -m bench.memory", description="One contestant; prints its measures.")
    p.add_argument("model", choices=tuple(MODELS))
    p.add_argument("dtype", choices=tuple(cases.DTYPES))
    p.add_argument("device", type=torch.device)
    p.add_argument("method")
    p.add_argument("mode")
    args = p.parse_args()
    sys.stdout.write(json.dumps(_child(args.model, args.dtype, args.device, args.method, args.mode)) + "\n")


if __name__ == "__main__":
    _main()
