"""The points of a sweep: an ordinary run for every combination of the values in a file's section ``sweep``.

``sweep`` maps keys of the configuration to lists of values, such as ``{method.lr: [1e-6, 1e-7], run.seed: [13, 21]}``.
A key that is also given on the command line is held at that value; ``null`` takes back a key that was inherited.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoengine import config
from zoengine.config import Config, ConfigError
from zoengine.config_files import flat, merged

SEED = "run.seed"

_NOT_IN_A_NAME = re.compile(r"[^\w.+-]+")


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """One run: its name, which is its folder's, the values of the swept keys, and its configuration."""

    name: str
    values: dict[str, Any]
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.run.output_dir)

    @property
    def setting(self) -> dict[str, Any]:
        """The values without the seed: points with the same are repetitions."""
        return {key: value for key, value in self.values.items() if key != SEED}

    @property
    def job(self) -> dict[str, Any]:
        """What of the setting says what is to be solved by which method; the rest is chosen by the evaluation data."""
        return {key: value for key, value in self.setting.items() if not is_tuned(key)}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked sweep: every point's configuration is valid. ``keys`` are the swept keys with their values."""

    folder: Path
    keys: dict[str, list[Any]]
    points: list[Point]


def is_tuned(key: str) -> bool:
    """Whether the best value of ``key`` is what a sweep looks for, as opposed to other models, tasks and methods."""
    return key != SEED and key != "method.name" and key.partition(".")[0] in ("method", "run")


def load(path: str | Path, overrides: Sequence[str] = (), row: str | None = None) -> Plan:
    """The sweep in a YAML file, with overrides and the row as for training.

    Raises:
        ConfigError: as for training, of any point; or there is nothing to sweep, or no data to choose by.
    """
    values = config.read(path, overrides, Config, row)
    keys = _keys(values.pop("sweep", None), path)
    for key in (override.partition("=")[0] for override in overrides):
        if key in keys:
            keys[key] = [_at(values, key)]
    if not isinstance(values.get("run"), dict) or not isinstance(values["run"].get("output_dir"), str):
        raise ConfigError("run.output_dir is missing; give it in the file or as run.output_dir=FOLDER")
    folder = Path(values["run"]["output_dir"])
    slow_first = sorted(keys, key=lambda key: key != SEED)  # every setting once, before any is repeated
    labels = _labels(keys)
    points = []
    for combination in itertools.product(*(keys[key] for key in slow_first)):
        given = dict(zip(slow_first, combination, strict=True))
        chosen = {key: given[key] for key in keys}
        name = "_".join(f"{labels[key]}{_text(value)}" for key, value in chosen.items())
        point = merged(values, {"run": {"output_dir": str(folder / name)}})
        for key, value in chosen.items():
            point = merged(point, _nested(key, value))
        try:
            points.append(Point(name, chosen, config.check(point)))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    _same_name_twice(points)
    some = points[0].config
    if some.data.num_eval == 0 and some.data.eval is None and any(len(v) > 1 for k, v in keys.items() if is_tuned(k)):
        raise ConfigError("data.num_eval is 0: a sweep chooses by the evaluation data, never by the test data")
    if some.run.push_to_hub is not None:
        raise ConfigError("run.push_to_hub: the runs of a sweep would replace each other there; publish the best")
    return Plan(folder, keys, points)


def _keys(section: Any, path: str | Path) -> dict[str, list[Any]]:
    if section is not None and not isinstance(section, Mapping):
        raise ConfigError(
            f"sweep takes keys with lists of values, such as {{method.lr: [1e-6, 1e-7]}}, got {section!r}"
        )
    found = {key: values for key, values in flat(section or {}).items() if values is not None}
    if not found:
        raise ConfigError(
            f"{path} has no sweep; it takes keys with lists of values, such as sweep: {{method.lr: [1e-6, 1e-7]}}"
        )
    for key, values in found.items():
        if "." not in key or not isinstance(values, list) or not values:
            raise ConfigError(
                f"sweep: {key!r} must be a key of the configuration with a list of values, got {values!r}"
            )
        if any(values.count(value) > 1 for value in values):
            raise ConfigError(f"sweep.{key}: a value is given twice in {values}")
        if key == "run.output_dir":
            raise ConfigError("sweep: run.output_dir cannot be swept; every point has its own folder in it")
    return found


def _at(values: Mapping[str, Any], key: str) -> Any:
    found: Any = values
    for part in key.split("."):
        found = found[part]
    return found


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _labels(keys: Mapping[str, Any]) -> dict[str, str]:
    """What each key is called in the names of folders: its last part, if that says which it is."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else f"{key}-" for key, name in zip(keys, last, strict=True)}


def _text(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return _NOT_IN_A_NAME.sub("-", text).strip("-")


def _same_name_twice(points: Sequence[Point]) -> None:
    names = [point.name for point in points]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"sweep: two of its points would both have the folder {twice}; make their values differ more")
