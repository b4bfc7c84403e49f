"""Rounding drift: how far theta wanders when nothing is learned (lr = 0), in each mode, dtype and rounding.

``inplace`` adds the perturbation to the weights, turns it round and takes it away again, and each of the three passes
rounds. With lr = 0 theta should stay put; the distance it wanders instead is what this measures. ``shadow`` never
writes theta outside of updates, so there the distance must be exactly 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench import cases, rows
from bench.progress import Progress, say
from zoengine import MeZO

ELEMENTS, STEPS = 1 << 20, 1000
WEIGHT_RMS, EPS = 0.02, 1e-3
_SHADOW_STEPS = 10  # nothing can accumulate there; enough to see that nothing moves
_EXTRAPOLATED = 10_000


def measure(
    device: torch.device,
    environment: dict[str, Any],
    *,
    dtypes: Sequence[str] | None = None,
    elements: int = ELEMENTS,
    steps: int = STEPS,
    save: Callable[[list[rows.Row]], None] = lambda found: None,
) -> list[rows.Row]:
    """Rows at 1, 10, 100, ... and ``steps`` steps of every mode, dtype and rounding. ``save`` gets all rows so far."""
    settings = [
        (mode, dtype, rounding)
        for mode in ("inplace", "shadow")
        for dtype in dtypes or cases.DTYPES
        for rounding in (("nearest",) if dtype == "fp32" else ("nearest", "stochastic"))
    ]
    total = sum(steps if mode == "inplace" else min(steps, _SHADOW_STEPS) for mode, _, _ in settings)
    say(f"drift: {len(settings)} settings of {elements:,} weights, {total} steps in all")
    progress, found = Progress(total), []
    for mode, dtype, rounding in settings:
        number = steps if mode == "inplace" else min(steps, _SHADOW_STEPS)
        options = {"mode": mode, "dtype": dtype, "rounding": rounding, "eps": EPS}
        previous: tuple[int, float] | None = None
        for step, weights, start in _walk(device, options, elements, number, progress):
            measures = _compare(weights, start, step, previous)
            previous = step, measures["drift_ulps"]
            case = f"drift/{mode}/{dtype}/{rounding}/{step}"
            found.append(rows.make("drift", case, options, measures, environment))
        save(found)
    progress.finish()
    return found


def _walk(
    device: torch.device, options: dict[str, Any], elements: int, steps: int, progress: Progress
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(steps taken, weights, weights at the start) at every checkpoint of a run with lr = 0."""
    generator = torch.Generator(device).manual_seed(3)
    start = torch.empty(elements, device=device).normal_(0, WEIGHT_RMS, generator=generator)
    start = start.to(cases.DTYPES[options["dtype"]])
    model = nn.ParameterDict({"weight": nn.Parameter(start.clone())})
    optimizer = MeZO(model, lr=0.0, zo_eps=EPS, mode=options["mode"], rounding=options["rounding"], seed=4)
    checkpoints = {steps, *itertools.takewhile(lambda n: n < steps, (10**k for k in range(9)))}
    losses = itertools.cycle((1.0, 0.5))
    for step in range(1, steps + 1):
        optimizer.step(lambda: next(losses))
        progress.advance(1, f"{options['mode']} {options['dtype']} {options['rounding']}")
        if step in checkpoints:
            yield step, model["weight"].detach(), start


def _compare(weights: Tensor, start: Tensor, steps: int, previous: tuple[int, float] | None) -> dict[str, Any]:
    """The measures of a drift row; ``previous`` is (steps, drift in ulps) of the checkpoint before."""
    moved = weights.double() - start.double()
    rms = float(start.double().square().mean().sqrt())
    drift = float(moved.square().mean().sqrt())
    ulp = ulp_at(rms, weights.dtype)
    exponent = None
    if previous is not None and previous[1] > 0 and drift > 0:
        exponent = math.log(drift / ulp / previous[1]) / math.log(steps / previous[0])
    return {
        "elements": weights.numel(),
        "steps": steps,
        "weight_rms": rms,
        "drift_rms": drift,
        "drift_percent": 100 * drift / rms,
        "drift_ulps": drift / ulp,
        "drift_mean_ulps": float(moved.mean()) / ulp,
        "changed_percent": 100 * float((moved != 0).double().mean()),
        "growth_exponent": exponent,
        "ulps_after_10000": drift / ulp * math.sqrt(_EXTRAPOLATED / steps),
    }


def ulp_at(value: float, dtype: torch.dtype) -> float:
    """The spacing of ``dtype`` at ``value`` (a normal number)."""
    return 2.0 ** math.floor(math.log2(value)) * torch.finfo(dtype).eps
