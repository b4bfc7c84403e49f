"""A comparison from its plan to its table: every cell in turn, those that are there already left as they are.

The folder holds::

    cells/METHOD_lrX_seedN.json  comparison.json  comparison.md  comparison.png
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from zoengine import ops, seeds
from zoengine.compare import table
from zoengine.compare.cells import Cell, Job, Record, read_record, write_record
from zoengine.compare.config import Entry, Plan
from zoengine.scores import score
from zoengine.trainer.run import RunError

_log = logging.getLogger(__name__)

_WRITTEN = ("comparison.json", "comparison.md", "comparison.png")


def compare(plan: Plan, *, overwrite: bool = False, command: str = "", stream: TextIO | None = None) -> Path:
    """Run what is left of ``plan`` and write its tables and plot; returns the Markdown table's path.

    First every learning rate with the first seed; then, of each method, the one with the best score on the ``eval``
    data, with the other seeds.

    Args:
        overwrite: remove the cells of an earlier comparison from the output folder.
        command: the command line, for the record.
        stream: where progress goes; stderr by default.

    Raises:
        RunError: the folder cannot be used, or a cell in it was run with another configuration.
        ConfigError, DataError, FieldError, ModelError, TaskError: something named is missing or does not fit.
    """
    run = plan.config.run
    folder = Path(run.output_dir)
    progress = _Progress(plan, stream or sys.stderr)
    try:
        with nullcontext() if run.backend == "auto" else ops.use(run.backend):
            job = Job(plan, progress.advance)
            cells = _folder(folder, overwrite)
            return _Comparison(plan, job, folder, cells, progress)(command)
    finally:
        progress.close()


class _Comparison:
    """The cells of one comparison and their records."""

    def __init__(self, plan: Plan, job: Job, folder: Path, cells: Path, progress: _Progress) -> None:
        self.plan, self.job, self.folder, self.cells, self.progress = plan, job, folder, cells, progress

    def __call__(self, command: str) -> Path:
        first, *others = self.plan.config.run.seeds
        grid = [Cell(entry, lr, first) for entry in self.plan.entries for lr in entry.configs]
        found = {cell: self._finished(cell) for cell in grid}
        for cell in self._one_of_each_missing(found):
            self.job.try_out(cell)
        found = {cell: record or self._run(cell) for cell, record in found.items()}
        best = {}
        for entry in self.plan.entries:
            records = [record for cell, record in found.items() if cell.entry is entry]
            best[entry.label] = table.best(records, self.plan.config.run.select)
        for seed in others:  # one seed after the other: each needs the model loaded anew
            for entry in self.plan.entries:
                if best[entry.label] is not None:
                    cell = Cell(entry, best[entry.label], seed)
                    found[cell] = self._finished(cell) or self._run(cell)
        return self._write(found, best, command)

    def _one_of_each_missing(self, found: dict[Cell, Record | None]) -> Iterable[Cell]:
        missing: dict[str, Cell] = {}
        for cell, record in found.items():
            if record is None:
                missing.setdefault(cell.entry.label, cell)
        return missing.values()

    def _finished(self, cell: Cell) -> Record | None:
        record = read_record(self.cells / cell.file, self.job.identity(cell))
        if record is not None:
            self.progress.skip()
        return record

    def _run(self, cell: Cell) -> Record:
        record = self.job.run(cell)
        record["facts"] = self.job.facts()
        write_record(self.cells / cell.file, record)
        self.progress.finished(cell, record)
        return record

    def _write(self, found: dict[Cell, Record], best: dict[str, float | None], command: str) -> Path:
        rows = [table.row(entry, self._of(found, entry), best[entry.label]) for entry in self.plan.entries]
        config = self.plan.config.model_dump()
        result = {"command": command, "config": config, "facts": next(iter(found.values()))["facts"], "rows": rows}
        text = json.dumps(result, indent=1, allow_nan=False)
        (self.folder / "comparison.json").write_text(text + "\n", encoding="utf-8")
        seeds.plot(rows, self.folder / "comparison.png", rows[0]["metric"], rows[0]["metric"])
        path = self.folder / "comparison.md"
        path.write_text(table.markdown(self.plan.config, rows, result["facts"]), encoding="utf-8")
        return path

    def _of(self, found: dict[Cell, Record], entry: Entry) -> list[Record]:
        return [record for cell, record in found.items() if cell.entry is entry]


class _Progress:
    """Forward passes done and to do over all cells, and the time left: a bar on a terminal, lines elsewhere."""

    def __init__(self, plan: Plan, stream: TextIO) -> None:
        self._budget, self._cells, self._stream = plan.config.run.budget, plan.cells, stream
        self._finished = self._skipped = 0
        self._passes, self._began = 0, time.monotonic()
        self._bar: Any = None
        if stream.isatty():
            self._bar = tqdm(
                total=plan.cells * self._budget, desc="compare", unit="forward", dynamic_ncols=True, file=stream
            )

    def advance(self, forward_passes: int) -> None:
        """Some more forward passes of the cell that is running."""
        self._passes += forward_passes
        if self._bar is not None:
            self._bar.update(forward_passes)

    def skip(self) -> None:
        """A cell was there already."""
        self._skipped += 1
        if self._bar is not None:
            self._bar.total -= self._budget
            self._bar.refresh()

    def finished(self, cell: Cell, record: Record) -> None:
        """A cell is done: one line about it."""
        self._finished += 1
        ended = self._finished * self._budget
        if self._bar is not None:  # a cell may end below its budget
            self._bar.update(ended - self._passes)
        self._passes = ended
        scores = record["final"]
        metric = record["metric"]
        outcome = f"{metric} {score(metric, scores[metric])}, loss {scores['loss']:.4f}" if scores else "diverged"
        left = self._cells - self._skipped - self._finished
        seconds = (time.monotonic() - self._began) / self._finished * left
        line = (
            f"{self._skipped + self._finished}/{self._cells}  {cell.entry.label}  lr {cell.lr:g}  seed {cell.seed}  "
            f"{outcome}  {tqdm.format_interval(seconds)} left"
        )
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def _folder(folder: Path, overwrite: bool) -> Path:
    """The folder of the cells, ready to be written."""
    cells = folder / "cells"
    try:
        cells.mkdir(parents=True, exist_ok=True)
        old = [*cells.glob("*_lr*_seed*.json"), *(folder / name for name in _WRITTEN)] if overwrite else []
        for path in [*cells.glob("*.json.incomplete"), *old]:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"run.output_dir: cannot write to {folder}: {error.strerror or error}") from error
    return cells
