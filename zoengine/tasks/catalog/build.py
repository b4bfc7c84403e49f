"""The three shapes of an entry, each from a prompt and a few columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from zoengine.tasks.catalog.fields import Labels, Row, Template
from zoengine.tasks.entry import Entry
from zoengine.tasks.instance import Instance

Prompt = str | Callable[[Row], str]


def classification(
    name: str,
    *,
    prompt: Prompt,
    options: Sequence[str],
    columns: Sequence[str],
    labels: Sequence[str],
    label: str = "label",
    values: Sequence[Any] | None = None,
    texts: Sequence[str] | None = None,
    **fields: Any,
) -> Entry:
    """A classification whose options are the same for all rows.

    prompt: a template, or a function of a row. options, labels (names of the classes) and values (what the column
    ``label`` holds; None: 0, 1, ...) have the same order. columns: that hold texts; they and ``label`` are required.
    texts: templates of one or two texts for models with a head; None: ``columns`` as they are. fields: further ones of
    :class:`Entry`.
    """
    fill = Template(prompt).fill if isinstance(prompt, str) else prompt
    index = Labels(range(len(options)) if values is None else values, labels)
    head = [Template(template) for template in (map("{{{}}}".format, columns) if texts is None else texts)]

    def read(row: Row) -> Instance:
        found = index.index(row, label)
        return Instance(
            prompt=fill(row), options=tuple(options), gold=() if found is None else (found,),
            texts=tuple(template.fill(row) for template in head),
        )  # fmt: skip

    return Entry(
        name=name, kind="classification", columns=(*columns, label), read=read, labels=tuple(labels), **fields
    )  # fmt: skip


def choice(
    name: str,
    *,
    prompt: Prompt,
    options: Callable[[Row], tuple[str, ...]],
    gold: Callable[[Row], tuple[int, ...]],
    columns: Sequence[str],
    **fields: Any,
) -> Entry:
    """A multiple choice whose options each row has for itself; ``gold`` gives the indices of the right ones."""
    fill = Template(prompt).fill if isinstance(prompt, str) else prompt

    def read(row: Row) -> Instance:
        return Instance(prompt=fill(row), options=options(row), gold=gold(row))

    return Entry(name=name, kind="choice", columns=tuple(columns), read=read, **fields)


def generation(
    name: str,
    *,
    prompt: Prompt,
    answers: Callable[[Row], tuple[str, ...]],
    columns: Sequence[str],
    metric: str = "f1",
    completion: str = " {answer}\n",
    **fields: Any,
) -> Entry:
    """A generation: the first of a row's ``answers`` is what the model learns to write, any of them is right."""
    fill = Template(prompt).fill if isinstance(prompt, str) else prompt
    before, after = completion.split("{answer}")

    def read(row: Row) -> Instance:
        found = answers(row)
        if not found:
            return Instance(prompt=fill(row))
        return Instance(prompt=fill(row), options=(before + found[0] + after,), gold=(0,), answers=found)

    return Entry(name=name, kind="generation", columns=tuple(columns), read=read, metric=metric, **fields)
