"""``inplace``: the weights themselves are perturbed, so a step needs no memory beyond inference.

The perturbation that stands in the weights is remembered as a list of terms. Moving to the next point, or undoing it
while updating, is one pass with the difference of the coefficients: a two-sided MeZO step is three passes.
Weights return to theta up to rounding; 16-bit weights are rounded stochastically, so the error has mean zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from torch import Tensor

from zoengine.directions import Evaluate, Step, Term, merged, scaled
from zoengine.evaluation.base import Closure, Loss, Mode, call, uninterrupted


class InPlace(Mode):
    """Perturbs the arena itself, or a copy that a method keeps; see the module's text."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._outstanding: dict[str | None, list[Term]] = {}  # by base; None is theta
        self._passes = 0  # roundings so far in the current step, for their seeds
        self._step: Step | None = None
        self._views = {name: self.arena.views(buffers) for name, buffers in self.copies.items()}

    def evaluate(self, step: Step, request: Evaluate, closure: Closure) -> Loss:
        self.skip(step, request)
        with nullcontext() if request.base is None else self.arena.reading(self._views[request.base]):
            return call(closure)

    def skip(self, step: Step, request: Evaluate) -> None:
        self._move(step, request.base, request.terms)

    def outstanding(self) -> Sequence[Term]:
        return self._outstanding.get(None, [])

    def settle(self, step: Step) -> None:
        for base in list(self._outstanding):
            self._move(step, base, [])

    def _settled(self) -> None:
        self._outstanding[None] = []

    def _move(self, step: Step, base: str | None, terms: Sequence[Term]) -> None:
        """Let ``terms`` stand in the buffers of ``base``."""
        with uninterrupted():
            moves = merged([*scaled(self._outstanding.get(base, []), -1.0), *terms])
            if any(t.coeff for t in moves):
                seed = self._perturbation_seed(step)
                for span in self.transform.spans(by_group=False):
                    self.transform.add(span, self._buffers(base), moves, sr_seed=seed)
            self._outstanding[base] = [t for t in terms if t.coeff != 0.0]

    def _buffers(self, base: str | None) -> list[Tensor]:
        return self.arena.buffers if base is None else self.copies[base]

    def _perturbation_seed(self, step: Step) -> int | None:
        if step != self._step:
            self._step, self._passes = step, 0
        self._passes += 1
        return step.auxiliary_rounding_seed(self._passes) if self.rounding == "stochastic" else None
