"""A zeroth-order optimizer as Trainer drives it, and how to find it again inside Trainer's own wrapping."""

from __future__ import annotations

from typing import Any

from zoengine.evaluation import Closure
from zoengine.methods import ZOOptimizer


class Driven:
    """Mixed into a method: ``step()`` without a closure, which Trainer adds to every step, does nothing.

    Attributes:
        last_loss, last_lr: loss and learning rate of the last real step, for callbacks.
    """

    last_loss = float("nan")
    last_lr = float("nan")

    def step(self, closure: Closure | None = None) -> float | None:
        """One step with a closure, nothing without."""
        if closure is None:
            return None
        lr = float(self.param_groups[0]["lr"])
        self.last_loss = super().step(closure)
        self.last_lr = lr
        return self.last_loss


def driven(method: type[ZOOptimizer]) -> type[ZOOptimizer]:
    """``method`` with :class:`Driven` mixed in, under its own name."""
    return type(method.__name__, (Driven, method), {})


def unwrapped(optimizer: Any) -> Any:
    """The optimizer itself: accelerate keeps it inside its own, which is what callbacks are given."""
    return getattr(optimizer, "optimizer", optimizer)
