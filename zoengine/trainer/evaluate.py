"""Measure a model on a task: one that a run has trained, or any other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoengine import config, data, models
from zoengine.trainer import checkpoint
from zoengine.trainer.build import build_task, head, pick_device, read_splits
from zoengine.trainer.run import RunError


def evaluate(target: str, overrides: Sequence[str], split: str, row: str | None = None) -> dict[str, Any]:
    """Accuracy, loss and n of ``target`` on ``split`` ("eval" or "test"), with the model's place and the split's hash.

    Args:
        target: the folder of a run (its final weights, or its last checkpoint), a config file (the model it names,
            untouched), or a model as ``model.path`` takes it.
        overrides: ``key=value``, as for training.
        row: which row of a config file.

    Raises:
        RunError: a run without weights, or a split that is not there.
        ConfigError, DataError, ModelError, TaskError: something named is missing or does not fit.
    """
    path = Path(target)
    is_file = path.suffix in (".yaml", ".yml")
    if row is not None and not is_file:
        raise RunError(f"--row chooses a row of a config file, and {target} is none")
    if (path / "config.yaml").is_file():
        settings, weights = config.load(path, overrides), _weights(path)
    elif is_file:
        settings, weights = config.load(path, overrides, row), None
    else:
        settings, weights = config.for_model(target, overrides), None
    if split not in ("eval", "test"):
        raise RunError(f"--split takes eval or test, got {split!r}")
    examples = read_splits(settings).get(split)
    if examples is None:
        raise RunError(f"the configuration names no {split} data; give data.{split}=FILE")
    model, tokenizer = _load(settings, weights)
    found = build_task(settings, tokenizer)
    scores = found.evaluate(model, found.dataset(examples), settings.run.eval_batch_size)
    place = str(weights or settings.model.path)
    return {**scores, "model": place, "split": split, "split_hash": data.split_hash(examples)}


def _weights(folder: Path) -> Path:
    final = folder / "model"
    found = final if final.is_dir() else checkpoint.last_complete(folder)
    if found is None:
        raise RunError(f"the run in {folder} has saved no weights yet")
    return found


def _load(settings: config.Config, weights: Path | None) -> tuple[Any, Any]:
    how = {
        "dtype": settings.model.dtype, "device": pick_device(settings.model.device), "head": head(settings),
        "seed": settings.run.seed,
    }  # fmt: skip
    if weights is not None and (weights / "adapter_config.json").is_file():
        return models.load(settings.model.path, adapter=weights, **how)
    return models.load(weights or settings.model.path, **how)
