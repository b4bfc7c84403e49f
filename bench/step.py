"""The full training step: forwards alone, the loop people use today, and ours, interleaved in one run.

Every contestant has its own copy of the model and runs the same forward: B prompts of L tokens, the loss over two label
words at the last position. What a step takes beyond its two forwards is its overhead.
"""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from bench import baselines, cases, rows
from bench.progress import Progress, say
from bench.timing import Samples, once
from bench.workload import Closure, Task, load_model
from zoengine import methods

Step = Callable[[Closure], object]

DEFAULT_ROUNDS = 3
EPS, LR = 1e-3, 1e-6

CONTESTANTS = (("mezo", "inplace"), ("mezo", "shadow"), ("mezo-momentum", "inplace"), ("mezo-momentum", "shadow"))


def default_dtypes(device: torch.device) -> list[str]:
    """fp32, and bf16 where forwards in it are not emulated."""
    from zoengine.models.loading import pick_dtype

    return ["fp32", "bf16"] if pick_dtype("auto", device) == torch.bfloat16 else ["fp32"]


def measure(
    device: torch.device,
    environment: dict[str, Any],
    *,
    dtypes: Sequence[str] | None = None,
    model_name: str = "smollm2-135m",
    batch: int = 16,
    tokens: int = 44,
    rounds: int = DEFAULT_ROUNDS,
    save: Callable[[list[rows.Row]], None] = lambda found: None,
) -> list[rows.Row]:
    """Rows of the forwards, today's loop and every contestant, for each dtype. ``save`` gets all rows so far."""
    if dtypes is None:
        dtypes = default_dtypes(device)
        if "bf16" not in dtypes:
            say("step: bf16 is emulated on this CPU, several times slower than fp32; --dtype bf16 runs it all the same")
    found: list[rows.Row] = []
    for dtype in dtypes:
        found += _measure_dtype(device, environment, dtype, model_name, batch, tokens, rounds)
        save(found)
        gc.collect()
    return found


def _measure_dtype(
    device: torch.device,
    environment: dict[str, Any],
    dtype: str,
    model_name: str,
    batch: int,
    tokens: int,
    rounds: int,
) -> list[rows.Row]:
    model = load_model(model_name, dtype, device)
    contestants = _contestants(model, batch, tokens)
    for key, (step, task) in contestants.items():
        say(f"step of {model_name} {dtype}: warming up {key}")
        step(task.small_loss)
    one_round = _estimate(contestants, dtype, device)
    say(f"{batch} x {tokens} tokens, {rounds} rounds of {len(contestants)}: about {rounds * one_round:.0f} s")
    progress = Progress(rounds * len(contestants))
    taken: dict[str, list[float]] = {key: [] for key in contestants}
    for _ in range(rounds):
        for key, (step, task) in contestants.items():
            taken[key].append(once(functools.partial(step, task.loss)))
            progress.advance(1, f"{key} {taken[key][-1]:.2f} s")
    progress.finish()
    samples = {key: Samples(tuple(seconds)) for key, seconds in taken.items()}
    options = {"model": model_name, "dtype": dtype, "batch": batch, "tokens": tokens}
    return _rows(samples, environment, options, sum(p.numel() for p in model.parameters()))


def _contestants(model: nn.Module, batch: int, tokens: int) -> dict[str, tuple[Step, Task]]:
    """A step to be given a closure, and the task of its model, by name; each optimizer has a model of its own."""
    parameters, task = list(model.parameters()), Task(model, batch, tokens)
    contestants: dict[str, tuple[Step, Task]] = {
        "forwards": (_forwards, task),
        "today": (lambda closure: baselines.mezo_step(parameters, closure, 1, lr=LR, eps=EPS), task),
    }
    for method, mode in CONTESTANTS:
        twin = copy.deepcopy(model)
        optimizer = methods.create(method, twin, lr=LR, zo_eps=EPS, mode=mode)
        contestants[f"{method}/{mode}"] = (functools.partial(_step, optimizer), Task(twin, batch, tokens))
    return contestants


def _forwards(closure: Closure) -> None:
    with torch.no_grad():
        float(closure() - closure())  # reads the losses, as a step does


def _step(optimizer: methods.ZOOptimizer, closure: Closure) -> None:
    optimizer.step(closure)
    plus, minus = optimizer.last_losses
    if plus == minus:
        raise RuntimeError(
            "both losses of a step were equal, so its update was skipped and the time is not that of a step; "
            "take more --tokens or a larger --batch"
        )


def _estimate(contestants: dict[str, tuple[Step, Task]], dtype: str, device: torch.device) -> float:
    """Roughly the seconds of one round: its forwards, four passes of today's loop, and a third of that for ours."""
    _, task = contestants["today"]
    with torch.no_grad():
        forward = once(task.loss)
    z = torch.zeros(1 << 22, dtype=cases.DTYPES[dtype], device=device)
    baselines.normal_add_(z, 1.0)
    elements = sum(p.numel() for p in task.model.parameters())
    today = 4 * once(lambda: baselines.normal_add_(z, 1.0)) * elements / z.numel()
    ours = len(contestants) - 2
    return forward * 2 * len(contestants) + today * (1 + ours / 3)


def _rows(
    samples: dict[str, Samples], environment: dict[str, Any], options: dict[str, Any], elements: int
) -> list[rows.Row]:
    forwards, today = samples["forwards"], samples["today"]
    found = []
    for key, taken in samples.items():
        method, _, mode = key.partition("/")
        measures = {
            "elements": elements,
            "rounds": len(taken.seconds),
            "seconds": taken.median,
            "seconds_min": min(taken.seconds),
            "seconds_max": max(taken.seconds),
            "forwards": 2,
            "forwards_seconds": forwards.median,
            "overhead_percent": 100 * (taken.times(forwards) - 1),
            "times_faster": None if key in ("forwards", "today") else today.times(taken),
            "forward_peak_bytes": None,
            "peak_bytes": None,
        }
        name = f"step/{options['model']}/{options['dtype']}/{key}"
        found.append(
            rows.make("step", name, {**options, "method": method, "mode": mode or None}, measures, environment)
        )
    return found
