"""Measures the kernel cases: copy, today's way and ours in the same rounds."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench import cases, rows
from bench.progress import Progress, say
from bench.timing import GPU_MILLISECONDS, SHORTEST, Function, interleaved, once
from zoengine import ops

DEFAULT_ELEMENTS = {"cpu": 1 << 26, "cuda": 1 << 28}
ROUNDS = (3, 9)  # at least and at most, where the caller does not say
SECONDS = 200  # that the default number of rounds may take
_PREVIEW = 64  # the estimate runs every case on 1/64 of the elements


def fast_backends(device: torch.device) -> list[str]:
    """The backends worth measuring on ``device``: all but the reference.

    Raises:
        RuntimeError: there is none; says why.
    """
    found = ops.backends()
    names = [name for name, b in found.items() if name != "reference" and device.type in b.devices]
    if not names:
        reasons = "; ".join(f"{name}: {b.reason}" for name, b in found.items() if not b.available)
        raise RuntimeError(
            f"no kernels for {device.type} here ({reasons}); to measure the plain torch reference all the same, "
            "pass --backends reference --size 1Mi"
        )
    return names


def measure(
    device: torch.device,
    environment: dict[str, Any],
    *,
    dtypes: Sequence[str] = tuple(cases.DTYPES),
    elements: int | None = None,
    rounds: int | None = None,
    backends: Sequence[str] | None = None,
    only: Callable[[cases.Case], bool] = lambda case: True,
    save: Callable[[list[rows.Row]], None] = lambda found: None,
) -> list[rows.Row]:
    """Rows of every kernel case of ``dtypes`` on ``device``, for each of ``backends`` (default: all fast ones).

    ``only`` picks among the cases; what they are compared with stays.
    ``rounds`` defaults to as many of 3 to 9 as fit into ``SECONDS``, by an estimate from few elements.
    ``save`` is called after each group of cases with all rows so far.
    """
    elements = elements or DEFAULT_ELEMENTS[device.type]
    backends = list(backends or fast_backends(device))
    picked = [case for case in cases.cases(dtypes) if case.op in ("copy", "normal_add") or only(case)]
    groups = [list(group) for _, group in itertools.groupby(picked, _group)]
    plan = [(group[0].dtype, group) for group in groups if any(map(only, group))]
    weights = _preview(plan, device, elements, backends)
    one_round = sum(map(sum, weights))
    if rounds is None:
        rounds = min(max(int(SECONDS / one_round) - 1, ROUNDS[0]), ROUNDS[1])
    seconds = (rounds + 1) * one_round
    say(f"kernels on {environment['device']}: {elements:,} elements, {rounds} rounds, about {seconds:.0f} s")
    progress, found = Progress(seconds), []
    work = None
    for (dtype, members), shares in zip(plan, weights, strict=True):
        if work is None or work.dtype != dtype:
            work = None  # frees the last one before the next is made
            work = cases.Workspace(dtype, elements, device)
        found += _measure_group(members, work, rounds, backends, environment, progress, shares)
        save(found)
    progress.finish()
    return found


def _group(case: cases.Case) -> tuple:
    return case.group


def _preview(
    plan: Sequence[tuple[str, list[cases.Case]]], device: torch.device, elements: int, backends: Sequence[str]
) -> list[list[float]]:
    """Roughly the seconds of one sample of every function of every group, from a run on few elements."""
    few = max(1024, elements // _PREVIEW)
    work = {dtype: cases.Workspace(dtype, few, device) for dtype, _ in plan}
    result = []
    for dtype, members in plan:
        functions, _, names = _functions(members, work[dtype], backends)
        if device.type == "cuda":
            result.append([2e-3 * GPU_MILLISECONDS] * len(functions))
            continue
        seconds = []
        for function, backend in zip(functions.values(), names, strict=True):
            with ops.use(backend):
                seconds.append(max(min(once(function), once(function)) * elements / few, SHORTEST))
        result.append(seconds)
    return result


def _measure_group(
    members: Sequence[cases.Case],
    work: cases.Workspace,
    rounds: int,
    backends: Sequence[str],
    environment: dict[str, Any],
    progress: Progress,
    weights: Sequence[float],
) -> list[rows.Row]:
    """A group's cases against one copy and one baseline, all timed in the same rounds."""
    functions, runs, names = _functions(members, work, backends)
    try:
        samples = interleaved(
            list(functions.values()),
            work.device,
            rounds,
            before=lambda k: ops.use(names[k]),
            after=lambda k: progress.advance(weights[k], members[-1].name),
        )
    finally:
        ops.use(None)
    taken = dict(zip(functions, samples, strict=True))
    copied, today = taken["copy"], taken.get("today")
    copy_bytes = cases.Case("copy", members[0].dtype).bytes(work.elements)
    found = []
    for case, backend, key in runs:
        samples, moved = taken[key], case.bytes(work.elements)
        measures = {
            "elements": work.elements,
            "rounds": rounds,
            "seconds": samples.median,
            "seconds_min": min(samples.seconds),
            "seconds_max": max(samples.seconds),
            "melements_per_s": work.elements / samples.median / 1e6,
            "bytes": moved,
            "gb_per_s": moved / samples.median / 1e9,
            "percent_of_copy": 100 * moved / copy_bytes * copied.times(samples),
            "times_faster": None if key in ("copy", "today") or today is None else today.times(samples),
        }
        options = {**dataclasses.asdict(case), "backend": backend, "baseline": cases.BASELINES[case.op]}
        found.append(rows.make("kernel", case.name, options, measures, environment))
    return found


def _functions(
    members: Sequence[cases.Case], work: cases.Workspace, backends: Sequence[str]
) -> tuple[dict[str, Function], list[tuple[cases.Case, str, str]], list[str | None]]:
    """What to time, by key; (case, backend, key) of every row that comes of it; the backend of every function."""
    functions = {"copy": cases.ours(cases.Case("copy", work.dtype), work)}
    today = next((f for f in (cases.today(case, work) for case in members) if f is not None), None)
    if today is not None:
        functions["today"] = today
    names: list[str | None] = [None] * len(functions)
    runs = []
    for case in members:
        if case.op in ("copy", "normal_add"):  # torch's own: they are what the others are compared with
            runs.append((case, "torch", "copy" if case.op == "copy" else "today"))
            continue
        for backend in backends:
            key = f"{case.name} {backend}"
            functions[key] = cases.ours(case, work)
            names.append(backend)
            runs.append((case, backend, key))
    return functions, runs, names
