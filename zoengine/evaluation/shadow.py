"""``shadow``: every query is formed in a copy of the weights, and theta only ever changes by an update.

Costs one more copy of the trainable weights. In return nothing drifts, an exception in a forward leaves theta as it
was bit for bit, and lr = 0 changes no bit. The perturbed weights are formed in fp32 and rounded once, to nearest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zoengine.directions import Evaluate, Step, Term
from zoengine.evaluation.base import Closure, Loss, Mode, call


class Shadow(Mode):
    """Perturbs a copy of the arena; see the module's text."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._copies = [torch.zeros_like(buffer) for buffer in self.arena.buffers]
        self._views = self.arena.views(self._copies)

    def evaluate(self, step: Step, request: Evaluate, closure: Closure) -> Loss:
        base = self.arena.buffers if request.base is None else self.copies[request.base]
        if request.base is None and not any(t.coeff for t in request.terms):
            return call(closure)
        for span in self.transform.spans(by_group=False):
            self.transform.add(span, base, request.terms, target=self._copies)
        with self.arena.reading(self._views):
            return call(closure)

    def skip(self, step: Step, request: Evaluate) -> None:
        """Nothing: queries never touch theta."""

    def outstanding(self) -> Sequence[Term]:
        return ()

    def settle(self, step: Step) -> None:
        """Nothing: theta is always clean."""

    def _settled(self) -> None:
        """Nothing."""
