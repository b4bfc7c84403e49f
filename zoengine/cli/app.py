"""The commands and their options; the work is done elsewhere."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

import zoengine
from zoengine.cli.compare import compare
from zoengine.cli.errors import need_hf, reported
from zoengine.cli.meta_train import meta_train
from zoengine.cli.shared import Debug, Row, command_line, overrides_like, quiet
from zoengine.cli.sweep import sweep

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune language models with forward passes only.",
)

Overrides = Annotated[list[str] | None, overrides_like("method.lr=1e-6")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"zoengine {zoengine.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("zoengine").setLevel(logging.INFO)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file, see configs/; to resume, the run's folder will do")],
    overrides: Overrides = None,
    row: Row = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue from the last checkpoint")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="remove an earlier run from the output folder")
    ] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model on a task."""
    from zoengine.config import load

    with reported(debug):
        checked = load(config, overrides or [], row)
        if resume and overwrite:
            raise typer.BadParameter("--resume and --overwrite exclude each other")
        need_hf()
        quiet()
        from zoengine.trainer.run import train as run

        outcome = run(checked, resume=resume, overwrite=overwrite, command=command_line())
    if outcome.signal is not None:
        again = shlex.join(["zoengine", "train", str(outcome.folder), "--resume"])
        typer.echo(f"zoengine: stopped after step {outcome.step}, saved; go on with: {again}", err=True)
        raise typer.Exit(128 + outcome.signal)
    from zoengine.scores import score

    before, after = (score(outcome.metric, scores[outcome.metric]) for scores in (outcome.before, outcome.after))
    backward = f"{outcome.backward_passes} backward passes, " if outcome.backward_passes else ""
    typer.echo(
        f"{outcome.metric} {before} -> {after} on {outcome.after['n']} {outcome.split} examples, "
        f"{outcome.forward_passes} forward passes, {backward}{outcome.seconds:.0f} s "
        f"({outcome.evaluation_share:.0%} evaluating), "
        f"report {outcome.folder / 'report.html'}"
    )


@app.command("eval")
def evaluate(
    target: Annotated[str, typer.Argument(help="folder of a run, a config file, or a model (name or folder)")],
    overrides: Overrides = None,
    row: Row = None,
    split: Annotated[str, typer.Option(help="eval or test")] = "eval",
    shots: Annotated[int, typer.Option(help="solved training examples before each prompt; papers take 32")] = 0,
    shots_seed: Annotated[int, typer.Option(help="which examples those are")] = 0,
    null_prompt: Annotated[
        str | None, typer.Option(help="score options by how much likelier the prompt makes them than this text")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print a JSON object")] = False,
    debug: Debug = False,
) -> None:
    """Metric and loss of a trained or untouched model, zero-shot or with examples in its context."""
    with reported(debug):
        need_hf()
        quiet()
        from zoengine.trainer.evaluate import evaluate as measure

        found = measure(
            target, overrides or [], split, row, shots=shots, shots_seed=shots_seed, null_prompt=null_prompt
        )
    if as_json:
        typer.echo(json.dumps(found))
    else:
        from zoengine.scores import score

        scores = f"{found['metric']} {score(found['metric'], found[found['metric']])}"
        scores += f", loss {found['loss']:.4f}" if "loss" in found else ""
        typer.echo(f"{scores} on {found['n']} {split} examples, {found['model']}")


app.command()(compare)
app.command("meta-train")(meta_train)
app.command()(sweep)


@app.command("methods")
def show_methods(
    name: Annotated[str | None, typer.Argument(help="one method, with all its fields")] = None, debug: Debug = False
) -> None:
    """The methods, what they cost and what they take."""
    from zoengine.cli.methods import show

    with reported(debug):
        show(name)


@app.command("tasks")
def show_tasks(
    name: Annotated[str | None, typer.Argument(help="one task, with its columns")] = None, debug: Debug = False
) -> None:
    """The tasks known by name, where their rows live, and the forms a model can be asked in."""
    with reported(debug):
        need_hf()
        from zoengine.cli.tasks import show

        show(name)


@app.command()
def doctor() -> None:
    """What is installed, which backends work, and how fast they are here."""
    from zoengine.cli.doctor import examine

    if not examine():
        raise typer.Exit(1)
