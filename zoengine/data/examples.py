"""Labelled texts: one text column, one label column."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from zoengine.data.sources import read
from zoengine.data.table import DataError, require


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
    return [Example(row["text"].strip(), int(row["label"])) for row in read("movie-reviews", split=split).rows]


def read_examples(
    path: str | Path,
    *,
    options: Sequence[str] = ("0", "1"),
    split: str | None = None,
    text_column: str = "text",
    label_column: str = "label",
    split_column: str = "split",
) -> list[Example]:
    """Labelled texts from any source that :func:`zoengine.data.read` takes.

    A label is the name of one of `options` ("negative"/"positive", say) and becomes its index. With `split` given, only
    the rows whose `split_column` has that value are read. Raises DataError naming the place of whatever is wrong: what
    `read` refuses, a missing column, an empty text, a label outside `options`.
    """
    table = read(path, split=split, split_column=None if split is None else split_column)
    require(table, (text_column, label_column))
    index = {name: i for i, name in enumerate(options)}
    examples = []
    for row, place in zip(table.rows, table.places, strict=True):
        text, label = (str(row[column]).strip() for column in (text_column, label_column))
        if not text:
            raise DataError(f"{place}: the column {text_column!r} is empty; remove the row or fill it")
        if label not in index:
            raise DataError(f"{place}: label {label!r} is not one of the options {', '.join(index)}")
        examples.append(Example(text, index[label]))
    return examples
