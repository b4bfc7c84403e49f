"""Zeroth-order fine-tuning: optimizers that need forward passes only, on fused noise kernels.

Importing this needs torch alone. The trainer, tasks and command line are in ``zoengine.trainer``, ``zoengine.tasks``
and ``zoengine.cli`` and need the extra ``hf``.
"""

from zoengine import methods, ops
from zoengine.arena import Arena, ArenaError
from zoengine.evaluation import EvaluationError, NonFiniteLossError
from zoengine.methods import FTSGD, FieldError, FTAdamW, MeZO, MeZOMomentum

__version__ = "0.1.0"

__all__ = [
    "FTSGD",
    "Arena",
    "ArenaError",
    "EvaluationError",
    "FTAdamW",
    "FieldError",
    "MeZO",
    "MeZOMomentum",
    "NonFiniteLossError",
    "methods",
    "ops",
]
