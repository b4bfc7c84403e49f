"""An entry for a user's own rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from zoengine.methods.fields import nearest
from zoengine.tasks import chat
from zoengine.tasks.catalog.build import choice, classification, generation
from zoengine.tasks.catalog.fields import Labels, Row, Template, text, texts
from zoengine.tasks.entry import Entry, Kind
from zoengine.tasks.instance import TaskError

#: The metrics of each kind of task, the default first.
METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy",), "choice": ("accuracy",), "generation": ("f1", "exact_match"),
    "chat": ("token_accuracy",),
}  # fmt: skip
_ALL_ROWS = {"num_train": None, "num_eval": None, "num_test": None}


def custom(
    *,
    kind: Kind,
    prompt: str | None = None,
    options: Sequence[str] = (),
    label: str = "label",
    labels: Sequence[Any] | None = None,
    answers: str = "answers",
    text_columns: Sequence[str] | None = None,
    metric: str | None = None,
    name: str = "custom",
    max_new_tokens: int = 50,
) -> Entry:
    """A task on rows with any columns.

    Args:
        kind: ``"classification"`` among fixed options, ``"choice"`` among options that each row has for itself,
            ``"generation"``, or ``"chat"``: what the assistant says in conversations, see :mod:`zoengine.tasks.chat`.
        prompt: a template with the names of columns in braces; a brace itself is written twice. None: the text columns,
            a space between them, for models that are not asked by a prompt.
        options: of a classification, the texts that may follow the prompt, or none: the labels; of a choice, the
            columns with the candidates, or the one column that holds a list of them; of a generation, none.
        label: the column that says which option is right.
        labels: what that column holds, in the options' order. None: 0, 1, ..., or the option's own text.
        answers: of a generation, the column with the right answer or a list of them.
        text_columns: one or two columns that models with a head read. None: those of the prompt, if one or two.
        metric: None: accuracy, of a generation f1, of a chat token_accuracy.
        max_new_tokens: of an answer, in a generation or chat.

    An option that begins with no white space gets a space before it where the prompt ends with a letter, a digit, a
    column or one of ``. , : ; ? !``; so "It was" and "great" make "It was great". A Chinese or Japanese prompt or
    option gets none, nor does a prompt that ends with a newline.

    Raises:
        TaskError: whatever does not fit together. A column that the prompt names and the rows lack is found when the
            rows are read.
    """
    if kind not in METRICS:
        raise TaskError(f"no kind of task {kind!r}{nearest(str(kind), METRICS)}")
    _check_metric(kind, metric)
    shared: dict[str, Any] = {"name": name, "metric": metric or METRICS[kind][0], **_ALL_ROWS}
    if kind == "chat":
        if prompt is not None or options or labels or text_columns:
            raise TaskError("a chat has columns of its own, prompt and completion or messages; leave out the others")
        return Entry(kind=kind, columns=(), read=chat.read, max_new_tokens=max_new_tokens, **shared)
    template = _template(prompt, text_columns)
    if kind == "classification":
        return _classification(template, options, label, labels, text_columns, shared)
    if kind == "choice":
        return _choice(template, options, label, labels, shared)
    if options or labels:
        raise TaskError("a generation has answers, no options and no labels; leave those out")
    return generation(
        prompt=_filled(template), answers=lambda row: _answers(row, answers), columns=(*template.columns, answers),
        completion=_spaced(template, "{answer}\n"), max_new_tokens=max_new_tokens, **shared,
    )  # fmt: skip


def _template(prompt: str | None, text_columns: Sequence[str] | None) -> Template:
    if prompt is None and not text_columns:
        raise TaskError("a custom task needs a prompt with columns in braces, or text_columns for a model with a head")
    template = Template(" ".join(f"{{{column}}}" for column in text_columns or ()) if prompt is None else prompt)
    if not template.columns:
        raise TaskError(f"the prompt {prompt!r} names no column; write {{text}} where the column text should stand")
    return template


def _classification(
    template: Template, options: Sequence[str], label: str, labels: Sequence[Any] | None,
    text_columns: Sequence[str] | None, shared: dict[str, Any],
) -> Entry:  # fmt: skip
    options = options or [str(value) for value in labels or ()]
    if len(options) < 2 or len(set(options)) != len(options):
        raise TaskError(f"a classification needs at least two different options, not {list(options)}")
    if labels is not None and len(labels) != len(options):
        raise TaskError(f"{len(labels)} labels for {len(options)} options; give one for each, in the same order")
    _check_visible(options)
    if text_columns is None:
        text_columns = template.columns if len(template.columns) <= 2 else ()
    if len(text_columns) > 2:
        raise TaskError(f"text_columns are one or two, not {list(text_columns)}")
    return classification(
        prompt=_filled(template), options=[_spaced(template, option) for option in options],
        columns=tuple(dict.fromkeys((*template.columns, *text_columns))), label=label, values=labels,
        labels=[option.strip() for option in options] if labels is None else [str(value) for value in labels],
        texts=[f"{{{column}}}" for column in text_columns], **shared,
    )  # fmt: skip


def _choice(
    template: Template, options: Sequence[str], label: str, labels: Sequence[Any] | None, shared: dict[str, Any]
) -> Entry:
    if not options:
        raise TaskError("a choice needs options: columns with one candidate each, or one column that holds a list")
    _check_visible(options)
    known = None if labels is None else Labels(labels)
    return choice(
        prompt=_filled(template), columns=tuple(dict.fromkeys((*template.columns, *options, label))),
        options=lambda row: tuple(_spaced(template, candidate) for candidate in _candidates(row, options)),
        gold=lambda row: _gold(row, label, known, _candidates(row, options)), **shared,
    )  # fmt: skip


def _check_visible(options: Sequence[str]) -> None:
    if not all(option.strip() for option in options):
        raise TaskError(f"an option of {list(options)} is empty")


def _filled(template: Template) -> Callable[[Row], str]:
    """Fills the template, and refuses a row that has nothing for it."""

    def fill(row: Row) -> str:
        if not any(text(row, column).strip() for column in template.columns):
            columns = ", ".join(template.columns)
            raise TaskError(f"every column of the prompt is empty: {columns}; remove the row or fill it")
        return template.fill(row)

    return fill


def _check_metric(kind: str, metric: str | None) -> None:
    known = dict.fromkeys(name for names in METRICS.values() for name in names)
    if metric is not None and metric not in known:
        raise TaskError(f"no metric {metric!r}{nearest(metric, known)}")
    if metric is not None and metric not in METRICS[kind]:
        raise TaskError(f"the metric {metric!r} does not fit a {kind}, which has {' or '.join(METRICS[kind])}")


def _spaced(template: Template, option: str) -> str:
    """The option with a space before it where it would otherwise be glued to the prompt's last word."""
    prompt = template.template.rstrip(" ")
    ends_a_word = prompt[-1:].isascii() and (prompt[-1:].isalnum() or prompt[-1:] in set(".,:;?!}"))
    return f" {option}" if ends_a_word and option[:1].isascii() and not option[:1].isspace() else option


def _candidates(row: Row, options: Sequence[str]) -> tuple[str, ...]:
    found = texts(row, options[0]) if len(options) == 1 else tuple(text(row, column) for column in options)
    if len(found) < 2:
        raise TaskError(f"{len(found)} candidate in the column {options[0]!r}; a choice needs at least two")
    return found


def _gold(row: Row, label: str, known: Labels | None, candidates: tuple[str, ...]) -> tuple[int, ...]:
    """One index, or several where the label column holds a list."""
    found = row.get(label)
    values = found if isinstance(found, (list, tuple)) else [found]
    index = known or Labels(range(len(candidates)))
    indices = [index.index({**row, label: value}, label) for value in values]
    gold = tuple(dict.fromkeys(k for k in indices if k is not None))
    if any(k >= len(candidates) for k in gold):
        raise TaskError(f"label {found!r} in the column {label!r} is outside the {len(candidates)} candidates")
    return gold


def _answers(row: Row, column: str) -> tuple[str, ...]:
    if isinstance(row.get(column), (list, tuple)):
        return texts(row, column)
    return () if column in row and row[column] is None else (text(row, column),)
