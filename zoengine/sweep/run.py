"""A sweep from its plan to its table: every point in turn, those that are there already left as they are.

The folder holds::

    POINT/ (as of any run, or failed.json)  locks/  sweep.json  sweep.md  sweep.png

Several processes, such as one a GPU, may work on one folder: each takes the next point that nobody has, and the one
that ends last writes the whole table.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import time
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

from zoengine import methods, seeds
from zoengine.evaluation import NonFiniteLossError
from zoengine.sweep import points, table
from zoengine.sweep.grid import Plan, Point
from zoengine.sweep.points import Record, claimed
from zoengine.trainer import checkpoint
from zoengine.trainer.build import task_builder
from zoengine.trainer.run import RunError, train


@dataclasses.dataclass(frozen=True)
class Swept:
    """How a sweep ended: how many points are finished, failed, and left to others; ``signal`` is what stopped it.

    ``table`` is the Markdown table; None as long as no point is finished.
    """

    folder: Path
    finished: int
    failed: int
    left: int
    table: Path | None
    signal: int | None = None


def sweep(plan: Plan, *, overwrite: bool = False, command: str = "", stream: TextIO | None = None) -> Swept:
    """Run what is left of ``plan`` and write its table and plot.

    A point that was interrupted goes on from its last checkpoint; one whose loss stopped being finite is recorded as
    failed, and the others are run all the same.

    Args:
        overwrite: run all points anew.
        command: the command line, for the records.
        stream: where progress goes; stderr by default.

    Raises:
        RunError: the folder cannot be used, or a run in it had another configuration.
        ConfigError, DataError, FieldError, ModelError, TaskError: something named is missing or does not fit.
    """
    for point in plan.points:
        task_builder(point.config)  # what cannot work says so before anything has run
    _prepare(plan, overwrite)
    progress, signal = _Progress(plan, stream or sys.stderr), None
    try:
        while signal is None:
            taken, signal = _next(plan, command, progress)
            if not taken:
                break
    finally:  # of a sweep that is stopped too
        records = _records(plan)
        path = _write(plan, records, command) if records else None
    failed = sum(record["error"] is not None for record in records)
    left = len(plan.points) - len(records)
    return Swept(plan.folder, len(records) - failed, failed, left, path, signal)


def _prepare(plan: Plan, overwrite: bool) -> None:
    """Refuse a folder with other runs before anything is run."""
    try:
        for point in plan.points:
            with claimed(point) as mine:
                if overwrite and not mine:
                    raise RunError(f"{point.folder} is being run by another process; stop it before --overwrite")
                if overwrite:
                    points.forget(point)
                if mine:
                    points.check(point)
    except OSError as error:
        raise RunError(f"run.output_dir: cannot write to {plan.folder}: {error.strerror or error}") from error


def _next(plan: Plan, command: str, progress: _Progress) -> tuple[bool, int | None]:
    """Run the first point that is neither done nor taken: whether there was one, and the signal that stopped it."""
    for point in plan.points:
        if not points.done(point):
            with claimed(point) as mine:
                if mine and not points.done(point):  # it may have been finished since
                    points.check(point)
                    progress.begin(point)
                    return True, _run(point, command, progress)
    return False, None


def _run(point: Point, command: str, progress: _Progress) -> int | None:
    gc.collect()  # the last trainer hangs in reference cycles, with its optimizer and the model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    resume = checkpoint.last_complete(point.folder) is not None and (point.folder / "config.yaml").is_file()
    try:
        outcome = train(point.config, resume=resume, overwrite=not resume, command=command)
        if outcome.signal is not None:
            return outcome.signal
    except NonFiniteLossError as error:
        points.fail(point, error)
    progress.end(point, points.read(point))
    return None


def _records(plan: Plan) -> list[Record]:
    return [record for point in plan.points if (record := points.read(point)) is not None]


def _write(plan: Plan, records: list[Record], command: str) -> Path:
    rows = table.rows(plan, records)
    result = {"command": command, "sweep": plan.keys, "points": len(plan.points), "rows": rows, "records": records}
    _replace(plan.folder / "sweep.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    seeds.plot(rows, plan.folder / "sweep.png", "score", table.metric(records))
    _replace(plan.folder / "sweep.md", table.markdown(plan, rows, records))
    return plan.folder / "sweep.md"


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".incomplete")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


class _Progress:
    """Which point is run, how it ended, and when the whole sweep will, in lines.

    The estimate counts passes over the model, and what other processes have finished since this one began.
    """

    def __init__(self, plan: Plan, stream: TextIO) -> None:
        self._plan, self._stream = plan, stream
        self._work = {point.name: _work(point) for point in plan.points}
        self._before, self._began = self._finished(), time.monotonic()

    def begin(self, point: Point) -> None:
        done = self._finished()
        self._line(f"point {len(done) + 1} of {len(self._plan.points)}: {point.name}{self._left(done)}")

    def end(self, point: Point, record: Record) -> None:
        done, error = self._finished(), record["error"]
        outcome = f"failed: {error}" if error else table.scores(record)
        self._line(f"{len(done)}/{len(self._plan.points)}  {point.name}  {outcome}{self._left(done)}")

    def _finished(self) -> set[str]:
        return {point.name for point in self._plan.points if points.done(point)}

    def _left(self, done: set[str]) -> str:
        """The time left, once there is something to tell it by."""
        since = sum(self._work[name] for name in done - self._before)
        if not since:
            return ""
        left = sum(work for name, work in self._work.items() if name not in done)
        return f"  {tqdm.format_interval((time.monotonic() - self._began) / since * left)} left"

    def _line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


def _work(point: Point) -> int:
    """Passes over the model, a backward one counted as two."""
    fields = dict(point.config.method)
    kind = methods.get(fields.pop("name"))
    return point.config.run.steps * (kind.forwards_per_step(kind.Fields(**fields)) + 2 * kind.backwards_per_step)
