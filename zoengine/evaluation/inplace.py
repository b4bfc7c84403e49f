"""``inplace``: the weights themselves are perturbed, so a step needs no memory beyond inference.

The perturbation that stands in the weights is remembered as a list of terms. Moving to the next point, or undoing it
while updating, is one pass with the difference of the coefficients: a two-sided MeZO step is three passes.
Weights return to theta up to rounding; 16-bit weights are rounded stochastically, so the error has mean zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from zoengine.directions import Noise, State, Step, Term
from zoengine.evaluation.base import Closure, Loss, Mode, call, uninterrupted


class InPlace(Mode):
    """Perturbs the arena itself; see the module's text."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._outstanding: list[Term] = []
        self._passes = 0  # roundings so far in the current step, for their seeds
        self._step: Step | None = None

    def evaluate(self, step: Step, terms: Sequence[Term], closure: Closure) -> Loss:
        self.skip(step, terms)
        return call(closure)

    def skip(self, step: Step, terms: Sequence[Term]) -> None:
        with uninterrupted():
            moves = _difference(terms, self._outstanding)
            seed = self._perturbation_seed(step) if any(t.coeff for t in moves) else None
            for span in self.arena.spans:
                self._launch(span, self.arena.buffers, moves, sr_seed=seed)
            self._outstanding = [t for t in terms if t.coeff != 0.0]

    def settle(self, step: Step) -> None:
        self.skip(step, ())

    def update(self, step: Step, terms: Sequence[Term], lrs: Sequence[float], weight_decays: Sequence[float]) -> None:
        with uninterrupted():
            for span, keep, lr in self._update_spans(lrs, weight_decays):
                # keep (theta' - outstanding) - lr terms, in one pass over theta' = theta + outstanding
                wanted = [t.scaled(-lr) for t in terms]
                moves = _difference(wanted, [t.scaled(keep) for t in self._outstanding])
                self._launch(span, self.arena.buffers, moves, keep=keep, sr_seed=self._update_seed(step))
            self._outstanding = []

    def fold(self, step: Step, name: str, keep: float, terms: Sequence[Noise]) -> None:
        if any(isinstance(t, State) and t.name == name for t in self._outstanding):
            self.settle(step)  # undoing it later would use the state's new values
        super().fold(step, name, keep, terms)

    def _perturbation_seed(self, step: Step) -> int | None:
        if step != self._step:
            self._step, self._passes = step, 0
        self._passes += 1
        return step.auxiliary_rounding_seed(self._passes) if self.rounding == "stochastic" else None


def _difference(wanted: Sequence[Term], present: Sequence[Term]) -> list[Term]:
    """wanted - present, with the terms of one seed or state merged; those of ``present`` come first."""
    merged: dict[Term, float] = {}
    for term in [*(t.scaled(-1.0) for t in present), *wanted]:
        unit = replace(term, coeff=1.0)
        merged[unit] = merged.get(unit, 0.0) + term.coeff
    return [replace(unit, coeff=coeff) for unit, coeff in merged.items()]
