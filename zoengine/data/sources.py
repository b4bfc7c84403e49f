"""One function that reads any source of rows."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from zoengine.data import arrow, files
from zoengine.data.table import DataError, Places, Table

#: What needs no file: these rows come with the package.
EMBEDDED = ("movie-reviews",)


def read(source: str | Path, *, split: str | Sequence[str] | None = None, split_column: str | None = None) -> Table:
    """The rows of ``source``, at least one.

    Args:
        source: ``"movie-reviews"`` (embedded), a file (.jsonl: one object a line; .json: a list of objects; .csv; .tsv:
            no quoting; .parquet), a folder that ``datasets``' ``save_to_disk`` wrote, or ``"hub:PATH"`` or
            ``"hub:PATH:CONFIG"`` on the Hugging Face Hub.
        split: its name; of several names, the first there is taken. A file without ``split_column`` is one split,
            whatever it is called. None: the only split there is.
        split_column: of a file, the column that names each row's split.

    Raises:
        DataError: naming the source and, where there is one, the file and the line or row.
    """
    splits = [split] if isinstance(split, str) else list(split or ())
    if source in EMBEDDED:
        with resources.as_file(resources.files("zoengine.data") / "movie_reviews.tsv") as path:
            return _selected(_file(path, str(source)), splits, "split")
    if str(source).startswith("hub:"):
        if split_column is not None:
            raise DataError(f"{source}: has splits of its own; leave out split_column, here {split_column!r}")
        name, found = arrow.hub(str(source).removeprefix("hub:"), splits)
        return _table(f"{source} ({name})" if name else str(source), "row", range(1, len(found) + 1), found)
    path = Path(source)
    if path.is_dir():
        name, found = arrow.saved(path, splits)
        table = _table(f"{path} ({name})" if name else str(path), "row", range(1, len(found) + 1), found)
        if split_column is not None and name:
            raise DataError(f"{path}: has splits of its own; leave out split_column, here {split_column!r}")
    else:
        table = _file(path, str(path))
    return table if split_column is None else _selected(table, splits, split_column)


def _file(path: Path, source: str) -> Table:
    kind = path.suffix.lower()
    if not path.is_file():
        hint = "; data on the Hugging Face Hub is named hub:PATH or hub:PATH:CONFIG" if not kind else ""
        raise DataError(f"no data file at {path}; give one that is {arrow.LOCAL}{hint}")
    if kind == ".parquet":
        found = arrow.parquet(path)
        return _table(source, "row", range(1, len(found) + 1), found)
    if kind not in files.READERS:
        raise DataError(f"{path}: unknown kind {kind or 'without a suffix'!r}; expected {arrow.LOCAL}")
    numbered = list(files.rows(path))
    unit = "row" if kind == ".json" else "line"
    return _table(source, unit, [number for number, _ in numbered], [row for _, row in numbered])


def _table(source: str, unit: str, numbers: Sequence[int], rows: list[dict]) -> Table:
    if not rows:
        raise DataError(f"{source}: no rows; expected at least one")
    return Table(rows, Places(source, unit, numbers), source)


def _selected(table: Table, splits: Sequence[str], column: str) -> Table:
    """The rows of the first of ``splits`` that ``column`` holds."""
    for row, place in zip(table.rows, table.places, strict=True):
        if column not in row:
            raise DataError(f"{place}: no column {column!r}; the columns there are {', '.join(map(repr, row))}")
    there = dict.fromkeys(str(row[column]) for row in table.rows)
    name = next((split for split in splits if split in there), None)
    if name is None:
        asked = f"no row of split {' or '.join(map(repr, splits))}" if splits else "a split has to be asked for"
        raise DataError(f"{table.source}: {asked}; splits there: {', '.join(sorted(there))}")
    chosen = [k for k, row in enumerate(table.rows) if str(row[column]) == name]
    return Table([table.rows[k] for k in chosen], table.places.picked(chosen), f"{table.source} ({name})")
