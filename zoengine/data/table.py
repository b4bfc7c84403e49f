"""Rows of data, each with the place it came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


class DataError(ValueError):
    """Data that cannot be used; the message names the file and, where there is one, the line or row."""


class Places(Sequence[str]):
    """``"my.csv, line 3"`` for each row, put together only when a message needs it."""

    def __init__(self, source: str, unit: str, numbers: Sequence[int]) -> None:
        self.source = source
        self._unit = unit
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        return f"{self.source}, {self._unit} {self._numbers[index]}"

    def picked(self, indices: Iterable[int]) -> Places:
        """The places of some of the rows."""
        return Places(self.source, self._unit, [self._numbers[k] for k in indices])


@dataclass(frozen=True)
class Table:
    """Rows, each a dict from column to value, and where each was found. There is at least one.

    Attributes:
        source: what was read, for messages.
    """

    rows: list[dict[str, Any]]
    places: Sequence[str]
    source: str

    def __len__(self) -> int:
        return len(self.rows)


def require(table: Table, columns: Iterable[str]) -> None:
    """Check that every row has every one of ``columns``, though it may be null there.

    Raises:
        DataError: naming the place, the missing column and the columns there are.
    """
    columns = list(columns)
    for row, place in zip(table.rows, table.places, strict=True):
        for column in columns:
            if column not in row:
                found = ", ".join(repr(name) for name in row)
                raise DataError(f"{place}: no column {column!r}; the columns there are {found or 'none'}")
