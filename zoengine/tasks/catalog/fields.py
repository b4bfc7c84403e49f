"""How an entry takes values out of a row: texts, lists of texts, labels, and templates filled with them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

from zoengine.tasks.entry import Row
from zoengine.tasks.instance import TaskError

#: Label values that say that a row has no label: test splits of benchmarks, pairs without a majority in SNLI.
UNLABELLED = ("-1", "-", "nan", "none")


def text(row: Row, column: str) -> str:
    """The text in a column; numbers and truth values as Python writes them.

    Raises:
        TaskError: the column is missing, null, or holds something else.
    """
    if column not in row:
        raise TaskError(f"no column {column!r}; the columns there are {', '.join(map(repr, row))}")
    value = row[column]
    if not isinstance(value, (str, int, float)):
        raise TaskError(f"the column {column!r} should hold a text but holds {_shown(value)}")
    return str(value)


def texts(row: Row, column: str, key: str | None = None) -> tuple[str, ...]:
    """The texts of a column that holds a list of them, or with ``key``, an object with such a list under that key.

    Raises:
        TaskError: the column is missing or holds something else.
    """
    if column not in row:
        raise TaskError(f"no column {column!r}; the columns there are {', '.join(map(repr, row))}")
    value = row[column]
    if key is not None:
        if not isinstance(value, Mapping) or key not in value:
            raise TaskError(f"the column {column!r} should hold an object with {key!r} but holds {_shown(value)}")
        value = value[key]
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, (str, int, float)) for item in value):
        raise TaskError(f"the column {column!r} should hold a list of texts but holds {_shown(value)}")
    return tuple(map(str, value))


class Labels:
    """From the values of a label column to indices, counted from 0.

    Args:
        values: what the column holds, in the order of the indices.
        names: other spellings, in the same order, such as the names of classes whose values are numbers. None: none.
    """

    def __init__(self, values: Sequence[Any], names: Sequence[str] | None = None) -> None:
        self._known: dict[str, int] = {}
        for spellings in (values, names or ()):
            for index, spelling in enumerate(spellings):
                for key in {_key(spelling), *([_key(int(spelling))] if isinstance(spelling, bool) else [])}:
                    if self._known.setdefault(key, index) != index:
                        raise TaskError(f"the label {spelling!r} stands for two options; give each its own label")
        self._shown = ", ".join(map(str, values))

    def index(self, row: Row, column: str) -> int | None:
        """The index of a row's label; None for a row without one (null, -1, NaN or "-").

        Raises:
            TaskError: the column is missing or holds none of the labels.
        """
        if column not in row:
            raise TaskError(f"no column {column!r}; the columns there are {', '.join(map(repr, row))}")
        key = _key(row[column])
        if key in self._known:
            return self._known[key]
        if key in UNLABELLED:
            return None
        raise TaskError(f"label {row[column]!r} in the column {column!r} is not one of {self._shown}")


class Template:
    """A text with ``{column}`` in it; ``{{`` and ``}}`` are braces. Braces in what is filled in stay as they are.

    Attributes:
        columns: the placeholders, each once, in the order of their first use.

    Raises:
        TaskError: braces that do not match, or a placeholder with a format.
    """

    def __init__(self, template: str) -> None:
        self.template = template
        try:
            parsed = list(Formatter().parse(template))
        except ValueError as error:
            raise TaskError(
                f"the prompt {template!r} is not a template: {error}; a brace itself is written twice"
            ) from error
        self._parts: list[tuple[str, str | None]] = []
        for literal, column, form, conversion in parsed:
            if column == "" or form or conversion:
                raise TaskError(f"the prompt {template!r} must have nothing but the name of a column between braces")
            self._parts.append((literal, column))
        self.columns = tuple(dict.fromkeys(column for _, column in self._parts if column is not None))

    def fill(self, row: Row) -> str:
        """The text for a row.

        Raises:
            TaskError: a column is missing or holds no text.
        """
        return "".join(literal + ("" if column is None else text(row, column)) for literal, column in self._parts)


def _key(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)
    return str(value).strip().lower()


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    shown = repr(value)
    return f"{shown if len(shown) <= 60 else shown[:57] + '...'} ({type(value).__name__})"
