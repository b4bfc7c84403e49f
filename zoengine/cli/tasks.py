"""``zoengine tasks``."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from zoengine import data
from zoengine.tasks import catalog
from zoengine.tasks.entry import Entry


def show(name: str | None) -> None:
    """Print the catalogue, or what is to be known of one task.

    Raises:
        TaskError: there is no task ``name``.
    """
    console = Console()
    if name is None:
        table = Table("task", "kind", "forms", "metric", "train/eval/test", "rows", box=box.SIMPLE)
        table.columns[0].no_wrap = True
        for entry in map(catalog.get, catalog.names()):
            table.add_row(entry.name, entry.kind, ", ".join(forms(entry)), entry.metric, _sizes(entry), _place(entry))
        console.print(table)
        console.print("Your own: task.name=custom; docs/tasks.md tells how.", highlight=False)
        return
    entry = catalog.get(name)
    table = Table(box=None, show_header=False)
    rows = {
        "kind": entry.kind,
        "forms": ", ".join(forms(entry)),
        "metric": entry.metric,
        "rows": _place(entry),
        "columns": ", ".join(entry.columns),
        "labels": ", ".join(entry.labels),
        "train/eval/test": _sizes(entry),
        "masked prompt": entry.masked.template if entry.masked else "",
        "its words": ", ".join(entry.masked.words) if entry.masked else "",
    }
    for key, value in rows.items():
        if value:
            table.add_row(key, value)
    console.print(f"[bold]{name}[/bold]")
    console.print(table, markup=False, highlight=False)


def forms(entry: Entry) -> list[str]:
    """The forms in which a model can be asked; a classification's also by similarity to descriptions of the labels."""
    if entry.kind != "classification":
        return ["prompt"]
    return ["prompt", *(["masked"] if entry.masked else []), "head"]


def _sizes(entry: Entry) -> str:
    return "/".join("all" if n is None else str(n) for n in (entry.num_train, entry.num_eval, entry.num_test))


def _place(entry: Entry) -> str:
    if entry.hub is None:
        return "embedded" if entry.name in data.EMBEDDED else "files"
    return entry.hub.source
