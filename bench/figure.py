"""What the scripts that repeat a figure of a paper have in common: the results file, and where the work runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench.environment import describe
from bench.progress import Progress

Result = TypeVar("Result")


def header(module: str, arguments: Sequence[str] | None) -> dict[str, Any]:
    """The beginning of a results file: the exact command, and the environment (:func:`bench.environment.describe`)."""
    command = " ".join([f"python -m bench.{module}", *(sys.argv[1:] if arguments is None else arguments)])
    return {"command": command, "environment": {**describe(torch.device("cpu")), "threads": 1}}


def write(path: Path, result: dict[str, Any]) -> None:
    """One member a line, floats to six digits; an existing file is replaced only by a complete one."""
    lines = []
    for key, value in result.items():
        value = _rounded(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n  " + ",\n  ".join(json.dumps(v) for v in value) + "\n ]"
        else:
            text = json.dumps(value)
        lines.append(f" {json.dumps(key)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(partial, path)


def run(tasks: Sequence[tuple], function: Callable[..., Result], jobs: int) -> Iterator[tuple[int, Result]]:
    """(task number, function(*task)) in order of completion, in ``jobs`` processes of one thread; 1 is this one."""
    progress = Progress(len(tasks))
    if jobs == 1:
        for k, task in enumerate(tasks):
            yield k, function(*task)
            progress.advance(1, str(task[0]))
    else:
        with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            futures = {pool.submit(function, *task): k for k, task in enumerate(tasks)}
            for future in as_completed(futures):
                yield futures[future], future.result()
                progress.advance(1, str(tasks[futures[future]][0]))
    progress.finish()


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return value
