"""``zoengine methods``."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, get_args, get_type_hints

from rich import box
from rich.console import Console
from rich.table import Table

from zoengine import methods
from zoengine.methods.fields import Fields


def show(name: str | None) -> None:
    """Print all methods and their own fields, or one method with all its fields.

    Raises:
        FieldError: there is no method ``name``.
    """
    console = Console()
    if name is not None:
        method = methods.get(name)
        console.print(f"[bold]{name}[/bold]  zoengine.{method.__name__}")
        console.print(inspect.getdoc(method), markup=False, highlight=False)
        console.print(_fields(method.Fields, [field.name for field in dataclasses.fields(method.Fields)]))
        return
    shared = [field.name for field in dataclasses.fields(Fields)]
    table = Table("method", "forwards", "states", "own fields", box=box.SIMPLE)
    table.columns[0].no_wrap = True
    for name in methods.available():
        method = methods.get(name)
        own = [f.name for f in dataclasses.fields(method.Fields) if f.name not in shared]
        required = [f.name for f in dataclasses.fields(method.Fields) if f.default is dataclasses.MISSING]
        forwards = method.forwards_per_step(method.Fields(**dict.fromkeys(required, 0.0)))
        passes = f"{forwards}" + (" + backward" if method.backwards_per_step else "")
        states = ", ".join([*method.state_names, *getattr(method, "copy_names", ())]) or "-"
        table.add_row(name, passes, states, ", ".join(own) or "-")
    console.print(table)
    console.print("States are what an update keeps; docs/methods.md counts what directions keep besides (bases, say).")
    console.print("Fields of all zeroth-order methods (ft-sgd and ft-adamw take lr, weight_decay and seed of them):")
    console.print(_fields(Fields, shared))


def _fields(kind: type, names: list[str]) -> Table:
    table = Table("field", "type", "default", "meaning", box=box.SIMPLE)
    types = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name in names:
            table.add_row(field.name, _type(types[field.name]), _default(field), field.metadata.get("help", ""))
    return table


def _type(annotation: Any) -> str:
    return " | ".join(map(str, get_args(annotation))) or annotation.__name__


def _default(field: dataclasses.Field) -> str:
    return "required" if field.default is dataclasses.MISSING else f"{field.default}"
