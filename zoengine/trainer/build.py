"""What a run is made of, from its configuration: data, model, task, and the facts a result has to be read with."""

from __future__ import annotations

from typing import Any

import torch

from zoengine import data, models, ops, report
from zoengine.config import Config, ConfigError
from zoengine.data import Example
from zoengine.tasks import Classification, Instance, LabelledTexts, LabelSimilarity, OptionLikelihood

EMBEDDED = "movie-reviews"
_SPLITS = {"train": "train", "eval": "dev", "test": "test"}


def load_model(config: Config, device: str) -> tuple[Any, Any]:
    """(model, tokenizer) of ``config``, ready to be tuned as it says."""
    tuning = config.tuning
    return models.load(
        config.model.path, head=head(config), dtype=config.model.dtype, device=device, seed=config.run.seed,
        tuning=tuning.kind, lora_r=tuning.lora_r, lora_alpha=tuning.lora_alpha,
        lora_target_modules=tuning.lora_target_modules, parameters=tuning.parameters,
    )  # fmt: skip


def head(config: Config) -> str | int:
    """The head that the task of ``config`` needs, as :func:`zoengine.models.load` takes it."""
    return {"classification": len(config.data.options), "label-similarity": "none"}.get(config.task.name, "lm")


def build_task(config: Config, tokenizer: Any) -> LabelledTexts:
    """The task of ``config`` for a tokenizer."""
    task = config.task
    if task.name == "classification":
        return Classification(tokenizer, options=config.data.options, max_length=task.max_length)
    if task.name == "label-similarity":
        return LabelSimilarity(tokenizer, descriptions=task.descriptions, scale=task.scale, max_length=task.max_length)
    found = OptionLikelihood(tokenizer, max_length=task.max_length)
    found.label_names = [word.strip() for word in task.label_words]
    found.bridge = lambda example: Instance(
        task.template.replace("{text}", example.text), tuple(task.label_words), (example.label,), texts=(example.text,)
    )
    return found


def facts(model: Any, examples: dict[str, list[Example]]) -> dict[str, Any]:
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


def read_splits(config: Config) -> dict[str, list[Example]]:
    """The examples of train, eval and test, as far as the configuration names them."""
    found = {}
    for name, split in _SPLITS.items():
        source = getattr(config.data, name)
        if source is None:
            continue
        if source == EMBEDDED:
            examples = data.movie_reviews(split)
        else:
            examples = data.read_examples(
                source, options=config.data.options, split=split if config.data.split_column else None,
                text_column=config.data.text_column, label_column=config.data.label_column,
                split_column=config.data.split_column or "split",
            )  # fmt: skip
        limit = getattr(config.data, f"{name}_limit", None)
        found[name] = examples[:limit]
    return found


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
