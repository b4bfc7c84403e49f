"""All methods by name. A new method is one file in this folder and one line in ``_METHODS``."""

from __future__ import annotations

from typing import Any

from zoengine.methods.base import Params, ZOOptimizer
from zoengine.methods.conmezo import ConMeZO
from zoengine.methods.fields import FieldError, Fields, nearest
from zoengine.methods.first_order import FTSGD, FirstOrder, FTAdamW
from zoengine.methods.hizoo import HiZOO
from zoengine.methods.loren import LOREN
from zoengine.methods.loren_official import LORENOfficial
from zoengine.methods.lozo import LOZO, LOZOM
from zoengine.methods.mezo import MeZO
from zoengine.methods.mezo_adam import MeZOAdam, ZOAdaMM
from zoengine.methods.mezo_gv import MeZOGreedy, MeZOGV
from zoengine.methods.mezo_momentum import MeZOMomentum
from zoengine.methods.mezo_svrg import MeZOSVRG
from zoengine.methods.rozo import RoZO, RoZOMomentum
from zoengine.methods.sparse_mezo import SparseMeZO
from zoengine.methods.subzero import SubZero, SubZeroGreedy, SubZeroGV
from zoengine.methods.zo_adamu import ZOAdaMU
from zoengine.methods.zo_finetuner import ZOFinetuner
from zoengine.methods.zo_sign import ZOSignSGD

__all__ = [
    "FTSGD",
    "LOREN",
    "LOZO",
    "LOZOM",
    "ConMeZO",
    "FTAdamW",
    "FieldError",
    "Fields",
    "FirstOrder",
    "HiZOO",
    "LORENOfficial",
    "MeZO",
    "MeZOAdam",
    "MeZOGV",
    "MeZOGreedy",
    "MeZOMomentum",
    "MeZOSVRG",
    "RoZO",
    "RoZOMomentum",
    "SparseMeZO",
    "SubZero",
    "SubZeroGV",
    "SubZeroGreedy",
    "ZOAdaMM",
    "ZOAdaMU",
    "ZOFinetuner",
    "ZOOptimizer",
    "ZOSignSGD",
    "available",
    "create",
    "get",
]

_METHODS: dict[str, type[ZOOptimizer | FirstOrder]] = {
    method.name: method
    for method in (
        MeZO, MeZOMomentum, MeZOAdam, ZOAdaMM, ZOAdaMU, ZOSignSGD, MeZOSVRG, LOZO, LOZOM, HiZOO, SubZero, SparseMeZO,
        RoZO, RoZOMomentum, ZOFinetuner, LOREN, LORENOfficial, ConMeZO, MeZOGV, MeZOGreedy, SubZeroGV, SubZeroGreedy,
        FTSGD, FTAdamW,
    )
}  # fmt: skip


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
