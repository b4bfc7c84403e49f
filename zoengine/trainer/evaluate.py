"""Measure a model on a task: one that a run has trained, or any other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoengine import config, data, models
from zoengine.tasks.calibration import Calibrated
from zoengine.tasks.in_context import with_demonstrations
from zoengine.trainer import checkpoint
from zoengine.trainer.build import head, max_length, pick_device, read_splits, task_builder
from zoengine.trainer.run import RunError


def evaluate(
    target: str,
    overrides: Sequence[str],
    split: str,
    row: str | None = None,
    *,
    shots: int = 0,
    shots_seed: int = 0,
    null_prompt: str | None = None,
) -> dict[str, Any]:
    """Scores and n of ``target`` on ``split`` ("eval" or "test"), with what they have to be read with.

    Args:
        target: the folder of a run (its final weights, or its last checkpoint), a config file (the model it names,
            untouched), or a model as ``model.path`` takes it.
        overrides: ``key=value``, as for training.
        row: which row of a config file.
        shots: how many solved examples of the training data stand before each prompt; 0 is zero-shot.
        shots_seed: which ones.
        null_prompt: options are scored by how much likelier the prompt makes them than this text does.

    Raises:
        RunError: a run without weights, or a split that is not there.
        ConfigError, DataError, ModelError, TaskError: something named is missing or does not fit.
    """
    settings, weights = _target(target, overrides, row)
    if split not in ("eval", "test"):
        raise RunError(f"--split takes eval or test, got {split!r}")
    if (shots or null_prompt is not None) and (settings.task.form != "prompt" or settings.task.kind == "chat"):
        raise RunError("--shots and --null-prompt change a prompt, which only tasks of form prompt have, and no chat")
    build_task = task_builder(settings)
    splits = read_splits(settings, only=["train", split] if shots else [split])
    if split not in splits:
        raise RunError(f"the configuration names no {split} data; give data.{split}=FILE")
    asked = splits[split]
    if shots:
        asked = with_demonstrations(asked, splits["train"], shots, shots_seed)
    if null_prompt is not None and not asked[0].options[1:]:
        raise RunError(f"--null-prompt is for tasks with options to choose from; {settings.task.name} has none")
    model, tokenizer = _load(settings, weights)
    if null_prompt is None:
        task = build_task(tokenizer, model)
        scores = task.evaluate(model, task.dataset(asked), settings.run.eval_batch_size)
    else:
        task = Calibrated(tokenizer, max_length=max_length(settings, model))
        scores = task.evaluate(model, asked, null_prompt, settings.run.eval_batch_size)
    return {
        **scores,
        "metric": task.metric,
        "shots": shots,
        "null_prompt": null_prompt,
        "truncated": task.truncated,
        "skipped": task.skipped,
        "model": str(weights or settings.model.path),
        "split": split,
        "split_hash": data.split_hash(splits[split]),
    }


def _target(target: str, overrides: Sequence[str], row: str | None) -> tuple[config.Config, Path | None]:
    """The configuration to measure by, and the run's weights; None: those of the model that it names."""
    path = Path(target)
    is_file = path.suffix in (".yaml", ".yml")
    if row is not None and not is_file:
        raise RunError(f"--row chooses a row of a config file, and {target} is none")
    if (path / "config.yaml").is_file():
        return config.load(path, overrides), _weights(path)
    if is_file:
        return config.load(path, overrides, row), None
    return config.for_model(target, overrides), None


def _weights(folder: Path) -> Path:
    final = folder / "model"
    found = final if final.is_dir() else checkpoint.last_complete(folder)
    if found is None:
        raise RunError(f"the run in {folder} has saved no weights yet")
    return found


def _load(settings: config.Config, weights: Path | None) -> tuple[Any, Any]:
    how = {
        "dtype": settings.model.dtype, "device": pick_device(settings.model.device), "head": head(settings),
        "seed": settings.run.seed, "quantization": settings.tuning.quantization,
    }  # fmt: skip
    if weights is not None and (weights / "adapter_config.json").is_file():
        return models.load(settings.model.path, adapter=weights, **how)
    return models.load(weights or settings.model.path, tuning="none", **how)
