"""An optimizer as Trainer drives it, and how to find it again inside Trainer's own wrapping."""

from __future__ import annotations

from typing import Any

from zoengine.evaluation import Closure
from zoengine.methods import FirstOrder, ZOOptimizer

# What the trainer drives. Both kinds have name, Fields, forwards_per_step, step(closure), forward_passes, and a
# state_dict whose entry "zoengine" is JSON but for its "states", lists of tensors by name.
Method = ZOOptimizer | FirstOrder


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


def driven(method: type[Method]) -> type[Method]:
    """``method`` with :class:`Driven` mixed in, under its own name."""
    return type(method.__name__, (Driven, method), {})


def unwrapped(optimizer: Any) -> Any:
    """The optimizer itself: accelerate keeps it inside its own, which is what callbacks are given."""
    return getattr(optimizer, "optimizer", optimizer)


def passes(optimizer: Method) -> dict[str, int]:
    """What ``optimizer`` has cost so far: ``forward_passes``, and ``backward_passes`` where its kind takes any."""
    counts = {"forward_passes": optimizer.forward_passes}
    if isinstance(optimizer, FirstOrder):
        counts["backward_passes"] = optimizer.backward_passes
    return counts
