"""Noise kernels under one name each, whatever the device: ``zoengine.ops.add_noise_`` and its kin.

Every function here checks its arguments, brings seeds and coefficients to the device of ``x``, and calls the
torch.library op of the same name; the backend that runs it is chosen by :mod:`zoengine.ops.backends`.
"""

from __future__ import annotations

from zoengine.ops.backends import Backend, backends, current, use
from zoengine.ops.checks import DTYPES, ROUNDINGS
from zoengine.ops.elementwise import add_noise_, mask_below, noise_fill, noise_fill_, rule_step_, state_fold_
from zoengine.ops.matrices import Matrices, kron_rows_, kron_score, lowrank_add_
from zoengine.ops.segments import segment_dot, segment_noise_fill_, segment_quantile, segment_stats

__all__ = [
    "DTYPES",
    "ROUNDINGS",
    "Backend",
    "Matrices",
    "add_noise_",
    "backends",
    "current",
    "kron_rows_",
    "kron_score",
    "lowrank_add_",
    "mask_below",
    "noise_fill",
    "noise_fill_",
    "rule_step_",
    "segment_dot",
    "segment_noise_fill_",
    "segment_quantile",
    "segment_stats",
    "state_fold_",
    "use",
]
