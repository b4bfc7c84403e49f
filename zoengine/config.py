"""The configuration of a run: one tree of checked values, from YAML and ``key=value`` overrides.

Only the fields of the method are declared elsewhere: they are its own ``Fields`` (:mod:`zoengine.methods`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from zoengine import config_files, methods
from zoengine.config_files import ConfigError
from zoengine.methods.fields import build, nearest, of_run

PositiveInt = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Model(_Section):
    """Which model, in which precision, where."""

    path: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Data(_Section):
    """Labelled texts. ``movie-reviews`` is the embedded set; anything else is a .tsv, .csv or .jsonl file."""

    train: str = "movie-reviews"
    eval: str | None = "movie-reviews"
    test: str | None = None
    options: list[str] = ["0", "1"]
    text_column: str = "text"
    label_column: str = "label"
    split_column: str | None = None
    eval_limit: PositiveInt | None = None
    test_limit: PositiveInt | None = None


class Task(_Section):
    """Classification: by the label word that a language model expects after a prompt, by a head on any model, or by
    the similarity of an encoder's embeddings of text and label."""

    name: Literal["prompt-classification", "classification", "label-similarity"] = "prompt-classification"
    template: str = "{text} It was"
    label_words: list[str] = [" terrible", " great"]
    descriptions: list[str] = ["A terrible film.", "A great film."]
    scale: Annotated[float, Field(gt=0)] = 20.0
    max_length: PositiveInt = 2048

    @model_validator(mode="after")
    def _keys_of_this_task(self) -> Task:
        own = {"prompt-classification": ("template", "label_words"), "label-similarity": ("descriptions", "scale")}
        for task, keys in own.items():
            for key in keys if task != self.name else ():
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} belongs to the task {task}, not to {self.name}")
        return self


class Tuning(_Section):
    """Which parameters are trained: all, the adapters of LoRA, or those whose name matches a regular expression."""

    kind: Literal["full", "lora", "subset"] = "full"
    parameters: str = ""
    lora_r: PositiveInt = 8
    lora_alpha: float = 16.0
    lora_target_modules: list[str] | str = ["q_proj", "v_proj"]


class Run(_Section):
    """How long, how often, where to."""

    output_dir: str
    steps: PositiveInt
    batch_size: PositiveInt = 16
    gradient_accumulation: PositiveInt = 1
    eval_batch_size: PositiveInt = 32
    eval_every: Count = 0
    save_every: Count = 0
    save_total_limit: PositiveInt = 2
    log_every: PositiveInt = 10
    lr_scheduler: Literal["constant", "linear", "cosine", "constant_with_warmup"] = "constant"
    warmup_steps: Count = 0
    group_by_length: bool = False
    seed: Count = 0
    report_to: list[str] = []
    backend: Literal["auto", "reference", "cpp", "triton", "cuda"] = "auto"


class Config(_Section):
    """A whole run. ``method`` holds ``name`` and that method's fields, all of them, defaults filled in."""

    model: Model
    data: Data = Data()
    task: Task = Task()
    tuning: Tuning = Tuning()
    method: dict[str, Any]
    run: Run

    @field_validator("data")
    @classmethod
    def _trainable(cls, data: Data) -> Data:
        if data.eval is None and data.test is None:
            raise ValueError("give eval or test, or there is nothing to measure")
        return data


def load(path: str | Path, overrides: Sequence[str] = (), row: str | None = None) -> Config:
    """The configuration in a YAML file, or of the run in a folder, with overrides such as ``run.steps=200``.

    A file's ``sweep`` is for ``zoengine sweep``; here it is left aside.

    Raises:
        ConfigError: the file cannot be read, a key or value is not as declared here, or there is no such row.
    """
    values = read(path, overrides, Config, row)
    values.pop("sweep", None)
    return check(values)


def read(path: str | Path, overrides: Sequence[str], root: type[BaseModel], row: str | None = None) -> dict[str, Any]:
    """What :func:`zoengine.config_files.read` finds, in a file with the sections of ``root``; nothing is checked yet.

    Raises:
        ConfigError: the file, or one that it inherits, cannot be read or is no mapping, or there is no such row.
    """
    return config_files.read(path, overrides, root.model_fields, row)


def for_model(path: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration with which the model ``path`` is measured, not trained; overrides as in :func:`load`."""
    values = {"model": {"path": path}, "method": {"lr": 0.0}, "run": {"output_dir": ".", "steps": 1}}
    return check(config_files.overridden(values, overrides))


def check(values: Mapping[str, Any]) -> Config:
    """``values`` as a configuration.

    Raises:
        ConfigError: an unknown key (the nearest known one is suggested), a missing one, or a wrong value.
    """
    try:
        config = Config.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(message(error, Config)) from None
    fields = dict(config.method)
    name = fields.pop("name", "mezo")
    if not isinstance(name, str):
        raise ConfigError(f"method.name: expected the name of a method, got {name!r}")
    try:
        kind = methods.get(name).Fields
        checked = build(kind, {**of_run(kind, config.run.seed, config.run.steps), **fields}, f"method {name!r}")
    except methods.FieldError as error:
        raise ConfigError(f"method: {error}") from None
    return config.model_copy(update={"method": {"name": name, **vars(checked)}})


def dump(config: Config) -> str:
    """YAML that :func:`load` reads back to the same configuration."""
    return yaml.dump(config.model_dump(), Dumper=yaml.SafeDumper, sort_keys=False, allow_unicode=True)


def message(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem of ``error``, in a configuration of the type ``root``, as one line."""
    first, *others = error.errors()
    key = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("list[", "str", "constrained")))
    more = f" (and {len(others)} more such problems)" if others else ""
    if first["type"] == "extra_forbidden":
        section = root
        for part in first["loc"][:-1]:
            section = section.model_fields[part].annotation
        return f"unknown key {key!r}{nearest(str(first['loc'][-1]), section.model_fields)}{more}"
    if first["type"] == "missing":
        return f"{key} is missing; give it in the file or as {key}=VALUE{more}"
    text = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    return f"{key}: {text}, got {first['input']!r}{more}"
