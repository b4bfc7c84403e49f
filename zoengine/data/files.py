"""Rows of text files: JSON Lines, JSON, comma- and tab-separated values. Python's standard library only."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from zoengine.data.table import DataError

Numbered = Iterator[tuple[int, dict[str, Any]]]


def rows(path: Path) -> Numbered:
    """(line, row) of every row of a text file, UTF-8; of a .json file, (position counted from 1, row).

    Raises:
        DataError: naming file and line, whatever keeps the file from being read.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from READERS[path.suffix.lower()](path, file)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _separated(path: Path, file: TextIO, **dialect: Any) -> Numbered:
    reader = csv.DictReader(file, **dialect)
    try:
        for row in reader:
            if None in row:
                raise DataError(
                    f"{path}, line {reader.line_num}: more fields than the header has; quote or escape the separator"
                )
            # The reader gives None for fields that a short line does not have.
            if None in row.values():
                raise DataError(
                    f"{path}, line {reader.line_num}: fewer fields than the header has ({', '.join(row)}); fill them in"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.reader.line_num}: not valid CSV: {error}") from error


def _csv(path: Path, file: TextIO) -> Numbered:
    return _separated(path, file, strict=True)


def _tsv(path: Path, file: TextIO) -> Numbered:
    return _separated(path, file, delimiter="\t", quoting=csv.QUOTE_NONE)


def _jsonl(path: Path, file: TextIO) -> Numbered:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, _object(_parsed(line.rstrip(), f"{path}, line {number}"), f"{path}, line {number}")


def _json(path: Path, file: TextIO) -> Numbered:
    content = file.read()
    values = _parsed(content, str(path)) if content.strip() else []
    if not isinstance(values, list):
        raise DataError(f"{path}: expected a JSON list of objects, found {type(values).__name__}")
    for number, value in enumerate(values, start=1):
        yield number, _object(value, f"{path}, row {number}")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise DataError(f"{place}{line}: not valid JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise DataError(f"{place}: not valid JSON: nested too deeply") from error


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected a JSON object, found {type(value).__name__}")
    return value


READERS: dict[str, Callable[[Path, TextIO], Numbered]] = {
    ".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _tsv
}  # fmt: skip
