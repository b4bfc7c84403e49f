"""``zoengine sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zoengine.cli.errors import STOPPED, need_hf, reported
from zoengine.cli.shared import Debug, Row, command_line, quiet


def sweep(
    config: Annotated[Path, typer.Argument(help="YAML file with a section sweep, see configs/papers/")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="values to change; a swept key is held at the value given"),
    ] = None,
    row: Row = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="run all points of the sweep anew")] = False,
    debug: Debug = False,
) -> None:
    """Train with every combination of some values; what is finished is not run again."""
    with reported(debug, "interrupted; what is done is kept, the same command goes on from it"):
        need_hf()
        from zoengine.sweep.grid import load
        from zoengine.sweep.run import sweep as run

        quiet()
        found = run(load(config, overrides or [], row), overwrite=overwrite, command=command_line())
    if found.table is not None:
        typer.echo(found.table.read_text(encoding="utf-8"))
        typer.echo(f"table {found.table}, plot {found.table.with_suffix('.png')}")
    if found.signal is not None:
        typer.echo("zoengine: stopped, saved; the same command goes on from there", err=True)
        raise typer.Exit(128 + found.signal)
    if found.left:
        typer.echo(f"zoengine: {found.left} runs are still with other processes", err=True)
    if not found.finished and found.failed:
        raise typer.Exit(STOPPED)
