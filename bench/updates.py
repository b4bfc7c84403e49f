"""Measures the update cases: copy, noise, today's way and ours in the same rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench import rows
from bench.kernels import fast_backends
from bench.progress import Progress, say
from bench.timing import interleaved
from bench.update_cases import UPDATES, Data
from zoengine import ops

DEFAULT_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 27}
DEFAULT_DTYPES = ("fp32", "bf16")
DEFAULT_ROUNDS = 5


def measure(
    device: torch.device,
    environment: dict[str, Any],
    *,
    dtypes: Sequence[str] | None = None,
    elements: int | None = None,
    rounds: int | None = None,
    backends: Sequence[str] | None = None,
    save: Callable[[list[rows.Row]], None] = lambda found: None,
) -> list[rows.Row]:
    """Rows of every update case of ``dtypes`` on ``device``, for each of ``backends`` (default: all fast ones).

    Raises:
        ValueError: ``elements`` is no multiple of 65536.
        RuntimeError: there are no kernels for ``device``.
    """
    elements, rounds = elements or DEFAULT_ELEMENTS[device.type], rounds or DEFAULT_ROUNDS
    if elements % (1 << 16):
        raise ValueError(f"updates are measured on a multiple of 64Ki elements, got {elements}; pass --size 16Mi")
    backends, dtypes = list(backends or fast_backends(device)), dtypes or DEFAULT_DTYPES
    say(f"updates on {environment['device']}: {elements:,} elements, {rounds} rounds")
    progress, found = Progress(len(dtypes) * len(UPDATES)), []
    for dtype in dtypes:
        data = Data(dtype, elements, device)
        for name in UPDATES:
            found += _measure_one(name, data, rounds, backends, environment)
            progress.advance(1, name)
            save(found)
    progress.finish()
    return found


def _measure_one(
    name: str, data: Data, rounds: int, backends: Sequence[str], environment: dict[str, Any]
) -> list[rows.Row]:
    update = UPDATES[name]
    functions = [lambda: data.y.copy_(data.x), update.today(data)]
    names: list[str | None] = [None, None]
    for backend in backends:
        functions += [lambda: ops.noise_fill_(data.y, data.seeds[:1]), update.ours(data)]
        names += [backend, backend]
    try:
        taken = interleaved(functions, data.device, rounds, before=lambda k: ops.use(names[k]))
    finally:
        ops.use(None)
    copied, today = taken[:2]
    copy_bytes, moved = 2 * data.x.nbytes, update.bytes(data.dtype, data.elements)
    found = []
    for backend, filled, ours in zip(backends, taken[2::2], taken[3::2], strict=True):
        floors = [
            max(moved / copy_bytes * a, update.normals * b)
            for a, b in zip(copied.seconds, filled.seconds, strict=True)
        ]  # fmt: skip
        measures = {
            "elements": data.elements,
            "rounds": rounds,
            "seconds": ours.median,
            "seconds_min": min(ours.seconds),
            "seconds_max": max(ours.seconds),
            "bytes": moved,
            "normals": round(update.normals * data.elements),
            "today_seconds": today.median,
            "percent_of_copy": 100 * moved / copy_bytes * copied.times(ours),
            "percent_of_floor": 100 * statistics.median(f / s for f, s in zip(floors, ours.seconds, strict=True)),
            "times_faster": today.times(ours),
        }
        options = {"op": name, "dtype": data.dtype, "backend": backend}
        found.append(rows.make("update", f"{name}/{data.dtype}", options, measures, environment))
    return found
