"""``python -m bench.loren_figure``: the error of gradient estimates with and without leave-one-out, and LOREN's.

After Figure 1a of "Low-Rank Curvature for Zeroth-Order Optimization in LLM Fine-Tuning": Sphere, Rastrigin and
Rosenbrock in 1,000 dimensions, four perturbations per estimate, many estimates at one point. The error is

    E ||g - grad f||^2 / ||grad f||^2 ,

with the true gradient, also for LOREN, whose estimates are of a preconditioned one. The paper names neither the point
nor zo_eps; here the point is standard normal and zo_eps is varied.

An estimate g is what one step of the optimizer with lr = 1 takes away from the weights.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import figure
from bench.environment import ROOT
from bench.progress import say
from zoengine import LOREN, MeZO, ZOOptimizer

SHAPE = (25, 40)  # 1,000 parameters as the matrix that LOREN needs
POINT_SEED, RUN_SEED = 7, 1
EPS = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
DRAWS, QUICK_DRAWS = 1000, 150
LEARNING_STEPS, LEARNING_RATE = 500, 1e-3


def sphere(x: Tensor) -> Tensor:
    """sum x^2"""
    return x.square().sum()


def rastrigin(x: Tensor) -> Tensor:
    """10 d + sum (x^2 - 10 cos 2 pi x)"""
    return 10 * x.numel() + (x.square() - 10 * torch.cos(2 * math.pi * x)).sum()


def rosenbrock(x: Tensor) -> Tensor:
    """sum 100 (x_{i+1} - x_i^2)^2 + (1 - x_i)^2"""
    return (100 * (x[1:] - x[:-1].square()).square() + (1 - x[:-1]).square()).sum()


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"Sphere": sphere, "Rastrigin": rastrigin, "Rosenbrock": rosenbrock}

_LOREN = {"n_queries": 4, "beta1": 0.0, "damping": 0.1, "loren_adv_a": "standardised"}
# name: optimizer, fields, whether LOREN's vector is learned first
ESTIMATORS: dict[str, tuple[type[ZOOptimizer], dict[str, Any], bool]] = {
    "two-sided, 2 directions": (MeZO, {"n_queries": 2}, False),
    "one-sided, 3 directions": (MeZO, {"n_queries": 3, "two_sided": False}, False),
    "one-sided, 4 directions": (MeZO, {"n_queries": 4, "two_sided": False}, False),
    "leave-one-out, 4 directions": (MeZO, {"n_queries": 4, "two_sided": False, "weighting": "rloo"}, False),
    "LOREN, vector as drawn": (LOREN, _LOREN, False),
    "LOREN, vector learned": (LOREN, _LOREN, True),
}


def point() -> Tensor:
    """Where the gradient is estimated: standard normal, fp32 of shape ``SHAPE``."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(POINT_SEED))


def gradient(name: str, x: Tensor) -> Tensor:
    """The true gradient of a function, float64 of ``x``'s shape."""
    x = x.double().requires_grad_()
    return torch.autograd.grad(FUNCTIONS[name](x.reshape(-1)), x)[0]


def measure(function: str, estimator: str, eps: float, draws: int, learning_steps: int) -> dict[str, Any]:
    """A row: error (mean and standard error over ``draws`` estimates), and mean cosine to the gradient."""
    method, fields, learns = ESTIMATORS[estimator]
    x = point()
    true = gradient(function, x)
    weight = nn.Parameter(x.clone())

    def loss() -> Tensor:
        return FUNCTIONS[function](weight.double().reshape(-1))

    def build(lr: float, **more: float) -> ZOOptimizer:
        return method([weight], lr=lr, zo_eps=eps, seed=RUN_SEED, mode="shadow", **fields, **more)

    optimizer = build(1.0, **({"lr_cov": 0.0} if method is LOREN else {}))
    if learns:
        learner = build(0.0, lr_cov=LEARNING_RATE)
        for _ in range(learning_steps):
            learner.step(loss)
        learned = learner.state_dict()
        optimizer = build(1.0, lr_cov=0.0)  # the newest optimizer holds the weights
        optimizer.load_state_dict(learned)
        optimizer.param_groups[0]["lr"] = 1.0
    squares, cosines, norm = [], [], true.norm()
    for _ in range(draws):
        with torch.no_grad():
            weight.copy_(x)
        optimizer.step(loss)
        found = x.double() - weight.detach().double()
        squares.append(((found - true).norm() / norm).square())
        cosines.append((found * true).sum() / (found.norm() * norm))
    errors = torch.stack(squares)
    return {
        "function": function,
        "estimator": estimator,
        "eps": eps,
        "evaluations": method.forwards_per_step(optimizer.fields),
        "draws": draws,
        "error": float(errors.mean()),
        "standard_error": float(errors.std() / math.sqrt(draws)),
        "cosine": float(torch.stack(cosines).mean()),
    }


def limits() -> dict[str, float]:
    """The errors for zo_eps -> 0 and normal directions, exact.

    The mean of (grad . u) u over q directions has error (d + 1) / q. Leave-one-out over K is the sample covariance of
    the u_k, with K - 1 degrees of freedom, times the gradient: (d + 1) / (K - 1).
    """
    d = math.prod(SHAPE)
    return {
        "two-sided, 2 directions": (d + 1) / 2,
        "one-sided, 3 directions": (d + 1) / 3,
        "one-sided, 4 directions": (d + 1) / 4,
        "leave-one-out, 4 directions": (d + 1) / 3,
    }


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel per function: the error over zo_eps, and the limits as dotted lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(12, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(picture)
    for axes, function in zip(picture.subplots(1, len(FUNCTIONS)), FUNCTIONS, strict=True):
        for k, estimator in enumerate(ESTIMATORS):
            inside = sorted(
                (r for r in rows if (r["function"], r["estimator"]) == (function, estimator)), key=lambda r: r["eps"]
            )
            bars = [2 * r["standard_error"] for r in inside]
            axes.errorbar(
                [r["eps"] for r in inside], [r["error"] for r in inside], bars, label=estimator, color=f"C{k}",
                marker="osP^Dv"[k], markersize=4, linewidth=1.2, linestyle="--" if "LOREN" in estimator else "-",
            )  # fmt: skip
            if estimator in limits():
                axes.axhline(limits()[estimator], color=f"C{k}", linestyle=":", linewidth=0.9)
        axes.set_title(function)
        axes.set_xlabel("zo_eps")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(color="#e5e5e5", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    picture.axes[0].set_ylabel("mean squared error / squared gradient")
    picture.axes[0].legend(frameon=False, fontsize="small")
    picture.savefig(path)


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the rows as they come, draw. Returns the exit status."""
    p = argparse.ArgumentParser(prog="python -m bench.loren_figure", description="Error of gradient estimates.")
    p.add_argument("--draws", type=int, default=DRAWS, help="estimates per point of the figure")
    p.add_argument("--quick", action="store_true", help=f"{QUICK_DRAWS} draws at one zo_eps, in this process")
    p.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    p.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "loren-estimates.json")
    args = p.parse_args(arguments)
    if args.quick:
        args.draws, args.jobs = QUICK_DRAWS, 1
    learning_steps = 20 if args.quick else LEARNING_STEPS
    result = figure.header("loren_figure", arguments)
    result |= {"shape": list(SHAPE), "limits": limits(), "learning_steps": learning_steps, "rows": []}
    tasks = [
        (function, estimator, eps, args.draws, learning_steps)
        for function in FUNCTIONS
        for eps in (EPS[:1] if args.quick else EPS)
        for estimator in ESTIMATORS
    ]
    rows: dict[int, dict[str, Any]] = {}
    for k, row in figure.run(tasks, measure, args.jobs):
        rows[k] = row
        result["rows"] = [rows[k] for k in sorted(rows)]
        figure.write(args.out, result)
    plot(result["rows"], args.out.with_suffix(".png"))
    say(f"{args.out}, {args.out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
