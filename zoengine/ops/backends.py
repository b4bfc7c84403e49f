"""Which implementation runs an op: what is there, what is not and why, and the choice between them."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from zoengine.ops import reference, schema


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops: ``available`` on ``devices`` (torch device types), or ``reason`` why not."""

    name: str
    available: bool
    devices: tuple[str, ...]
    reason: str


class BackendError(RuntimeError):
    """The backend that was asked for cannot run here; the message says why."""


# In the order of preference on each device type. On a GPU the floors predicted for the two (bench/results/predicted-*)
# are within an eighth of each other, either way; CUDA C++, where it was built, compiles nothing at first use.
_PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
_MODULES: dict[str, Callable[[], ModuleType]] = {
    "cpp": lambda: importlib.import_module("zoengine.ops.extension").load("cpu"),
    "cuda": lambda: importlib.import_module("zoengine.ops.extension").load("cuda"),
    "triton": lambda: importlib.import_module("zoengine.kernels"),
    "reference": lambda: reference,
}
_forced: str | None = None


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    """The backend's module, or None and the reason. ImportError is the one way a backend says it cannot be had."""
    try:
        return _MODULES[name](), ""
    except ImportError as error:
        return None, str(error)


def backends() -> dict[str, Backend]:
    """Every backend by name, with the devices it serves here or the reason why it serves none."""
    result = {}
    for name in _MODULES:
        module, reason = _load(name)
        devices = _devices(name) if module is not None else ()
        if module is not None and not devices:
            reason = "no CUDA device is visible to torch"
        result[name] = Backend(name, bool(devices), devices, reason)
    return result


def _devices(name: str) -> tuple[str, ...]:
    gpu = ("cuda",) if torch.cuda.is_available() else ()
    if name == "reference":
        return ("cpu", *gpu)
    if name == "cpp":
        return ("cpu",)
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return ("cpu", *gpu) if interpreted else gpu


class use:
    """Force one backend for every op: ``use("cpp")`` from now on, ``with use("cpp"):`` for a block.

    ``use(None)`` returns to the automatic choice.

    Raises:
        BackendError: there is no such backend, or it is not available here.
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        if name is not None:
            found = backends().get(name)
            if found is None:
                raise BackendError(f"unknown backend {name!r}; there are {', '.join(_MODULES)}")
            if not found.available:
                raise BackendError(f"backend {name!r} is not available: {found.reason}")
        self._previous, _forced = _forced, name

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc) -> None:
        global _forced
        _forced = self._previous


def current(device: torch.device | str) -> str:
    """The name of the backend that an op on ``device`` runs on now.

    Raises:
        BackendError: the forced backend does not serve this device.
    """
    kind = torch.device(device).type
    if _forced is not None:
        if _forced != "reference" and kind not in _devices(_forced):
            raise BackendError(f"backend {_forced!r} was forced but does not serve tensors on {kind!r}")
        return _forced
    for name in _PREFERENCE.get(kind, ()):
        if _load(name)[0] is not None:
            return name
    return "reference"


def _route(op: str) -> Callable:
    def routed(x, *args, **kwargs):
        return getattr(_load(current(x.device))[0], op)(x, *args, **kwargs)

    routed.__name__ = op
    return routed


for _op in schema.SCHEMAS:
    schema.implement(_op, _route(_op))
