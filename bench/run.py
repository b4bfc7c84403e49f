"""``python -m bench.run``: measure, write rows, print the table.

Parts: kernels (bench.kernels), updates (bench.updates), step (bench.step), memory (bench.memory), drift (bench.drift).
Without ``--part`` all but the drift run. On a machine with a GPU they are measured there; ``--device cpu`` asks for the
CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from bench import cases, drift, kernels, memory, rows, step, table, updates, workload
from bench.environment import ROOT, describe
from bench.progress import say

PARTS = ("kernels", "updates", "step", "memory", "drift")
_SUFFIXES = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


def size(text: str) -> int:
    """``"64Mi"`` as a number of elements; plain integers and the suffixes Ki, Mi, Gi.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    factor = next((f for suffix, f in _SUFFIXES.items() if text.endswith(suffix)), 1)
    digits = text[:-2] if factor > 1 else text
    if not digits.isdigit() or int(digits) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give elements, such as 65536, 64Ki or 64Mi")
    return int(digits) * factor


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.split("\n\n")[0])
    p.add_argument("--part", choices=PARTS, nargs="+", default=["kernels", "updates", "step", "memory"])
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees one")
    p.add_argument("--dtype", choices=tuple(cases.DTYPES), nargs="+", help="default: all; step: those fast here")
    p.add_argument("--out", type=Path, help="results file; default: bench/results/DEVICE.json")
    p.add_argument("--commit", help="commit to write into the rows, where there is no git checkout")
    p.add_argument("--plot", type=Path, metavar="PNG", help="also draw the kernels as bars of %% of the copy")
    p.add_argument("--rounds", type=int, help="measurements of each case; default: kernels 3 to 9, updates 5, step 3")
    kernel = p.add_argument_group("kernels and updates")
    kernel.add_argument(
        "--size", type=size, help="elements; default: 64Mi on a CPU, 256Mi on a GPU; updates 16Mi, 128Mi"
    )
    kernel.add_argument("--backends", nargs="+", help="default: all that have kernels for the device")
    model = p.add_argument_group("step and memory")
    model.add_argument("--model", choices=tuple(workload.MODELS), default="smollm2-135m")
    model.add_argument("--batch", type=int, default=16)
    model.add_argument("--tokens", type=int, default=44)
    walk = p.add_argument_group("drift")
    walk.add_argument("--drift-size", type=size, default=drift.ELEMENTS)
    walk.add_argument("--drift-steps", type=int, default=drift.STEPS)
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run the parts asked for; rows are saved after every case. Returns the exit status."""
    args = parser().parse_args(arguments)
    gpu = torch.cuda.is_available()
    if args.device == "cuda" and not gpu:
        say("--device cuda: torch sees no GPU here")
        return 2
    device = torch.device(args.device or ("cuda" if gpu else "cpu"))
    if not gpu:
        say("no GPU is visible to torch: the GPU cases are skipped")
    busy = os.getloadavg()[0]
    if busy > 0.5:
        say(f"the load average is {busy:.1f} before anything has begun: other work runs here, and timings will scatter")
    environment = describe(device, args.commit)
    out = args.out or ROOT / "bench" / "results" / f"{device.type}.json"
    done: list[rows.Row] = []

    def save(found: list[rows.Row]) -> None:
        rows.write(out, done + found)

    measure = {
        "kernels": lambda: kernels.measure(
            device, environment, dtypes=args.dtype or tuple(cases.DTYPES), elements=args.size,
            rounds=args.rounds, backends=args.backends, save=save,
        ),
        "updates": lambda: updates.measure(
            device, environment, dtypes=args.dtype, elements=args.size, rounds=args.rounds, backends=args.backends,
            save=save,
        ),
        "step": lambda: step.measure(
            device, environment, dtypes=args.dtype, model_name=args.model, batch=args.batch, tokens=args.tokens,
            rounds=args.rounds or step.DEFAULT_ROUNDS, save=save,
        ),
        "memory": lambda: memory.measure(device, environment, dtypes=args.dtype, model_name=args.model, save=save),
        "drift": lambda: drift.measure(
            device, environment, dtypes=args.dtype, elements=args.drift_size, steps=args.drift_steps, save=save
        ),
    }  # fmt: skip
    for part in dict.fromkeys(args.part):
        try:
            done += measure[part]()
        except (RuntimeError, ImportError, ValueError) as error:
            say(f"{part}: {error}")
            return 1
    rows.write(out, done)
    sys.stdout.write(table.render(done))
    if args.plot:
        from bench.plot import draw

        draw(done, args.plot)
    say(f"rows: {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
