"""The training step of models too large for a copy each: contestants one after the other on one model.

Each method takes turns, round by round, with the forwards alone and with the loop of today on the same weights, so that
ratios are those of neighbours. ``bench.step`` gives every contestant a model of its own and lets all take turns.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from bench import baselines, rows
from bench.progress import say
from bench.step import EPS, LR
from bench.timing import Samples, once
from bench.workload import Closure, Task
from zoengine import methods, ops
from zoengine.methods import ZOOptimizer

CONTESTANTS = (
    ("mezo", "inplace"), ("mezo", "shadow"), ("lozo", "shadow"), ("conmezo", "shadow"), ("loren", "shadow"),
    ("hizoo", "shadow"),
)  # fmt: skip
SHAPES = ((4, 64), (16, 128), (32, 512))  # prompts x tokens: 256, 2,048 and 16,384 tokens a forward
ROUNDS = 3

Save = Callable[[list[rows.Row]], None]
LeftOut = Callable[[str], None]
LONG = 20.0  # seconds of a contestant's rounds above which there are two of them


def measure(
    model: nn.Module,
    name: str,
    environment: dict[str, Any],
    *,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    contestants: Sequence[tuple[str, str]] = CONTESTANTS,
    rounds: int = ROUNDS,
    until: float = float("inf"),
    save: Save = lambda found: None,
    left_out: LeftOut = lambda reason: None,
    broken: LeftOut | None = None,
) -> list[rows.Row]:
    """Rows of the forwards, today's loop and every contestant on ``model`` for each shape (prompts, tokens).

    Nothing is begun after ``until`` (of ``time.monotonic``); what was not begun, or did not fit into the device's
    memory, is told to ``left_out``, what failed in another way to ``broken``, which otherwise is raised. ``save`` gets
    all rows so far.
    """
    found: list[rows.Row] = []
    peaks: dict[tuple[int, int], int | None] = {}
    for shape in shapes:
        task = Task(model, *shape)
        try:
            with torch.no_grad():
                task.small_loss()
            peaks[shape] = _peak(functools.partial(_forwards, 2, task.loss), model)
        except torch.OutOfMemoryError:
            left_out(f"{name}, {shape[0] * shape[1]:,} tokens: the forward does not fit into memory")
    for method, mode in contestants:
        label = f"{name}: {method}, {mode}"
        if time.monotonic() >= until:
            left_out(f"{label}: no time left")
            continue
        optimizer = None
        try:
            optimizer = methods.create(method, model, lr=LR, zo_eps=EPS, mode=mode)
        except torch.OutOfMemoryError:
            left_out(f"{label}: its states do not fit into memory")
        for shape, forward_peak in peaks.items() if optimizer is not None else ():
            if time.monotonic() >= until:
                left_out(f"{label}, {shape[0] * shape[1]:,} tokens: no time left")
                continue
            try:
                fresh = not any((row["options"]["batch"], row["options"]["tokens"]) == shape for row in found)
                found += _measure_one(optimizer, model, name, shape, rounds, forward_peak, environment, fresh)
                say(f"{label}, {shape[0]} x {shape[1]}: {found[-1]['measures']['seconds']:.3f} s")
            except torch.OutOfMemoryError:
                left_out(f"{label}, {shape[0] * shape[1]:,} tokens: does not fit into memory")
                _release()
            except RuntimeError as error:
                if broken is None:
                    raise
                broken(f"{label}, {shape[0] * shape[1]:,} tokens: {type(error).__name__}: {str(error)[:300]}")
            save(found)
        del optimizer
        _release()
    return found


def _measure_one(
    optimizer: ZOOptimizer,
    model: nn.Module,
    name: str,
    shape: tuple[int, int],
    rounds: int,
    forward_peak: int | None,
    environment: dict[str, Any],
    fresh: bool,
) -> list[rows.Row]:
    """The contestant's row; with ``fresh`` those of the forwards and of today's loop before it."""
    task, parameters = Task(model, *shape), list(model.parameters())
    forwards = optimizer.forwards_per_step(optimizer.fields)
    functions = {
        "forwards": functools.partial(_forwards, forwards, task.loss),
        "today": lambda: baselines.mezo_step(parameters, task.loss, 1, lr=LR, eps=EPS),
        f"{optimizer.name}/{optimizer.fields.mode}": functools.partial(_step, optimizer, task.loss),
    }
    start = time.monotonic()
    peaks = {key: _peak(function, model) for key, function in functions.items()}  # warms up, too
    if (time.monotonic() - start) * rounds > LONG:
        rounds = min(rounds, 2)
    taken: dict[str, list[float]] = {key: [] for key in functions}
    for _ in range(rounds):
        for key, function in functions.items():
            taken[key].append(once(function))
    samples = {key: Samples(tuple(seconds)) for key, seconds in taken.items()}
    options = {"model": name, "dtype": _dtype(model), "batch": shape[0], "tokens": shape[1]}
    options["backend"] = ops.current(parameters[0].device)
    found = []
    for key, seconds in samples.items():
        if key in ("forwards", "today") and not fresh:
            continue
        method, _, mode = key.partition("/")
        own = 2 if key == "today" else forwards
        measures = {
            "elements": sum(p.numel() for p in parameters),
            "rounds": rounds,
            "seconds": seconds.median,
            "seconds_min": min(seconds.seconds),
            "seconds_max": max(seconds.seconds),
            "forwards": own,
            "forwards_seconds": samples["forwards"].median * own / forwards,
            "overhead_percent": 100 * (seconds.times(samples["forwards"]) * forwards / own - 1),
            "times_faster": samples["today"].times(seconds) if mode else None,
            "forward_peak_bytes": forward_peak,
            "peak_bytes": forward_peak if key == "forwards" else peaks[key],
        }
        case = f"step/{name}/{options['dtype']}/{shape[0]}x{shape[1]}/{key}"
        found.append(
            rows.make("step", case, {**options, "method": method, "mode": mode or None}, measures, environment)
        )
    return found


def _dtype(model: nn.Module) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[next(model.parameters()).dtype]


def _forwards(count: int, closure: Closure) -> None:
    with torch.no_grad():
        float(sum(closure() for _ in range(count)))  # reads the losses, as a step does


def _step(optimizer: ZOOptimizer, closure: Closure) -> None:
    optimizer.step(closure)
    if len(set(optimizer.last_losses)) == 1:
        raise RuntimeError("all losses of a step were equal, so its update was skipped and was not timed")


def _peak(function: Callable[[], object], model: nn.Module) -> int | None:
    """The most memory allocated on the model's GPU while ``function`` runs; None on a CPU."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        function()
        return None
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return torch.cuda.max_memory_allocated(device)


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
