"""The configuration of a comparison: a run's, with ``methods``, a list, in the place of ``method``.

An entry of ``methods`` holds ``name``, ``lrs`` (the learning rates to try) and any of that method's other fields. It
may have a ``label``, what to call it in the table, so that one method can stand there with several settings.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from zoengine import config, methods
from zoengine.config import Config, ConfigError
from zoengine.config_sections import Count, PositiveInt, Problem, Section

_LABEL = re.compile(r"[A-Za-z0-9][\w.+-]*")


class CompareRun(Section):
    """How much each cell may cost, how often it is repeated, where to."""

    output_dir: str
    budget: PositiveInt
    evaluations: PositiveInt = 4
    seeds: list[Count] = Field([0, 1, 2], min_length=1)
    select: Literal["loss", "metric"] = "loss"
    batch_size: PositiveInt = 16
    gradient_accumulation: PositiveInt = 1
    eval_batch_size: PositiveInt = 32
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    group_by_length: bool = False
    backend: Literal["auto", "reference", "cpp", "triton", "cuda"] = "auto"


class CompareConfig(Problem):
    """A whole comparison."""

    methods: Annotated[list[dict[str, Any]], Field(min_length=1)]
    run: CompareRun


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """One method with its fields, and the configurations of a run for each of its learning rates."""

    label: str
    name: str
    forwards_per_step: int
    steps: int
    configs: dict[float, Config]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked comparison."""

    config: CompareConfig
    entries: list[Entry]

    @property
    def cells(self) -> int:
        """Runs in all: every learning rate with the first seed, then one of them with each other seed."""
        return sum(len(entry.configs) + len(self.config.run.seeds) - 1 for entry in self.entries)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """The comparison in a YAML file, with overrides such as ``run.budget=100``; every method is checked.

    Raises:
        ConfigError: the file cannot be read, or a key or value, of a method's fields too, is not as declared.
    """
    return check(config.read(path, overrides, CompareConfig))


def check(values: Mapping[str, Any]) -> Plan:
    """``values`` as a comparison.

    Raises:
        ConfigError: an unknown key (the nearest known one is suggested), a missing one, or a wrong value.
    """
    found = config.checked(values, CompareConfig)
    if len(set(found.run.seeds)) != len(found.run.seeds):
        raise ConfigError(f"run.seeds: a seed is given twice in {found.run.seeds}")
    if found.data.num_eval == 0 and found.data.eval is None:
        raise ConfigError(
            "data.num_eval is 0: a comparison chooses learning rates by evaluation data; let it have some"
        )
    entries = [_entry(found, k) for k in range(len(found.methods))]
    labels = [entry.label for entry in entries]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ConfigError(f"methods: {twice!r} stands there twice; give one of them another label")
    return Plan(found, entries)


def _entry(found: CompareConfig, position: int) -> Entry:
    given = dict(found.methods[position])
    where = f"methods[{position}]"
    name = given.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{where}.name: expected the name of a method, got {name!r}")
    where = f"{where} ({name})"
    label, lrs = given.pop("label", name), given.pop("lrs", None)
    if not isinstance(label, str) or not _LABEL.fullmatch(label):
        raise ConfigError(f"{where}: label names files too: expected letters, digits, and . + - _, got {label!r}")
    numbers = isinstance(lrs, list) and all(isinstance(lr, int | float) and lr is not True for lr in lrs)
    if not numbers or not lrs or len(set(lrs)) != len(lrs):
        raise ConfigError(f"{where}: lrs must be a list of different learning rates, got {lrs!r}")
    if {"lr", "seed"} & set(given):
        raise ConfigError(f"{where}: lr and seed are not given there; the comparison sets them from lrs and run.seeds")
    first = _run(found, where, {"name": name, "lr": float(lrs[0]), **given}, steps=1)
    kind, fields = methods.get(name), {key: value for key, value in first.method.items() if key != "name"}
    forwards = kind.forwards_per_step(kind.Fields(**fields))
    if forwards > found.run.budget:
        raise ConfigError(f"{where}: one step takes {forwards} forward passes, more than run.budget={found.run.budget}")
    steps = found.run.budget // forwards
    configs = {lr: _run(found, where, {"name": name, "lr": lr, **given}, steps) for lr in map(float, lrs)}
    return Entry(label, name, forwards, steps, configs)


def _run(found: CompareConfig, where: str, method: dict[str, Any], steps: int) -> Config:
    """The configuration of one cell's run, with the first seed."""
    run = found.run
    values = {
        **found.model_dump(include={"model", "data", "task", "tuning"}),
        "method": method,
        "run": {
            "output_dir": run.output_dir, "steps": steps, "seed": run.seeds[0], "batch_size": run.batch_size,
            "gradient_accumulation": run.gradient_accumulation, "eval_batch_size": run.eval_batch_size,
            "lr_scheduler": run.lr_scheduler, "group_by_length": run.group_by_length, "backend": run.backend,
        },
    }  # fmt: skip
    try:
        return config.check(values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def with_seed(made: Config, seed: int) -> Config:
    """The same run with another seed: of the data's order, the new weights and the directions."""
    run = made.run.model_copy(update={"seed": seed})
    return made.model_copy(update={"run": run, "method": {**made.method, "seed": seed}})
