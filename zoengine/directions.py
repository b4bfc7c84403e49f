"""What a method can say: the terms of a direction, and the requests it makes of the engine.

Every point a zeroth-order method evaluates, and every update it makes, is

    theta + sum_k coeff_k z(seed_k) + sum_j coeff_j state_j .

A method yields requests built from such terms and is answered with losses; it never draws a number and never
touches memory. Coefficients are Python floats (fp64) and are rounded to fp32 once, by the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zoengine.noise.seeds import query_seeds

# Auxiliary rounding seeds of a step (in-place perturbation passes) use query numbers from here on, which no method
# has queries for.
_AUXILIARY = 1 << 31


@dataclass(frozen=True, slots=True)
class Noise:
    """``coeff * z(seed)``."""

    seed: int
    coeff: float

    def scaled(self, factor: float) -> Noise:
        """The same direction with its coefficient times ``factor``."""
        return Noise(self.seed, self.coeff * factor)


@dataclass(frozen=True, slots=True)
class State:
    """``coeff * state[name]``, a state array of the method."""

    name: str
    coeff: float

    def scaled(self, factor: float) -> State:
        """The same state with its coefficient times ``factor``."""
        return State(self.name, self.coeff * factor)


Term = Noise | State


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Ask for the loss at theta + terms; answered with a float."""

    terms: Sequence[Term] = ()


@dataclass(frozen=True, slots=True)
class Update:
    """theta <- (1 - lr weight_decay) theta - lr * sum(terms); every parameter group brings its lr and weight_decay."""

    terms: Sequence[Term]


@dataclass(frozen=True, slots=True)
class Fold:
    """state[name] <- keep * state[name] + sum(terms)."""

    name: str
    keep: float
    terms: Sequence[Noise]


# A method yields a list of Evaluate (answered with the list of their losses, read from the device at once), an
# Update or a Fold (answered with None).
Request = Sequence[Evaluate] | Update | Fold


@dataclass(frozen=True, slots=True)
class Step:
    """Step ``number`` of the run ``run_seed``: where a method's seeds come from."""

    run_seed: int
    number: int

    def seed(self, query: int = 0) -> int:
        """The direction seed of a query."""
        return query_seeds(self.run_seed, self.number, query).direction

    def rounding_seed(self) -> int:
        """The seed of the update's stochastic rounding."""
        return query_seeds(self.run_seed, self.number, 0).rounding

    def auxiliary_rounding_seed(self, count: int) -> int:
        """The seed of the ``count``-th other rounding within the step."""
        return query_seeds(self.run_seed, self.number, _AUXILIARY + count).rounding
