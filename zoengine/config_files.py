"""Configuration files before they are checked: YAML, ``inherit``, ``rows``, ``key=value`` overrides.

``inherit: other.yaml`` (or a list of files, the later ones winning) puts another file beneath this one; paths are
relative to the file they stand in. Mappings are merged key by key, anything else is replaced. ``rows`` holds named
partial configurations, of which one is chosen and laid over the rest; a row may inherit files too. In ``sweep`` a key
such as ``method.lr`` may be written with its dots.

``run.output_dir`` may hold ``{row}`` and keys such as ``{task.name}``, so that runs of one file do not share a folder,
and so may ``method.zoft_file``.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

Values = dict[str, Any]

_PATHS = ("run.output_dir", "method.zoft_file")
_KEY_IN_PATH = re.compile(r"\{([a-z_]\w*(?:\.\w+)*)\}")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, what it takes and what was given."""


def read(path: str | Path, overrides: Sequence[str], sections: Iterable[str], row: str | None = None) -> Values:
    """What stands in the file, or in the run's folder, with what it inherits, its row and the overrides.

    Args:
        path: a YAML file, or the folder of a run, whose ``run.output_dir`` is then the folder itself.
        overrides: such as ``run.steps=200``.
        sections: what the file holds, for the error that says so.
        row: which of the file's rows; required if it has any.

    Raises:
        ConfigError: a file cannot be read, is no mapping, inherits itself, or has no such row.
    """
    path, folder = Path(path), None
    if (path / "config.yaml").is_file():
        path, folder = path / "config.yaml", path
    values = _with_row(_resolved(path, (), sections, row), row, path)
    if folder is not None:  # it may have been moved
        overrides = [f"run.output_dir={json.dumps(str(folder))}", *overrides]
    values = overridden(values, overrides)
    return values if folder is not None else _placed(values, row)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> Values:
    """``base`` with ``over`` laid on it: mappings key by key, anything else replaced. Neither is changed."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        result[key] = merged(below, value) if both else copy.deepcopy(value)
    return result


def flat(values: Mapping[str, Any]) -> Values:
    """The leaves of nested mappings under their dotted keys."""
    result: Values = {}
    for key, value in values.items():
        inside = flat(value) if isinstance(value, Mapping) else None
        result |= {f"{key}.{name}": leaf for name, leaf in inside.items()} if inside is not None else {str(key): value}
    return result


def overridden(values: Mapping[str, Any], overrides: Sequence[str]) -> Values:
    """``values`` with overrides such as ``run.steps=200``.

    Raises:
        ConfigError: an override is not of that form, or goes through something that is no section.
    """
    result = copy.deepcopy(dict(values))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} is not of the form key=value, for example run.steps=200")
        *sections, last = key.split(".")
        place = result
        for depth, section in enumerate(sections, start=1):
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"override {override!r}: {'.'.join(sections[:depth])} is no section but {place!r}")
        place[last] = parse(text, f"override {override!r}")
    return result


def _resolved(path: Path, above: tuple[Path, ...], sections: Iterable[str], row: str | None) -> Values:
    """The file with what it inherits; ``above`` are the files that led here."""
    if path.resolve() in above:
        chain = " inherits ".join(str(file) for file in (*above[above.index(path.resolve()) :], path.resolve()))
        raise ConfigError(f"a configuration inherits itself: {chain}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        wanted_by = f", which {above[-1]} inherits" if above else ""
        raise ConfigError(f"there is no config file {path}{wanted_by}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    values = parse(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping with the sections {', '.join(sections)}")
    return _inherited(values, path, above, sections, row)


def _inherited(values: Values, path: Path, above: tuple[Path, ...], sections: Iterable[str], row: str | None) -> Values:
    """``values``, which stand in the file ``path``, on top of the files that they inherit; of the rows only ``row``."""
    named = values.pop("inherit", [])
    files = [named] if isinstance(named, str) else named
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise ConfigError(f"{path}: inherit takes a file or a list of files, got {named!r}")
    if isinstance(values.get("sweep"), dict):
        values["sweep"] = _undotted(values["sweep"])
    base: Values = {}
    for file in files:
        base = merged(base, _resolved(path.parent / file, (*above, path.resolve()), sections, row))
    rows = values.get("rows", {})
    if not isinstance(rows, dict) or not all(isinstance(n, str) and isinstance(r, dict) for n, r in rows.items()):
        raise ConfigError(f"{path}: rows must map names to partial configurations, got {rows!r}")
    if row in rows:
        rows[row] = _inherited(rows[row], path, above, sections, None)
    return merged(base, values)


def _undotted(section: Values) -> Values:
    result: Values = {}
    for key, value in section.items():
        for part in reversed(str(key).split(".")):
            value = {part: value}
        result = merged(result, value)
    return result


def _with_row(values: Values, row: str | None, path: Path) -> Values:
    rows = values.pop("rows", {})
    if row is None:
        if rows:
            raise ConfigError(f"{path} has rows; choose one with --row NAME: {', '.join(rows)}")
        return values
    if row not in rows:
        known = f"it has {', '.join(rows)}" if rows else "it has none"
        raise ConfigError(f"{path} has no row {row!r}; {known}")
    return merged(values, rows[row])


def _placed(values: Values, row: str | None) -> Values:
    """``values`` with the keys in braces in its paths filled in."""
    leaves = {**flat(values), "row": row}
    for path in (key for key in _PATHS if isinstance(leaves.get(key), str)):
        text = leaves[path]

        def value(match: re.Match[str], path: str = path, text: str = text) -> str:
            found = leaves.get(match[1])
            if found is None or isinstance(found, list):
                raise ConfigError(f"{path}: {text!r} needs a value for {match[1]}; give one, or another path")
            return str(found).rstrip("/").rpartition("/")[2]  # of the model owner/name: name

        section, _, key = path.partition(".")
        values = merged(values, {section: {key: _KEY_IN_PATH.sub(value, text)}})
    return values


class _Loader(yaml.SafeLoader):
    """YAML with floats as people write them (``1e-6``; YAML 1.1 wants ``1.0e-6``) and no key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse(text: str, where: str) -> Any:
    """``text`` as YAML; ``where`` it stands is for the error.

    Raises:
        ConfigError: it is no valid YAML; the message names the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}" if mark is not None else where
        raise ConfigError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
