"""From rows to instances, and from sources to the instances that a run trains on, evaluates on and reports."""

from __future__ import annotations

import logging
from collections.abc import Collection

from zoengine import data
from zoengine.data import DataError, Splits, Table
from zoengine.tasks.entry import Entry
from zoengine.tasks.instance import Instance, TaskError

_log = logging.getLogger(__name__)

PARTS = ("train", "eval", "test")


def instances(entry: Entry, table: Table) -> list[Instance]:
    """The rows of ``table`` as ``entry`` reads them; rows without a label are left out and their number logged.

    Raises:
        DataError: a column is missing, a row cannot be read, naming its place, or no row has a label.
    """
    data.require(table, entry.columns)
    found = []
    for row, place in zip(table.rows, table.places, strict=True):
        try:
            found.append(entry.read(row))
        except TaskError as error:
            raise DataError(f"{place}: {error}") from error
    labelled = found if entry.kind == "chat" else [instance for instance in found if instance.gold]
    if not labelled:
        raise DataError(f"{table.source}: none of its {len(found)} rows has a label; is it the right split?")
    if len(labelled) < len(found):
        _log.info("%s: %d of %d rows have no label and are left out",
                  table.source, len(found) - len(labelled), len(found))  # fmt: skip
    return labelled


def load(
    entry: Entry,
    *,
    train: str | None = None,
    eval: str | None = None,
    test: str | None = None,
    seed: int = 0,
    num_train: int | None = None,
    num_eval: int | None = None,
    num_test: int | None = None,
    k_shot: int | None = None,
    official: bool = False,
    split_column: str | None = None,
    parts: Collection[str] = PARTS,
) -> Splits[Instance]:
    """What a run on ``entry`` trains on, evaluates on and reports, drawn by one seed.

    Args:
        train: a source of :func:`zoengine.data.read`; None: the entry's own place.
        eval: None: drawn from the training pool (:func:`zoengine.data.divide`); of movie-reviews, its dev split.
        test: None: the entry's own place if ``train`` is None too, else nothing.
        num_train, num_eval, num_test: None: the entry's.
        k_shot: of a classification, examples of each class for training and as many for evaluation, instead of
            ``num_train`` and ``num_eval``.
        official: split as the reference code does.
        split_column: of files that hold more than one split.
        parts: which of the three lists are wanted; the others stay empty, and what only they need is not read.

    Raises:
        DataError: a source cannot be read, a row is wrong, or a split would be empty.
        TaskError: the entry has no place of its own, or k_shot is asked of something else than a classification.
    """
    num_train = entry.num_train if num_train is None else num_train
    num_eval = entry.num_eval if num_eval is None else num_eval
    num_test = entry.num_test if num_test is None else num_test
    if k_shot is not None and entry.kind != "classification":
        raise TaskError(f"k_shot is for classifications; the task {entry.name} is a {entry.kind}")
    if eval is None and train is None and entry.name in data.EMBEDDED:
        eval = entry.name

    def read(part: str, source: str | None) -> list[Instance]:
        place, names = _place(entry, part, source)
        try:
            return instances(entry, data.read(place, split=names, split_column=split_column if source else None))
        except DataError as error:
            if source is None and entry.hub is not None:
                raise DataError(f"{error} (columns of {entry.name}: {', '.join(entry.columns)})") from error
            raise

    found: dict[str, list[Instance]] = {part: [] for part in PARTS}
    if "train" in parts or ("eval" in parts and eval is None):
        pool = read("train", train)
        if k_shot is not None:
            found["train"], found["eval"] = data.few_shot(pool, _label, seed=seed, k=k_shot, official=official)
        elif eval is not None or num_eval == 0:
            found["train"] = data.draw(pool, num_train, seed)
        else:
            found["train"], found["eval"] = data.divide(
                pool, seed=seed, num_train=num_train, num_eval=num_eval, official=official
            )
    if "eval" in parts and eval is not None:
        found["eval"] = _some(eval, read("eval", eval), num_eval, seed)
    if "test" in parts and (test is not None or train is None):
        test_seed = data.FEW_SHOT_TEST_SEED if official and k_shot is not None else seed
        found["test"] = _some(test or train or entry.name, read("test", test), num_test, test_seed)
    return Splits(*(found[part] if part in parts else [] for part in PARTS))


def _place(entry: Entry, part: str, source: str | None) -> tuple[str, tuple[str, ...]]:
    """(source, names that the split may have there)."""
    names = {"train": ("train",), "eval": ("dev", "validation"), "test": ("test", "validation", "dev")}[part]
    if entry.hub is not None and part != "eval":
        own = entry.hub.train if part == "train" else entry.hub.test
        if source is None:
            return entry.hub.source, (own,)
        names = tuple(dict.fromkeys((own, *names)))
    if source is not None:
        return source, names
    if entry.name in data.EMBEDDED:
        return entry.name, names
    raise TaskError(f"the task {entry.name} has no data of its own; give a source for {part}")


def _some(source: str, found: list[Instance], count: int | None, seed: int) -> list[Instance]:
    """``count`` of the instances. The embedded rows stand in a drawn order already: their first ones, for any seed."""
    return found[:count] if source in data.EMBEDDED else data.draw(found, count, seed)


def _label(instance: Instance) -> int:
    return instance.label
