"""``zoengine meta-train``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from zoengine.cli.errors import need_hf, reported
from zoengine.cli.shared import Debug, command_line, overrides_like, quiet


def meta_train(
    config: Annotated[Path, typer.Argument(help="YAML file, see configs/meta-train.yaml")],
    overrides: Annotated[list[str] | None, overrides_like("meta.fo_lr=1e-3")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="remove an earlier meta-training from the output folder")
    ] = False,
    debug: Debug = False,
) -> None:
    """Learn the networks of zo-finetuner for a model, once; needs backward passes."""
    with reported(debug):
        need_hf()
        from zoengine.meta.config import load
        from zoengine.meta.run import meta_train as run

        quiet()
        outcome = run(load(config, overrides or []), overwrite=overwrite, command=command_line())
    if outcome.signal is not None:
        typer.echo(f"zoengine: stopped after step {outcome.step}; what was learnt: {outcome.networks}", err=True)
        raise typer.Exit(128 + outcome.signal)
    typer.echo(
        f"networks of {outcome.blocks} blocks, {outcome.forward_passes} forward passes, {outcome.backward_passes} "
        f"backward passes, {outcome.seconds:.0f} s; train with: method.name=zo-finetuner "
        f"method.zoft_file={shlex.quote(str(outcome.networks))}"
    )
