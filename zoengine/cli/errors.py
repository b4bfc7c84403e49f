"""How a command fails: one line on stderr and an exit code, or the traceback with --debug."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from zoengine.arena import ArenaError
from zoengine.config import ConfigError
from zoengine.data import DataError
from zoengine.evaluation import EvaluationError, NonFiniteLossError
from zoengine.methods import FieldError
from zoengine.ops.backends import BackendError
from zoengine.pertnn import PertNNError
from zoengine.tasks.instance import TaskError

BAD_INPUT = 2  # nothing was done; something given has to change
STOPPED = 3  # a run ended before its time
INTERRUPTED = 130  # as shells report Ctrl-C, and 128 + N any signal N

_HF = ("transformers", "accelerate", "peft", "safetensors", "matplotlib", "jinja2")


class MissingExtraError(ImportError):
    """A package of the extra ``hf`` is not installed."""


def need_hf() -> None:
    """Raise MissingExtraError unless the packages that everything but methods and doctor needs are installed."""
    missing = [name for name in _HF if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"this command needs {', '.join(missing)}: pip install 'zoengine[hf]'")


@contextmanager
def reported(
    debug: bool, interrupted: str = "interrupted; nothing was saved since the last checkpoint"
) -> Iterator[None]:
    """Turn the errors a user can act on into one line and an exit code; with ``debug``, let them through.

    interrupted: what Ctrl-C leaves behind.
    """
    try:
        yield
    except (NonFiniteLossError, EvaluationError) as error:
        _end(error, STOPPED, debug)
    except KeyboardInterrupt as error:
        _end(error, INTERRUPTED, debug, interrupted)
    except _bad_input() as error:
        _end(error, BAD_INPUT, debug)
    except _storage() as error:  # a full disk, a file that vanished
        _end(error, STOPPED, debug)


def _bad_input() -> tuple[type[Exception], ...]:
    known: list[type[Exception]] = [
        ArenaError, BackendError, ConfigError, DataError, FieldError, MissingExtraError, PertNNError, TaskError
    ]  # fmt: skip
    if "zoengine.trainer.run" in sys.modules:  # else nobody can have raised these, and importing them takes seconds
        from zoengine.models import ModelError
        from zoengine.trainer import CheckpointError, TrainerError
        from zoengine.trainer.run import RunError

        known += [CheckpointError, ModelError, RunError, TrainerError]
    return tuple(known)


def _storage() -> tuple[type[Exception], ...]:
    if "safetensors" not in sys.modules:
        return (OSError,)
    from safetensors import SafetensorError

    return (OSError, SafetensorError)


def _end(error: BaseException, code: int, debug: bool, text: str | None = None) -> None:
    if debug:
        raise error
    line = " ".join((text or str(error)).split())
    typer.echo(f"zoengine: {line}", err=True)
    raise typer.Exit(code) from None
