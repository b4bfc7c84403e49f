"""What a checkpoint holds besides the model, written without pickle, and how to tell a complete one.

The files::

    optimizer.json            method, step, seed, learning rates, and the scheduler's state
    optimizer.safetensors     the method's state arrays (momentum and the like); absent when it has none
    rng_state.json            Python's, numpy's and torch's generators, for data loading
    trainer_state.json        transformers' own
"""

from __future__ import annotations

import base64
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers.trainer import TRAINER_STATE_NAME

from zoengine.trainer.optimizer import Method

OPTIMIZER_JSON = "optimizer.json"
OPTIMIZER_TENSORS = "optimizer.safetensors"
RNG_JSON = "rng_state.json"

_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that cannot be continued from; the message names the file and the reason."""


def save_optimizer(folder: Path, optimizer: Method, scheduler: Any) -> None:
    """Write the optimizer's and the LR scheduler's state into ``folder``.

    Raises:
        CheckpointError: the scheduler holds something that JSON cannot.
    """
    own = dict(optimizer.state_dict())
    zo = dict(own.pop("zoengine"))
    tensors = {f"{name}.{k}": buffer for name, buffers in zo.pop("states").items() for k, buffer in enumerate(buffers)}
    record = {"zoengine": zo, "param_groups": own["param_groups"], "scheduler": scheduler.state_dict()}
    try:
        text = json.dumps(record, indent=1)
    except TypeError as error:
        raise CheckpointError(
            f"the state of {type(scheduler).__name__} cannot be written as JSON ({error}); use another lr scheduler"
        ) from error
    if tensors:
        save_file(tensors, folder / OPTIMIZER_TENSORS)
    (folder / OPTIMIZER_JSON).write_text(text + "\n", encoding="utf-8")


def load_optimizer(folder: Path, optimizer: Method, scheduler: Any) -> None:
    """Restore what :func:`save_optimizer` wrote.

    Raises:
        CheckpointError: a file is missing or of another method, seed or model. Nothing has been changed then.
    """
    record = _read_json(folder / OPTIMIZER_JSON)
    path = folder / OPTIMIZER_TENSORS
    tensors = load_file(path) if path.is_file() else {}
    states: dict[str, list[torch.Tensor]] = {}
    for key in sorted(tensors, key=lambda key: (key.rpartition(".")[0], int(key.rpartition(".")[2]))):
        states.setdefault(key.rpartition(".")[0], []).append(tensors[key])
    try:
        optimizer.load_state_dict(
            {"state": {}, "param_groups": record["param_groups"], "zoengine": {**record["zoengine"], "states": states}}
        )
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{folder} was saved by another run: {error}") from error
    scheduler.load_state_dict(record["scheduler"])


def save_rng(folder: Path) -> None:
    """Write the state of Python's, numpy's and torch's generators (CPU and the current CUDA device)."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    record = {
        "python": [version, list(words), gauss],
        "numpy": [kind, keys.tolist(), position, has_gauss, cached],
        "torch": _encode(torch.random.get_rng_state()),
    }
    if torch.cuda.is_available():
        record["cuda"] = _encode(torch.cuda.random.get_rng_state())
    (folder / RNG_JSON).write_text(json.dumps(record) + "\n", encoding="utf-8")


def load_rng(folder: Path) -> None:
    """Restore what :func:`save_rng` wrote."""
    record = _read_json(folder / RNG_JSON)
    version, words, gauss = record["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = record["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.random.set_rng_state(_decode(record["torch"]))
    if "cuda" in record and torch.cuda.is_available():
        torch.cuda.random.set_rng_state(_decode(record["cuda"]))


def is_complete(folder: Path) -> bool:
    """Whether training can continue from ``folder``: every file is there, and none of them is cut off."""
    weights = [*folder.glob("model*.safetensors"), *folder.rglob("adapter_model.safetensors")]
    try:
        for name in (TRAINER_STATE_NAME, OPTIMIZER_JSON, RNG_JSON):
            json.loads((folder / name).read_text(encoding="utf-8"))
        for path in {*weights, *folder.glob("*.safetensors")}:
            with safe_open(path, framework="pt"):  # compares the header with the file's length
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return bool(weights)


def last_complete(run_folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in a run's folder, or None."""
    if not run_folder.is_dir():
        return None
    found = [(int(match[1]), path) for path in run_folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return _first(is_complete, [path for _, path in sorted(found, reverse=True)])


def _first(condition: Callable[[Path], bool], paths: list[Path]) -> Path | None:
    return next((path for path in paths if condition(path)), None)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
