"""``zoengine compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zoengine.cli.errors import need_hf, reported
from zoengine.cli.shared import Debug, command_line, overrides_like, quiet


def compare(
    config: Annotated[Path, typer.Argument(help="YAML file, see configs/compare.yaml")],
    overrides: Annotated[list[str] | None, overrides_like("run.budget=100")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="remove the cells of an earlier comparison from the output folder")
    ] = False,
    debug: Debug = False,
) -> None:
    """Run all methods on the same job at equal forward passes; what is finished is not run again."""
    with reported(debug, "interrupted; finished cells are kept, the same command goes on from them"):
        need_hf()
        from zoengine.compare.config import load
        from zoengine.compare.run import compare as run

        quiet()
        path = run(load(config, overrides or []), overwrite=overwrite, command=command_line())
    typer.echo(path.read_text(encoding="utf-8"))
    typer.echo(f"table {path}, plot {path.with_suffix('.png')}")
