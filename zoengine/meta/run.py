"""Meta-training from its configuration: model, batches, and what ends up in the folder.

The folder holds::

    config.yaml  networks.safetensors  metrics.jsonl  scales.png
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from zoengine import data, ops, pertnn, report
from zoengine.config import dump
from zoengine.meta.config import MetaConfig
from zoengine.meta.plot import plot
from zoengine.meta.training import MetaTrainer
from zoengine.tasks import Task
from zoengine.trainer.build import load_model, pick_device, read_splits, task_builder
from zoengine.trainer.interrupt import StopOnSignal
from zoengine.trainer.metrics import MetricsWriter
from zoengine.trainer.run import RunError
from zoengine.trainer.sampler import LengthGroupedSampler

_log = logging.getLogger(__name__)

NETWORKS = "networks.safetensors"
_WRITTEN = ("config.yaml", NETWORKS, "metrics.jsonl", "scales.png")  # all that starting over may remove
_LINE_EVERY = 30.0  # seconds between lines when nobody watches a bar
_AVERAGED = 50  # last steps whose scales are averaged for the plot


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How meta-training ended; ``signal`` is what stopped it early."""

    networks: Path
    blocks: int
    step: int
    forward_passes: int
    backward_passes: int
    seconds: float
    signal: int | None = None


def meta_train(config: MetaConfig, *, overwrite: bool = False, command: str = "") -> Outcome:
    """Learn networks as ``config`` says and write them.

    Ctrl-C and SIGTERM end it after the step at hand. Whatever ends it, the networks of the steps done so far are
    written; every ``save_every`` steps they are written anyway.

    Args:
        overwrite: remove what an earlier meta-training left in the output folder.
        command: the command line, for the metrics.

    Raises:
        RunError: the output folder is in use or cannot be written.
        ConfigError, DataError, ModelError, TaskError: something named in ``config`` is missing or does not fit.
        NonFiniteLossError: a loss or gradient was NaN or infinite.
    """
    began = time.monotonic()
    device = pick_device(config.model.device)
    build_task = task_builder(config)
    examples = read_splits(config, only=["train"])["train"]
    folder = _folder(Path(config.run.output_dir), overwrite)
    with nullcontext() if config.run.backend == "auto" else ops.use(config.run.backend):
        model, tokenizer = load_model(config, device)
        task = build_task(tokenizer, model)
        encoded = task.dataset(examples)
        epoch = -(-len(encoded) // config.run.batch_size)
        metrics = MetricsWriter(folder / "metrics.jsonl")
        (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
        about = {"model": config.model.path, "task": config.task.name, "tuning": config.tuning.kind}
        cycle = config.meta["cycle_epochs"] * epoch
        with MetaTrainer(model, cycle_steps=cycle, **config.meta) as trainer:
            parameter = trainer.arena.parameters[0]
            metrics.write(
                "run", **report.environment(), backend=ops.current(parameter.device),
                device=report.device_name(parameter.device), dtype=str(parameter.dtype).removeprefix("torch."),
                trainable_parameters=trainer.arena.numel, blocks=len(trainer.arena.segments), cycle_steps=cycle,
                splits={"train": {"n": len(examples), "hash": data.split_hash(examples)}}, command=command,
                config=config.model_dump(),
            )  # fmt: skip
            try:
                stopped = _loop(config, trainer, task, encoded, metrics, folder, about)
            finally:
                if trainer.step_number:
                    _save(folder, trainer, about)
                metrics.close()
        plot(metrics.rows, folder / "scales.png")
    return Outcome(
        folder / NETWORKS, len(trainer.arena.segments), trainer.step_number, trainer.forward_passes,
        trainer.backward_passes, time.monotonic() - began, stopped,
    )  # fmt: skip


def _loop(
    config: MetaConfig, trainer: MetaTrainer, task: Task, encoded: list[Any], metrics: MetricsWriter, folder: Path,
    about: dict[str, str],
) -> int | None:  # fmt: skip
    run, model = config.run, trainer.model
    stop, began, logs = StopOnSignal(), time.monotonic(), []
    progress = _Progress(run.steps)
    with stop.listening(), progress:
        lengths = [len(item["input_ids"]) if run.group_by_length else 0 for item in encoded]
        for indices in batches(lengths, run.batch_size, run.seed):
            batch = task.on_device(model, [encoded[k] for k in indices])
            row = trainer.step(lambda batch=batch: task.loss(model, batch))
            metrics.write("step", **row, seconds=round(time.monotonic() - began, 3))
            logs = [*logs[1 - _AVERAGED :], trainer.last_scales.log()]
            progress.show(row)
            if run.save_every and row["step"] % run.save_every == 0:
                _save(folder, trainer, about)
            if row["step"] == run.steps or stop.signal is not None:
                break
    average = torch.stack(logs).mean(0).exp().tolist()
    names = [name for name, _ in trainer.networks.blocks]
    metrics.write("scales", averaged=len(logs), scales=dict(zip(names, average, strict=True)))
    return stop.signal if trainer.step_number < run.steps else None


def batches(lengths: list[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Indices of batches of like length without end; the order depends on seed and epoch alone."""
    sampler = LengthGroupedSampler(lengths, batch_size, seed)
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        order = list(sampler)
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]
        epoch += 1


class _Progress:
    """A bar with the time left on a terminal, a line now and then anywhere else."""

    def __init__(self, steps: int, stream: TextIO | None = None) -> None:
        self._steps, self._stream = steps, stream or sys.stderr
        self._bar = None

    def __enter__(self) -> _Progress:
        self._began, self._last_line = time.monotonic(), float("-inf")
        if self._stream.isatty():
            self._bar = tqdm(total=self._steps, desc="meta-train", unit="step", dynamic_ncols=True, file=self._stream)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, row: dict[str, Any]) -> None:
        text = f"loss {row['loss']:.4f}, scales {row['scale_min']:.2f} to {row['scale_max']:.2f}"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
        elif time.monotonic() - self._last_line >= _LINE_EVERY or row["step"] == self._steps:
            self._last_line = time.monotonic()
            left = (self._last_line - self._began) / row["step"] * (self._steps - row["step"])
            self._stream.write(f"step {row['step']}/{self._steps}  {text}  {tqdm.format_interval(left)} left\n")
            self._stream.flush()


def _save(folder: Path, trainer: MetaTrainer, about: dict[str, str]) -> None:
    fields = dataclasses.asdict(trainer.fields)
    how = {name: str(fields[name]) for name in ("zoft_reading", "feed_normalised")}  # zo-finetuner compares these
    steps = {"steps": str(trainer.step_number), "meta": json.dumps(fields)}
    pertnn.save(trainer.networks, folder / NETWORKS, {**about, **how, **steps})


def _folder(folder: Path, overwrite: bool) -> Path:
    if folder.exists() and not folder.is_dir():
        raise RunError(f"run.output_dir: {folder} is a file")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise RunError(f"{folder} is not empty; start anew with --overwrite, or choose another run.output_dir")
        for name in _WRITTEN:
            (folder / name).unlink(missing_ok=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").touch()
    except OSError as error:
        raise RunError(f"run.output_dir: cannot write to {folder}: {error.strerror or error}") from error
    return folder
