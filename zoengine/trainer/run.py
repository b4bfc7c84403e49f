"""A run from its configuration: data, model, trainer, and everything that ends up in the run's folder.

The folder holds::

    config.yaml  metrics.jsonl  checkpoint-N/  model/  curve.png  report.html  result.json
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from zoengine import models, ops, report
from zoengine.config import Config, dump, load
from zoengine.config_files import flat
from zoengine.scores import score
from zoengine.tasks import Task
from zoengine.trainer import checkpoint
from zoengine.trainer.build import check_reporters, facts, head, load_model, pick_device, read_splits, task_builder
from zoengine.trainer.interrupt import StopOnSignal
from zoengine.trainer.metrics import NOT_SCORES, MetricsWriter
from zoengine.trainer.trainer import ZOTrainer

Scores = dict[str, float]

_log = logging.getLogger(__name__)

_SHOWN = 8  # examples whose predictions the report shows
# What a run writes, and all that starting over may remove.
_WRITTEN = ("config.yaml", "metrics.jsonl", "model", "curve.png", "report.html", "result.json", "runs", "_incomplete")
# What may change when a run is continued; anything else would make it another run.
_FREE_ON_RESUME = {
    "run.output_dir", "run.steps", "run.log_every", "run.eval_every", "run.save_every", "run.save_total_limit",
    "run.eval_batch_size", "run.report_to", "run.backend", "model.device",
}  # fmt: skip


class RunError(ValueError):
    """A run that cannot be started or continued in this folder; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    ``before`` and ``after`` are scores of ``split``, of which ``metric`` is the one to look at; ``evaluation_share`` is
    the part of ``seconds`` that went into scores; ``signal`` is what stopped the run early.
    """

    folder: Path
    step: int
    forward_passes: int
    seconds: float
    split: str
    metric: str
    before: dict[str, float]
    after: dict[str, float] | None
    evaluation_share: float
    backward_passes: int = 0
    signal: int | None = None


def train(config: Config, *, resume: bool = False, overwrite: bool = False, command: str = "") -> Outcome:
    """Run ``config``, or what is left of it.

    Args:
        resume: continue from the last complete checkpoint in the output folder.
        overwrite: remove what an earlier run left there.
        command: the command line, for the report.

    Raises:
        RunError: the output folder is in use, cannot be written, or holds nothing to resume.
        ConfigError, DataError, ModelError, TaskError: something named in ``config`` is missing or does not fit.
        NonFiniteLossError: a loss was NaN or infinite.
    """
    began = time.monotonic()
    device = pick_device(config.model.device)
    check_reporters(config.run.report_to)
    build_task = task_builder(config)
    splits = read_splits(config)
    folder, start = _folder(config, resume, overwrite)
    repository = None if config.run.push_to_hub is None else models.create_repo(config.run.push_to_hub)
    backend = config.run.backend
    with nullcontext() if backend == "auto" else ops.use(backend):
        model, tokenizer = load_model(config, device)
        task = build_task(tokenizer, model)
        run = _Run(config, folder, start, model, tokenizer, task, splits, command, repository)
        try:
            return run(began)
        finally:
            run.metrics.close()


def build_trainer(
    config: Config, folder: Path, model: Any, tokenizer: Any, task: Task, encoded: dict[str, list[Any]]
) -> ZOTrainer:
    """The trainer of ``config``, whose files go to ``folder``; ``encoded`` holds what the task made of each split."""
    run, fields = config.run, dict(config.method)
    name = fields.pop("name")
    on_cpu = pick_device(config.model.device) == "cpu"
    evaluating = run.eval_every > 0 and "eval" in encoded
    args = TrainingArguments(
        output_dir=str(folder), max_steps=run.steps, per_device_train_batch_size=run.batch_size,
        per_device_eval_batch_size=run.eval_batch_size, gradient_accumulation_steps=run.gradient_accumulation,
        lr_scheduler_type=run.lr_scheduler, warmup_steps=run.warmup_steps, seed=run.seed, data_seed=run.seed,
        train_sampling_strategy="group_by_length" if run.group_by_length else "random",
        eval_strategy="steps" if evaluating else "no", eval_steps=run.eval_every or None,
        save_strategy="steps" if run.save_every else "no", save_steps=run.save_every or run.steps,
        save_total_limit=run.save_total_limit, logging_steps=run.log_every, report_to=run.report_to or "none",
        use_cpu=on_cpu, disable_tqdm=False, dataloader_pin_memory=not on_cpu, remove_unused_columns=False,
        accelerator_config={"non_blocking": not on_cpu},
    )  # fmt: skip
    return ZOTrainer(
        model=model, args=args, task=task, zo_method=name, zo_fields=fields, train_dataset=encoded["train"],
        eval_dataset=encoded.get("eval"), data_collator=task.collate, processing_class=tokenizer,
    )  # fmt: skip


class _Run:
    """One run, from the loaded model to the report."""

    def __init__(
        self, config: Config, folder: Path, start: Path | None, model: Any, tokenizer: Any, task: Task,
        splits: dict[str, list[Any]], command: str, repository: str | None,
    ) -> None:  # fmt: skip
        self.repository = repository
        self.config, self.folder, self.start = config, folder, start
        self.model, self.tokenizer, self.task, self.examples = model, tokenizer, task, splits
        self.encoded = {name: task.dataset(examples) for name, examples in splits.items()}
        self.split = "test" if "test" in splits else "eval"
        self.stop = StopOnSignal()
        self.trainer = build_trainer(config, folder, self.model, tokenizer, task, self.encoded)
        (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
        self.metrics = MetricsWriter(folder / "metrics.jsonl", None if start is None else _step(start))
        self.metrics.write("run" if start is None else "resume", **self._info(command))
        self.trainer.add_callback(self.metrics)
        self.trainer.add_callback(self.stop)

    def __call__(self, began: float) -> Outcome:
        if self.start is None:
            self._measure(0, 0)
        if self.start is not None and _step(self.start) >= self.config.run.steps:
            self.trainer._load_from_checkpoint(str(self.start))  # stopped after the last step, before its end
            step = _step(self.start)
        else:
            with self.stop.listening():
                step = self.trainer.train(resume_from_checkpoint=self.start).global_step
        steps = [row for row in self.metrics.rows if row["kind"] == "step"]
        passes = max((row["forward_passes"] for row in steps), default=0)
        backward = max((row.get("backward_passes", 0) for row in steps), default=0)
        before = self._scores(first=True)
        if self.stop.signal is not None and step < self.config.run.steps:
            return self._outcome(began, step, passes, before, None, backward, self.stop.signal)
        models.save(self.model, self.tokenizer, self.folder / "model")
        self._measure(step, passes)
        outcome = self._outcome(began, step, passes, before, self._scores(first=False), backward)
        self._report(outcome)
        self._publish(outcome)
        return outcome

    def _outcome(
        self, began: float, step: int, passes: int, before: Scores, after: Scores | None, backward: int,
        signal: int | None = None,
    ) -> Outcome:  # fmt: skip
        seconds = time.monotonic() - began
        return Outcome(
            self.folder, step, passes, seconds, self.split, self.task.metric, before, after,
            evaluation_share=self.metrics.evaluating / seconds, backward_passes=backward, signal=signal,
        )  # fmt: skip

    def _info(self, command: str) -> dict[str, Any]:
        return {
            **facts(self.model, self.examples),
            "truncated": self.task.truncated,
            "skipped": self.task.skipped,
            "command": command,
            "config": self.config.model_dump(),
        }

    def _measure(self, step: int, passes: int) -> None:
        """Score eval and test with the present weights, and keep what is answered to the first examples of one."""
        for split in sorted(set(self.examples) - {"train"}):
            done = [row for row in self.metrics.rows if row["kind"] == "eval"]
            if any((row["split"], row["step"]) == (split, step) for row in done):
                continue
            _log.info("evaluating %d examples of %s", len(self.encoded[split]), split)
            began = time.monotonic()
            scores = self.task.evaluate(self.model, self.encoded[split], self.config.run.eval_batch_size)
            self.metrics.evaluation(split, step, passes, scores, time.monotonic() - began)
            metric = self.task.metric
            shown = score(metric, scores[metric])
            _log.info("%s, step %d: %s %s, loss %.4f", split, step, metric, shown, scores["loss"])
        found = self.task.predict(self.model, self.encoded[self.split][:_SHOWN])
        self.metrics.write("predictions", step=step, split=self.split, predictions=found)

    def _scores(self, first: bool) -> Scores:
        rows = [row for row in self.metrics.rows if row["kind"] == "eval" and row["split"] == self.split]
        return {name: value for name, value in rows[0 if first else -1].items() if name not in NOT_SCORES}

    def _report(self, outcome: Outcome) -> None:
        rows = self.metrics.rows
        report.plot(rows, self.folder / "curve.png", split=self.split, metric=outcome.metric)
        found = [row["predictions"] for row in rows if row["kind"] == "predictions"]
        lines = []
        for item, old, new in zip(self.encoded[self.split], found[0], found[-1], strict=False):
            accepted, text = self.task.expected(item), self.tokenizer.decode(item["input_ids"])
            lines.append(report.Line(text, accepted[0], old, new, old in accepted, new in accepted))
        report.write_html(rows, lines, outcome, dump(self.config), self.folder / "report.html")
        result = {**dataclasses.asdict(outcome), "folder": str(outcome.folder)}
        (self.folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    def _publish(self, outcome: Outcome) -> None:
        """The model card, and the model with it on the Hub where that is asked for."""
        config, info = self.config, next(row for row in self.metrics.rows if row["kind"] == "run")
        card = models.model_card(
            config=config.model_dump(), head=head(config), facts=info,
            scores=[row for row in self.metrics.rows if row["kind"] == "eval"], steps=outcome.step,
            forward_passes=outcome.forward_passes, backward_passes=outcome.backward_passes, seconds=outcome.seconds,
            command=info["command"], name=self.repository or self.folder.name,
            location=self.repository or str(self.folder / "model"),
        )  # fmt: skip
        models.write_card(self.folder / "model", card)
        if self.repository is not None:
            place = models.upload(self.folder / "model", self.repository, base_model=config.model.path)
            _log.info("published: %s", place)


def _folder(config: Config, resume: bool, overwrite: bool) -> tuple[Path, Path | None]:
    """The output folder, ready to be written, and the checkpoint to start from."""
    folder = Path(config.run.output_dir)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"run.output_dir: {folder} is a file")
    used = folder.is_dir() and any(folder.iterdir())
    if resume:
        start = checkpoint.last_complete(folder)
        if start is None:
            raise RunError(f"there is no complete checkpoint in {folder} to resume from; start without --resume")
        _same_run(config, folder)
        if (folder / "result.json").is_file() and _step(start) >= config.run.steps:
            raise RunError(f"the run in {folder} has finished its {config.run.steps} steps; raise run.steps to go on")
        return folder, start
    if used and not overwrite:
        raise RunError(f"{folder} is not empty; continue with --resume, start anew with --overwrite, or choose another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        for path in [folder / name for name in _WRITTEN] + list(folder.glob("checkpoint-*")) if used else []:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"run.output_dir: cannot write to {folder}: {error.strerror or error}") from error
    return folder, None


def _same_run(config: Config, folder: Path) -> None:
    earlier, now = flat(load(folder / "config.yaml").model_dump()), flat(config.model_dump())
    changed = [key for key in sorted({*earlier, *now} - _FREE_ON_RESUME) if earlier.get(key) != now.get(key)]
    if changed:
        raise RunError(
            f"the run in {folder} was started with other values of {', '.join(changed)}; "
            f"resume it as it was with: zoengine train {folder} --resume"
        )
    steps = (earlier["run.steps"], now["run.steps"])
    if len(set(steps)) > 1 and not now["run.lr_scheduler"].startswith("constant"):
        raise RunError(
            f"run.steps was {steps[0]} and is now {steps[1]}, which gives another {now['run.lr_scheduler']} schedule"
        )


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])
