"""What a run is made of, from its configuration: data, model, task, and the facts a result has to be read with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers.integrations import get_available_reporting_integrations

from zoengine import data, models, ops, report
from zoengine.config import Config, ConfigError
from zoengine.config_sections import Problem
from zoengine.config_sections import Task as TaskSection
from zoengine.tasks import (
    Classification,
    Completions,
    Generation,
    LabelSimilarity,
    MaskedPrompt,
    MetricObjective,
    MultipleChoice,
    OptionLikelihood,
    RewardObjective,
    Task,
    TaskError,
    catalog,
    resolve,
    rows,
)
from zoengine.tasks.entry import Entry
from zoengine.tasks.sequences import positions

_HEADS = {"prompt": "lm", "masked": "masked-lm", "similarity": "none"}
# Tokens of an example where the configuration does not say; a masked prompt has a limit of its own.
_LENGTHS = {"prompt": 2048, "masked": None, "head": 128, "similarity": 128}


def load_model(config: Config, device: str) -> tuple[Any, Any]:
    """(model, tokenizer) of ``config``; what its tuning scheme trains requires gradients, the rest is frozen."""
    tuning = config.tuning
    return models.load(
        config.model.path, head=head(config), dtype=config.model.dtype, device=device, seed=config.run.seed,
        tuning=tuning.kind, parameters=tuning.parameters, layers=tuning.layers, lora_r=tuning.lora_r,
        lora_alpha=tuning.lora_alpha, lora_target_modules=tuning.lora_target_modules,
        prefix_tokens=tuning.prefix_tokens, prefix_init=tuning.prefix_init, quantization=tuning.quantization,
    )  # fmt: skip


def head(config: Problem) -> str | int:
    """What :func:`zoengine.models.load` puts on top of the model for this task."""
    return _HEADS[config.task.form] if config.task.form != "head" else len(read_entry(config).labels)


def read_entry(config: Problem) -> Entry:
    """The task's entry: of the catalogue, or made of the description of a custom task.

    Raises:
        TaskError: an unknown task, or a description that makes none.
    """
    task = config.task
    return catalog.custom(**task.description) if task.name == "custom" else catalog.get(task.name)


def max_length(config: Problem, model: Any) -> int | None:
    """Tokens that an example may have: what ``task.max_length`` or the form says, and not more than the model reads."""
    limits = (config.task.max_length or _LENGTHS[config.task.form], positions(model))
    return min((limit for limit in limits if limit is not None), default=None)


def task_builder(config: Problem) -> Callable[[Any, Any], Task]:
    """What makes the task of ``config``, with its objective, for a tokenizer and its model.

    Call this before a model is loaded: whatever is wrong without one is said here.

    Raises:
        TaskError: no such task or objective, or one that has no such form. What is returned raises it for a task that
            does not fit the tokenizer.
    """
    make = _form(config.task, read_entry(config))
    objective = _objective(config.task.objective, make.func)
    return lambda tokenizer, model: objective(make(tokenizer, max_length=max_length(config, model)))


def _objective(name: str, kind: type[Task]) -> Callable[[Task], Task]:
    if name == "cross-entropy":
        return lambda task: task
    if name == "metric":
        MetricObjective.check(kind)
        return MetricObjective
    return partial(RewardObjective, reward=resolve(name))


def _form(task: TaskSection, entry: Entry) -> partial[Task]:
    """The class that asks a model in the form of ``task``, with all it takes but the tokenizer and the length."""
    form = task.form
    if form != "prompt" and entry.kind != "classification":
        raise TaskError(f"task.form {form!r} classifies, and {entry.name} is a {entry.kind}; set task.form to prompt")
    if form == "masked":
        if entry.masked is None:
            raise TaskError(f"no masked prompt is known for {entry.name}; set task.form to prompt or head")
        return partial(MaskedPrompt, masked=entry.masked)
    if form == "head":
        return partial(Classification, options=entry.labels)
    if form == "similarity":
        described = task.descriptions or ()
        if len(described) != len(entry.labels):
            raise TaskError(
                f"task.descriptions has {len(described)} texts; {entry.name} has the labels {', '.join(entry.labels)}"
            )
        LabelSimilarity.check(described)
        return partial(LabelSimilarity, descriptions=described, scale=task.scale)
    if entry.kind == "chat":
        return partial(Completions, max_new_tokens=entry.max_new_tokens)
    if entry.kind == "generation":
        Generation.check(entry.max_new_tokens, task.max_length or _LENGTHS[form])
        return partial(Generation, metric=entry.metric, max_new_tokens=entry.max_new_tokens)
    return partial(OptionLikelihood if entry.kind == "classification" else MultipleChoice)


def read_splits(config: Config, only: Sequence[str] = rows.PARTS) -> dict[str, list[Any]]:
    """The examples of train, eval and test, as far as the configuration has them.

    Raises:
        DataError, TaskError: as :func:`zoengine.tasks.rows.load`.
    """
    given = config.data
    wanted = [
        part for part in only
        if not (part == "eval" and given.num_eval == 0) and not (part == "test" and given.num_test == 0)
    ]  # fmt: skip
    found = rows.load(
        read_entry(config), train=given.train, eval=given.eval, test=given.test,
        seed=config.run.seed if given.split_seed is None else given.split_seed, num_train=given.num_train,
        num_eval=given.num_eval, num_test=given.num_test, k_shot=given.k_shot, official=given.official_splits,
        split_column=given.split_column, parts=wanted,
    )  # fmt: skip
    return {part: examples for part in wanted if (examples := getattr(found, part))}


def facts(model: Any, examples: dict[str, list[Any]]) -> dict[str, Any]:
    """What a result has to be read with: versions, device, backend, how much is trained, and hashes of the data."""
    parameter = next(p for p in model.parameters() if p.requires_grad)
    return {
        **report.environment(),
        "backend": ops.current(parameter.device),
        "device": report.device_name(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "splits": {name: {"n": len(e), "hash": data.split_hash(e)} for name, e in examples.items()},
    }


def check_reporters(names: Sequence[str]) -> None:
    """Raises ConfigError unless transformers can report to all of `names` here."""
    available = [*get_available_reporting_integrations(), "all", "none"]
    for name in names:
        if name not in available:
            raise ConfigError(f"run.report_to: {name!r} is not installed, or unknown; there are {', '.join(available)}")


def pick_device(name: str) -> str:
    """``"cuda"`` or ``"cpu"`` for ``"auto"``; otherwise ``name``.

    Raises:
        ConfigError: CUDA is asked for and not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device: 'cuda' is not available here; use 'cpu' or 'auto'")
    return name
