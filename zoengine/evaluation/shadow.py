"""``shadow``: every query is formed in a copy of the weights, and theta only ever changes by an update.

Costs one more copy of the trainable weights. In return nothing drifts, an exception in a forward leaves theta as it
was bit for bit, and lr = 0 changes no bit. The perturbed weights are formed in fp32 and rounded once, to nearest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zoengine.directions import Step, Term
from zoengine.evaluation.base import Closure, Loss, Mode, call


class Shadow(Mode):
    """Perturbs a copy of the arena; see the module's text."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._copies = [torch.zeros_like(buffer) for buffer in self.arena.buffers]
        self._views = self.arena.views(self._copies)

    def evaluate(self, step: Step, terms: Sequence[Term], closure: Closure) -> Loss:
        if not any(t.coeff for t in terms):
            return call(closure)
        for span in self.arena.spans:
            self._launch(span, self.arena.buffers, terms, target=self._copies)
        with self.arena.reading(self._views):
            return call(closure)

    def skip(self, step: Step, terms: Sequence[Term]) -> None:
        """Nothing: queries never touch theta."""

    def settle(self, step: Step) -> None:
        """Nothing: theta is always clean."""

    def update(self, step: Step, terms: Sequence[Term], lrs: Sequence[float], weight_decays: Sequence[float]) -> None:
        seed = self._update_seed(step)
        for span, keep, lr in self._update_spans(lrs, weight_decays):
            self._launch(span, self.arena.buffers, [t.scaled(-lr) for t in terms], keep=keep, sr_seed=seed)
