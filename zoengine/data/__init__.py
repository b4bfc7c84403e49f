"""Labelled sentences: the embedded movie reviews, and a reader for a user's own file.

>>> from zoengine.data import movie_reviews
>>> train = movie_reviews("train")          # 1,500 short sentences, label 0 negative or 1 positive

Nothing here needs more than Python's standard library.
"""

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

__all__ = ["DataError", "Example", "movie_reviews", "read_examples", "split_hash"]


class DataError(ValueError):
    """A data file that cannot be used; the message names the file and, where there is one, the line."""


class Example(NamedTuple):
    """One labelled text. `label` is the index of the right option, counted from 0."""

    text: str
    label: int


def movie_reviews(split: str) -> list[Example]:
    """The embedded movie-review sentences of `split`: "train" (1,500), "dev" (300) or "test" (500).

    English sentences of 4 to 12 words; label 1 where 20 human raters found the sentence positive on average, 0 where
    negative; both labels equally often in each split, no sentence twice. Origin and licence: NOTICE.md in this folder.
    Raises DataError for another split.
    """
    with resources.as_file(resources.files(__name__) / "movie_reviews.tsv") as path:
        return read_examples(path, split=split)


def read_examples(
    path: str | Path,
    *,
    options: Sequence[str] = ("0", "1"),
    split: str | None = None,
    text_column: str = "text",
    label_column: str = "label",
    split_column: str = "split",
) -> list[Example]:
    """Labelled texts from a UTF-8 file: .tsv (no quoting), .csv (quoted the usual way), or .jsonl (one object a line).

    A label is the name of one of `options` ("negative"/"positive", say) and becomes its index. With `split` given, only
    the rows whose `split_column` has that value are read. Raises DataError naming the file and line for: a file that is
    missing, of another kind or not UTF-8; a missing column; an empty text; a label outside `options`; no rows.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no data file at {path}; give the path of a .tsv, .csv or .jsonl file")
    needed = [text_column, label_column] + ([split_column] if split is not None else [])
    index = {name: i for i, name in enumerate(options)}
    examples: list[Example] = []
    splits_seen: set[str] = set()
    for line, row in _rows(path):
        if None in row:
            raise DataError(f"{path}, line {line}: more fields than the header has; quote or escape the separator")
        for column in needed:
            if row.get(column) is None:
                found = ", ".join(repr(name) for name in row)
                raise DataError(f"{path}, line {line}: no column {column!r}; the columns there are {found or 'none'}")
        if split is not None:
            splits_seen.add(str(row[split_column]))
            if str(row[split_column]) != split:
                continue
        text, label = str(row[text_column]).strip(), str(row[label_column]).strip()
        if not text:
            raise DataError(f"{path}, line {line}: the column {text_column!r} is empty; remove the row or fill it")
        if label not in index:
            raise DataError(f"{path}, line {line}: label {label!r} is not one of the options {', '.join(index)}")
        examples.append(Example(text, index[label]))
    if not examples and split is not None:
        raise DataError(f"{path}: no row of split {split!r}; splits there: {', '.join(sorted(splits_seen)) or 'none'}")
    if not examples:
        raise DataError(f"{path}: no rows; expected at least one")
    return examples


def split_hash(examples: Sequence[Example]) -> str:
    """16 hexadecimal digits that change with any text, label or the order: quote them beside a result."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.label}\t{example.text}\n".encode())
    return digest.hexdigest()[:16]


def _rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, row as a dict) for every row of `path`."""
    kind = path.suffix.lower()
    if kind not in (".tsv", ".csv", ".jsonl"):
        raise DataError(f"{path}: unknown kind {path.suffix or 'without a suffix'!r}; expected .tsv, .csv or .jsonl")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if kind == ".jsonl":
                yield from _json_rows(path, file)
            else:
                tsv = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {"strict": True}
                reader = csv.DictReader(file, **tsv)
                for row in reader:
                    yield reader.line_num, row
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.reader.line_num}: not valid CSV: {error}") from error


def _json_rows(path: Path, file) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not valid JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
        yield number, row
