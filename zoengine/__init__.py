"""Zeroth-order fine-tuning: optimizers that need forward passes only, on fused noise kernels.

Importing this needs torch alone. The trainer, tasks and command line are in ``zoengine.trainer``, ``zoengine.tasks``
and ``zoengine.cli`` and need the extra ``hf``.
"""

from zoengine import methods, ops
from zoengine.arena import Arena, ArenaError
from zoengine.evaluation import EvaluationError, NonFiniteLossError
from zoengine.methods import (
    FTSGD,
    LOREN,
    LOZO,
    LOZOM,
    ConMeZO,
    FieldError,
    FTAdamW,
    HiZOO,
    LORENOfficial,
    MeZO,
    MeZOAdam,
    MeZOGreedy,
    MeZOGV,
    MeZOMomentum,
    MeZOSVRG,
    RoZO,
    RoZOMomentum,
    SparseMeZO,
    SubZero,
    SubZeroGreedy,
    SubZeroGV,
    ZOAdaMM,
    ZOAdaMU,
    ZOFinetuner,
    ZOOptimizer,
    ZOSignSGD,
)

__version__ = "0.1.0"

__all__ = [
    "FTSGD",
    "LOREN",
    "LOZO",
    "LOZOM",
    "Arena",
    "ArenaError",
    "ConMeZO",
    "EvaluationError",
    "FTAdamW",
    "FieldError",
    "HiZOO",
    "LORENOfficial",
    "MeZO",
    "MeZOAdam",
    "MeZOGV",
    "MeZOGreedy",
    "MeZOMomentum",
    "MeZOSVRG",
    "NonFiniteLossError",
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
    "methods",
    "ops",
]
