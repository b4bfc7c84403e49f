"""Evaluation modes: how the loss at theta + direction is obtained, and how updates reach theta.

A method does not know its mode. ``inplace`` perturbs the weights themselves and needs no memory; ``shadow`` perturbs
a copy and leaves theta untouched between updates. A new mode is one file here and one entry in ``MODES``.
"""

from __future__ import annotations

from zoengine.arena import Arena
from zoengine.evaluation.base import Closure, EvaluationError, Mode, NonFiniteLossError
from zoengine.evaluation.inplace import InPlace
from zoengine.evaluation.shadow import Shadow

__all__ = ["MODES", "Closure", "EvaluationError", "Mode", "NonFiniteLossError", "choose_mode"]

MODES: dict[str, type[Mode]] = {"inplace": InPlace, "shadow": Shadow}


def choose_mode(name: str, arena: Arena) -> type[Mode]:
    """The mode called ``name``; ``"auto"`` is ``shadow`` for 16-bit arenas and ``inplace`` for fp32.

    Perturbing 16-bit weights in place rounds them three times a step, a random walk that reaches tens of ulps in
    ten thousand steps (docs/design.md has the measurement); in fp32 the same walk is far below the updates.
    """
    if name == "auto":
        name = "shadow" if arena.half_precision else "inplace"
    return MODES[name]
