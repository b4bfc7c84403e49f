"""The configuration of a run: one tree of checked values, from YAML and ``key=value`` overrides.

Only the fields of the method are declared elsewhere: they are its own ``Fields`` (:mod:`zoengine.methods`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from zoengine import config_files, methods
from zoengine.config_files import ConfigError
from zoengine.config_sections import Config, Section, Task
from zoengine.methods.fields import build, nearest, of_run

Root = TypeVar("Root", bound=Section)


def load(path: str | Path, overrides: Sequence[str] = (), row: str | None = None) -> Config:
    """The configuration in a YAML file, or of the run in a folder, with overrides such as ``run.steps=200``.

    A file's ``sweep`` is for ``zoengine sweep``; here it is left aside.

    Raises:
        ConfigError: the file cannot be read, a key or value is not as declared here, or there is no such row.
    """
    values = read(path, overrides, Config, row)
    values.pop("sweep", None)
    return check(values)


def read(path: str | Path, overrides: Sequence[str], root: type[Section], row: str | None = None) -> dict[str, Any]:
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
    config = checked(values, Config)
    fields = dict(config.method)
    name = fields.pop("name", "mezo")
    if not isinstance(name, str):
        raise ConfigError(f"method.name: expected the name of a method, got {name!r}")
    try:
        kind = methods.get(name).Fields
        built = build(kind, {**of_run(kind, config.run.seed, config.run.steps), **fields}, f"method {name!r}")
    except methods.FieldError as error:
        raise ConfigError(f"method: {error}") from None
    if methods.get(name).backwards_per_step:
        need_gradient(config.task, f"method {name!r}")
    return config.model_copy(update={"method": {"name": name, **vars(built)}})


def checked(values: Mapping[str, Any], root: type[Root]) -> Root:
    """``values`` as a ``root``, whose fields are sections.

    Raises:
        ConfigError: as :func:`check`; what a section takes as it is, such as ``method``, is not looked into.
    """
    try:
        return root.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(_message(error, root)) from None


def need_gradient(task: Task, who: str) -> None:
    """Raises ConfigError if the objective of ``task`` has no gradient, without which ``who`` cannot work."""
    if task.objective != "cross-entropy":
        raise ConfigError(
            f"task.objective: {who} follows the gradient of the loss, and {task.objective!r} has none; take "
            "cross-entropy, or a zeroth-order method"
        )


def dump(config: Section) -> str:
    """YAML that :func:`load` reads back to the same configuration."""
    return yaml.dump(config.model_dump(), Dumper=yaml.SafeDumper, sort_keys=False, allow_unicode=True)


def _message(error: ValidationError, root: type[Section]) -> str:
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
    given = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"
    return f"{key}: {text}{given}{more}"
