"""The tasks that are known by name.

>>> from zoengine.tasks import catalog
>>> catalog.get("sst2").read({"sentence": "a joy to watch .", "label": 1}).prompt
'a joy to watch . It was'

A row without a label (null or -1, as in the test splits of benchmarks and in some pairs of SNLI) becomes an instance
whose ``gold`` is empty; :func:`zoengine.tasks.rows.instances` drops those and logs how many.
"""

from __future__ import annotations

from zoengine.methods.fields import nearest
from zoengine.tasks.catalog import pairs, reading, sentences, superglue
from zoengine.tasks.catalog.custom import custom
from zoengine.tasks.entry import Entry
from zoengine.tasks.instance import TaskError

__all__ = ["custom", "get", "names"]

_ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for module in (sentences, pairs, superglue, reading)
    for entry in module.ENTRIES
}  # fmt: skip


def names() -> tuple[str, ...]:
    """The names of all tasks."""
    return tuple(_ENTRIES)


def get(name: str) -> Entry:
    """The task of that name.

    Raises:
        TaskError: there is none; the nearest name is suggested.
    """
    try:
        return _ENTRIES[name]
    except KeyError:
        raise TaskError(f"no task {name!r}{nearest(name.lower(), [*_ENTRIES, 'custom'])}") from None
