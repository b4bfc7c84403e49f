"""One cell of a comparison: a method, a learning rate, a seed, trained by the trainer of ordinary runs."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from zoengine import data, methods
from zoengine.compare.config import Entry, Plan, with_seed
from zoengine.compare.memory import extra_bytes
from zoengine.config import Config
from zoengine.evaluation import NonFiniteLossError
from zoengine.noise import table
from zoengine.trainer.build import facts, load_model, pick_device, read_splits, task_builder
from zoengine.trainer.metrics import MetricsWriter
from zoengine.trainer.optimizer import passes, unwrapped
from zoengine.trainer.progress import ZOProgressCallback
from zoengine.trainer.run import RunError, build_trainer

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is run, and the file its record goes to."""

    entry: Entry
    lr: float
    seed: int

    @property
    def file(self) -> str:
        return f"{self.entry.label}_lr{self.lr:g}_seed{self.seed}.json"

    @property
    def config(self) -> Config:
        return with_seed(self.entry.configs[self.lr], self.seed)


class Job:
    """The data, and the model in memory: loaded once for each seed, set back to its start between cells.

    Args:
        plan: the comparison.
        advance: called with the number of forward passes just taken.
    """

    def __init__(self, plan: Plan, advance: Callable[[int], None]) -> None:
        self.plan, self._advance = plan, advance
        some = next(iter(plan.entries[0].configs.values()))
        self._build_task = task_builder(some)
        self._examples = read_splits(some)
        self._hashes = {name: data.split_hash(examples) for name, examples in self._examples.items()}
        self._device = pick_device(some.model.device)
        self.split = "test" if "test" in self._examples else "eval"
        self._seed: int | None = None
        self._model: Any = None
        self._before: dict[str, dict[str, float]] | None = None

    def identity(self, cell: Cell) -> Record:
        """All that a cell's result depends on; a record with another identity is of another comparison."""
        made = cell.config.model_dump()
        for free in ("output_dir", "backend", "log_every", "report_to"):
            del made["run"][free]
        run = self.plan.config.run
        own = {"budget": run.budget, "evaluations": run.evaluations, "noise_version": table.VERSION}
        return json.loads(json.dumps({**own, "splits": self._hashes, **made}))

    def facts(self) -> Record:
        """What the comparison has to be read with; the model must have been loaded."""
        return facts(self._model, self._examples)

    def try_out(self, cell: Cell) -> None:
        """Build the cell's optimizer on the model, so that what cannot work says so before anything has run."""
        self._prepare(cell)
        name = cell.config.method["name"]
        methods.create(name, self._model, **{k: v for k, v in cell.config.method.items() if k != "name"})

    def run(self, cell: Cell) -> Record:
        """Train and measure; a loss that is not finite ends the cell and is in its record."""
        self._prepare(cell)
        if self._before is None:
            self._before = {split: self._scores(split) for split in sorted({"eval", self.split})}
        name = cell.config.method["name"]
        record = {"cell": self.identity(cell), "label": cell.entry.label, "method": name, "lr": cell.lr}
        record |= {
            "seed": cell.seed,
            "split": self.split,
            "metric": self._task.metric,
            "before": self._before,
            "diverged": None,
        }
        with tempfile.TemporaryDirectory(prefix="zoengine-") as scratch:
            writer = MetricsWriter(Path(scratch) / "metrics.jsonl")
            try:
                return {**record, **self._trained(cell, Path(scratch), writer)}
            finally:
                writer.close()

    def _trained(self, cell: Cell, scratch: Path, writer: MetricsWriter) -> Record:
        trainer = build_trainer(cell.config, scratch, self._model, self._tokenizer, self._task, self._encoded)
        pace = _Pace(self.plan, cell.entry.forwards_per_step, self._advance)
        trainer.remove_callback(ZOProgressCallback)
        for callback in (writer, pace):
            trainer.add_callback(callback)
        found: Record = {"final": None}
        try:
            trainer.train()
            found["final"] = self._scores(self.split)
            if not all(math.isfinite(row["loss"]) for row in writer.rows):
                raise NonFiniteLossError("the evaluation's loss is not finite")
        except NonFiniteLossError as error:
            found = {"final": None, "diverged": str(error)}
        rows = [row for row in writer.rows if row["kind"] == "eval" and math.isfinite(row["loss"])]
        curve = [{"forward_passes": 0, **self._before["eval"]}]
        names = ("forward_passes", self._task.metric, "loss", "n")
        curve += [{name: row[name] for name in names} for row in rows]
        return {
            **found,
            **{"backward_passes": 0, **passes(trainer.zo)},
            "steps": len(pace.seconds),
            "seconds_per_step": sum(pace.seconds) / len(pace.seconds) if pace.seconds else None,
            "extra_bytes": extra_bytes(trainer.zo, self._model),
            "weight_bytes": sum(p.nbytes for p in self._model.parameters()),
            "curve": curve,
        }

    def _prepare(self, cell: Cell) -> None:
        """The model of the cell's seed, as it was when it had just been loaded."""
        gc.collect()  # the last trainer hangs in reference cycles, and its optimizer is as large as the model
        if cell.seed != self._seed or not self._set_back():
            self._model = self._start = None
            self._model, self._tokenizer = load_model(cell.config, self._device)
            self._start = {name: (p.requires_grad, p.detach().clone()) for name, p in self._model.named_parameters()}
            self._task = self._build_task(self._tokenizer, self._model)
            self._encoded = {name: self._task.dataset(examples) for name, examples in self._examples.items()}
            if cell.seed != self._seed:
                self._seed, self._before = cell.seed, None

    def _set_back(self) -> bool:
        """Whether the model still has the parameters it was loaded with; they then have their first values again."""
        now = dict(self._model.named_parameters())
        if {name: (p.requires_grad, p.shape, p.dtype) for name, p in now.items()} != {
            name: (trained, p.shape, p.dtype) for name, (trained, p) in self._start.items()
        }:
            return False  # a method has put something else in their place
        with torch.no_grad():
            for name, (_, value) in self._start.items():
                now[name].copy_(value)
        return True

    def _scores(self, split: str) -> dict[str, float]:
        return self._task.evaluate(self._model, self._encoded[split], self.plan.config.run.eval_batch_size)


class _Pace(TrainerCallback):
    """Evaluates at even distances in forward passes, and stops before a step would exceed the budget."""

    def __init__(self, plan: Plan, forwards_per_step: int, advance: Callable[[int], None]) -> None:
        run = plan.config.run
        self._budget, self._forwards_per_step, self._advance = run.budget, forwards_per_step, advance
        self._points = [math.ceil(run.budget * k / run.evaluations) for k in range(1, run.evaluations + 1)]
        self._taken = 0
        self.seconds: list[float] = []  # of each step, without evaluations

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)
        taken = unwrapped(kwargs["optimizer"]).forward_passes
        self._advance(taken - self._taken)
        self._taken = taken
        last = state.global_step >= state.max_steps or taken + self._forwards_per_step > self._budget
        if last or taken >= self._points[0]:
            control.should_evaluate = True
            self._points = [point for point in self._points if point > taken] or [math.inf]
        if last:
            control.should_training_stop = True


def read_record(path: Path, identity: Record) -> Record | None:
    """The record of a finished cell; None if there is none yet.

    Raises:
        RunError: the file is of another comparison, or is no record.
    """
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        earlier = record["cell"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is not the record of a cell ({error}); remove it") from error
    changed = [key for key in sorted({*earlier, *identity}) if earlier.get(key) != identity.get(key)]
    if changed:
        inside = [
            f"{key}.{name}"
            for key in changed
            if isinstance(earlier.get(key), dict) and isinstance(identity.get(key), dict)
            for name in sorted({*earlier[key], *identity[key]})
            if earlier[key].get(name) != identity[key].get(name)
        ]
        plain = [key for key in changed if not any(name.startswith(f"{key}.") for name in inside)]
        raise RunError(
            f"{path} was run with other values of {', '.join(plain + inside)}; choose another run.output_dir, or start "
            "anew with --overwrite"
        )
    return record


def write_record(path: Path, record: Record) -> None:
    """Write beside its place and rename, so that a file under a cell's name is whole."""
    partial = path.with_name(path.name + ".incomplete")
    partial.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)
