"""All methods by name. A new method is one file in this folder and one line in ``_METHODS``."""

from __future__ import annotations

from typing import Any

from zoengine.methods.base import Params, ZOOptimizer
from zoengine.methods.fields import FieldError, Fields, nearest
from zoengine.methods.first_order import FTSGD, FirstOrder, FTAdamW
from zoengine.methods.mezo import MeZO
from zoengine.methods.mezo_momentum import MeZOMomentum

__all__ = [
    "FTSGD",
    "FTAdamW",
    "FieldError",
    "Fields",
    "FirstOrder",
    "MeZO",
    "MeZOMomentum",
    "ZOOptimizer",
    "available",
    "create",
    "get",
]

_METHODS: dict[str, type[ZOOptimizer | FirstOrder]] = {
    method.name: method for method in (MeZO, MeZOMomentum, FTSGD, FTAdamW)
}


def available() -> tuple[str, ...]:
    """The names of all methods."""
    return tuple(_METHODS)


def get(name: str) -> type[ZOOptimizer | FirstOrder]:
    """The optimizer class called ``name``.

    Raises:
        FieldError: there is none; the nearest name is suggested.
    """
    if name not in _METHODS:
        raise FieldError(f"there is no method {name!r}{nearest(name, _METHODS)}")
    return _METHODS[name]


def create(name: str, params: Params, **fields: Any) -> ZOOptimizer | FirstOrder:
    """The optimizer called ``name`` for a model or its parameters: ``create("mezo", model, lr=1e-6)``."""
    return get(name)(params, **fields)
