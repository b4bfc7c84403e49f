"""What several commands share: arguments, and a quiet screen."""

from __future__ import annotations

import shlex
import sys
import warnings
from typing import Annotated, Any

import typer

Row = Annotated[str | None, typer.Option("--row", metavar="NAME", help="which of the rows that the file holds")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


def overrides_like(example: str) -> Any:
    """The argument for values that replace those of the config file, with an example in its help."""
    return typer.Argument(metavar="[KEY=VALUE]...", help=f"values to change, such as {example}")


def command_line() -> str:
    """The command as it can be typed again."""
    return shlex.join(["zoengine", *sys.argv[1:]])


def quiet() -> None:
    """Keep other people's bars and advice off the screen; errors still show."""
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
