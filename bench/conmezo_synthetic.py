"""``python -m bench.conmezo_synthetic``: how many evaluations ConMeZO saves on the quadratic of its paper.

After section 5.1, appendix C.1 and Figure 3 of "ConMeZO: Adaptive Descent-Direction Sampling for Gradient-Free
Finetuning of Large Language Models": f(x) = sum sigma_i x_i^2 in 1,000 dimensions with sigma geometric from 1/1000 to
1, ||x_0|| = 10, zo_eps = 0.01, no warm-up, 100,000 steps of two evaluations; the paper finds 2.45.

The figure of merit is

    speedup = evaluations after which MeZO first has the loss that ConMeZO has at the end / evaluations of ConMeZO ,

both from the same point; ``speedup_to_mezo`` turns it round: evaluations of MeZO over those after which ConMeZO first
has the loss that MeZO has when as many steps are over.

The comparison depends on the grid the learning rate is chosen from, so it is made in several ways, see ``SETTINGS``.
MeZO's learning rate is the best of its grid by the exact expectation (bench.quadratic.mezo_expectation), which leaves
nothing to luck; ConMeZO's hyperparameters are those that bench.conmezo_search found with another seed. How much MeZO
alone would gain from a finer grid, by the expectation, is ``mezo_tuning_alone``, with ``mezo_tuned_lr``.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import figure
from bench.environment import ROOT
from bench.progress import say
from bench.quadratic import DIMENSION, NORM, Quadratic, Run, crossing, mezo_expectation, start

STEPS, SEEDS, QUICK_STEPS = 10_000, 3, 200
_RECORDS = 200  # losses recorded within ``steps``
_PATIENCE = 4  # MeZO may take so many times the steps of ConMeZO

_PAPER, _CODE = Quadratic(1.0, 1e3), Quadratic(0.5, 1e9)
_FINE = tuple(10 ** (-3 + k / 20) for k in range(31))


@dataclass(frozen=True)
class Setting:
    """One comparison: the problem, the learning rates MeZO may choose from, and the fields of ConMeZO."""

    problem: Quadratic
    mezo_lrs: tuple[float, ...]
    conmezo: dict[str, float]


SETTINGS = {
    # The paper as it is written: both from powers of ten.
    "paper, powers of ten": Setting(
        _PAPER, (1.0, 1e-1, 1e-2, 1e-3, 1e-4), {"lr": 1e-3, "cone_beta": 0.99, "cone_theta": 1.5}
    ),
    "paper, tuned": Setting(_PAPER, _FINE, {"lr": 4e-3, "cone_beta": 0.99, "cone_theta": 1.4}),
    # What the authors' published script (synthetic-experiment/) runs by default: another quadratic, one learning rate.
    "published script": Setting(_CODE, (1e-2,), {"lr": 1e-2, "cone_beta": 0.99, "cone_theta": 1.3}),
}


def choose(setting: Setting, steps: int) -> dict[str, float]:
    """MeZO's learning rates by its exact expectation, from a start with equal components.

    Returns:
        ``mezo_lr``: of the setting's grid, with the lowest loss after ``steps`` steps. ``mezo_tuned_lr``: of a fine
        grid. ``mezo_tuning_alone``: steps over those after which the latter has the former's final loss.
    """
    x, every = torch.full((DIMENSION,), NORM / math.sqrt(DIMENSION), dtype=torch.float64), max(1, steps // _RECORDS)
    steps -= steps % every
    coarse, fine = (mezo_expectation(setting.problem, x, lrs, steps, every) for lrs in (setting.mezo_lrs, _FINE))
    best, tuned = (int(losses[:, -1].nan_to_num(nan=math.inf).argmin()) for losses in (coarse, fine))
    needed = crossing(fine[tuned].tolist(), every, float(coarse[best, -1]))
    found = {"mezo_lr": setting.mezo_lrs[best], "mezo_tuned_lr": _FINE[tuned]}
    return found | {"mezo_tuning_alone": steps / needed if needed else 1.0}


def compare(name: str, seed: int, mezo_lr: float, steps: int, expected: bool) -> dict[str, Any]:
    """One seed of one setting: both curves and both speedups; None where the other's loss was not reached.

    With ``expected`` MeZO's curve is its exact expectation from the same start, and only ConMeZO runs.
    """
    setting, every = SETTINGS[name], max(1, steps // _RECORDS)
    cone = Run(setting.problem, seed, setting.conmezo, every)
    target = cone.until(steps)
    exact = mezo_expectation(setting.problem, start(seed), [mezo_lr], _PATIENCE * steps, every)[0].tolist()
    if expected:
        losses, at_end = exact, exact[cone.steps // every]
    else:
        mezo = Run(setting.problem, seed, {"lr": mezo_lr}, every)
        at_end = mezo.until(steps)
        mezo.until(_PATIENCE * steps, below=target)
        losses = mezo.losses
    needed, turned = crossing(losses, every, target), crossing(cone.losses, every, at_end)
    return {
        "setting": name,
        "seed": seed,
        "speedup": None if needed is None else needed / cone.steps,
        "speedup_to_mezo": None if not turned else cone.steps / turned,
        "conmezo_final": target,
        "mezo_final": at_end,
        "mezo_expected_final": exact[cone.steps // every],
        "every": every,
        "conmezo": cone.losses,
        "mezo": losses,
    }


def summary(name: str, chosen: dict[str, float], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median and range over the seeds of one setting."""
    setting, row = SETTINGS[name], {"setting": name, "seeds": len(runs)}
    row |= {"factor": setting.problem.factor, "condition": setting.problem.condition}
    row |= chosen | {f"conmezo_{k}": v for k, v in setting.conmezo.items()}
    for key in ("speedup", "speedup_to_mezo", "conmezo_final", "mezo_final"):
        values = sorted(math.inf if r[key] is None else r[key] for r in runs)
        found = {key: statistics.median(values), f"{key}_min": values[0], f"{key}_max": values[-1]}
        row |= {k: v if math.isfinite(v) else None for k, v in found.items()}
    row["mezo_over_expected"] = statistics.fmean(r["mezo_final"] / r["mezo_expected_final"] for r in runs)
    return row


def plot(result: dict[str, Any], path: Path) -> None:
    """One panel per setting: every seed's losses over evaluations."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(11.5, 3.8), dpi=130, layout="constrained")
    FigureCanvasAgg(picture)
    summaries = result["summary"]
    for axes, row in zip(picture.subplots(1, len(summaries), squeeze=False)[0], summaries, strict=True):
        runs = [r for r in result["runs"] if r["setting"] == row["setting"]]
        for method, colour in (("mezo", "#4c72b0"), ("conmezo", "#c8551b")):
            lr = row[f"{method}_lr"]
            for k, run in enumerate(runs):
                evaluations = [2 * run["every"] * i for i in range(len(run[method]))]
                label = f"{'MeZO' if method == 'mezo' else 'ConMeZO'}, lr {lr:.2g}" if k == 0 else None
                axes.plot(evaluations, run[method], color=colour, linewidth=1, alpha=0.8, label=label)
        speedup = "more than 4" if row["speedup"] is None else f"{row['speedup']:.2f}"
        axes.set_title(f"{row['setting']}: {speedup} times", fontsize=10)
        axes.set_yscale("log")
        axes.set_xlabel("evaluations")
        axes.legend(frameon=False, fontsize="small")
        axes.grid(color="#e5e5e5", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    picture.axes[0].set_ylabel("loss")
    picture.savefig(path)


def main(arguments: list[str] | None = None) -> int:
    """Run, write the results as they come, draw. Returns the exit status."""
    p = argparse.ArgumentParser(prog="python -m bench.conmezo_synthetic", description=__doc__.split("\n\n")[0])
    p.add_argument("--steps", type=int, default=STEPS, help="of ConMeZO; the paper's figure has 100000")
    p.add_argument("--seeds", type=int, default=SEEDS)
    p.add_argument("--settings", choices=tuple(SETTINGS), nargs="+", default=list(SETTINGS))
    p.add_argument("--expected", action="store_true", help="MeZO's exact expectation in place of its runs: much faster")
    p.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps, one seed, in this process")
    p.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    p.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "conmezo-synthetic.json")
    args = p.parse_args(arguments)
    if args.quick:
        args.steps, args.seeds, args.jobs = QUICK_STEPS, 1, 1
    chosen = {name: choose(SETTINGS[name], args.steps) for name in args.settings}
    result = figure.header("conmezo_synthetic", arguments) | {"steps": args.steps, "summary": [], "runs": []}
    tasks = [
        (name, seed, chosen[name]["mezo_lr"], args.steps, args.expected)
        for seed in range(args.seeds)
        for name in args.settings
    ]
    runs: dict[int, dict[str, Any]] = {}
    for k, run in figure.run(tasks, compare, args.jobs):
        runs[k] = run
        result["runs"] = [runs[j] for j in sorted(runs)]
        found = {name: [r for r in result["runs"] if r["setting"] == name] for name in args.settings}
        result["summary"] = [summary(name, chosen[name], members) for name, members in found.items() if members]
        figure.write(args.out, result)
    plot(result, args.out.with_suffix(".png"))
    for row in result["summary"]:
        say(f"{row['setting']}: {row['speedup']} ({row['speedup_min']} to {row['speedup_max']})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
