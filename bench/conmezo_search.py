"""``python -m bench.conmezo_search``: which hyperparameters of ConMeZO are best on the quadratic, by halving a grid.

Every candidate runs an eighth of the steps, the best tenth (at least four) half, the best three all. The seed is none
of those that bench.conmezo_synthetic compares with; its ``SETTINGS`` hold what this found.
"""

from __future__ import annotations

import argparse
import itertools
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench import figure
from bench.environment import ROOT
from bench.progress import say
from bench.quadratic import Quadratic, Run

SEED = 100
PROBLEM = Quadratic(1.0, 1e3)
# The paper's grid of appendix C.1, and a finer one around its best points.
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "decade": {
        "lr": (1.0, 1e-1, 1e-2, 1e-3, 1e-4),
        "cone_beta": (0.8, 0.9, 0.95, 0.99),
        "cone_theta": (1.2, 1.3, 1.4, 1.5),
    },
    "fine": {
        "lr": (1e-3, 1.4e-3, 2e-3, 2.8e-3, 4e-3),
        "cone_beta": (0.95, 0.99),
        "cone_theta": (1.4, 1.5),
    },
}


def candidates(grid: str) -> list[dict[str, float]]:
    """Every point of a grid as the optimizer's fields."""
    return [dict(zip(GRIDS[grid], values, strict=True)) for values in itertools.product(*GRIDS[grid].values())]


def final(fields: dict[str, float], steps: int) -> float:
    """The loss after ``steps`` steps."""
    torch.set_num_threads(1)
    return Run(PROBLEM, SEED, fields, max(1, min(50, steps))).until(steps)


def search(name: str, steps: int, pool: ProcessPoolExecutor) -> list[dict[str, Any]]:
    """Everything that was tried: fields, steps and loss, the best of the full length first."""
    alive, tried = candidates(name), []
    for fraction, keep in ((8, max(4, len(alive) // 10)), (2, 3), (1, 1)):
        length = steps // fraction
        losses = list(pool.map(final, alive, [length] * len(alive)))
        ranked = sorted(zip(losses, range(len(alive)), strict=True))
        tried = [{**alive[k], "steps": length, "loss": loss} for loss, k in ranked] + tried
        say(f"{name}, {length} steps: " + "; ".join(f"{alive[k]} {loss:.5g}" for loss, k in ranked[:4]))
        alive = [alive[k] for _, k in ranked[:keep]]
    return tried


def main(arguments: list[str] | None = None) -> int:
    """Search, and write what was tried. Returns the exit status."""
    p = argparse.ArgumentParser(prog="python -m bench.conmezo_search", description=__doc__.split("\n\n")[0])
    p.add_argument("--steps", type=int, default=10_000, help="as the authors' script tunes")
    p.add_argument("--search", choices=tuple(GRIDS), nargs="+", default=list(GRIDS))
    p.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    p.add_argument("--out", type=Path, default=ROOT / "bench" / "results", metavar="FOLDER")
    args = p.parse_args(arguments)
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        for name in args.search:
            result = figure.header("conmezo_search", arguments)
            result |= {"search": name, "seed": SEED, "steps": args.steps, "tried": search(name, args.steps, pool)}
            figure.write(args.out / f"conmezo-search-{name}.json", result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
