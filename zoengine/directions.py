"""What a method can say: the terms of a direction, and the requests it makes of the engine.

Every point a zeroth-order method evaluates, and every linear update it makes, is

    theta + sum_k coeff_k T(z(seed_k)) + sum_j coeff_j state_j ,

where T is the method's transform (:mod:`zoengine.transforms`). A method yields requests built from such terms and is
answered with losses; it never draws a number. Coefficients are Python floats (fp64), rounded to fp32 once, by the
engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from zoengine.noise.seeds import query_seeds
from zoengine.noise.table import STREAM_DIRECTION

# Auxiliary rounding seeds of a step (in-place perturbation passes) use query numbers from here on, which no method
# has queries for.
_AUXILIARY = 1 << 31


@dataclass(frozen=True, slots=True)
class Noise:
    """``coeff * T(z(seed))``, drawn from ``stream``."""

    seed: int
    coeff: float
    stream: int = STREAM_DIRECTION

    def scaled(self, factor: float) -> Noise:
        """The same direction with its coefficient times ``factor``."""
        return Noise(self.seed, self.coeff * factor, self.stream)


@dataclass(frozen=True, slots=True)
class State:
    """``coeff * state[name]``, a state of the method; with ``unit``, ``coeff * state / ||state||``.

    The norm is the one that the last ``Fold(..., norm=True)`` left on the device, so nothing waits for it. A state
    without a norm yet, or with norm 0, contributes nothing.
    """

    name: str
    coeff: float
    unit: bool = False

    def scaled(self, factor: float) -> State:
        """The same state with its coefficient times ``factor``."""
        return State(self.name, self.coeff * factor, self.unit)


Term = Noise | State


def scaled(terms: Sequence[Term], factor: float) -> list[Term]:
    """Every term with its coefficient times ``factor``."""
    return [term.scaled(factor) for term in terms]


def merged(terms: Sequence[Term]) -> list[Term]:
    """The same sum with the terms of one seed or state put together, in the order of their first appearance."""
    total: dict[Term, float] = {}
    for term in terms:
        unit = replace(term, coeff=1.0)
        total[unit] = total.get(unit, 0.0) + term.coeff
    return [replace(unit, coeff=coeff) for unit, coeff in total.items()]


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Ask for a loss; answered with a float.

    Attributes:
        terms: the point is ``base`` + terms.
        base: None for theta, or the name of one of the method's copies of it.
        full: the loss over all training data instead of the step's batch.
    """

    terms: Sequence[Term] = ()
    base: str | None = None
    full: bool = False


@dataclass(frozen=True, slots=True)
class Update:
    """theta <- (1 - lr weight_decay) theta - lr * sum(terms); every parameter group brings its lr and weight_decay."""

    terms: Sequence[Term]


@dataclass(frozen=True, slots=True)
class Fold:
    """state[name] <- keep * state[name] + sum(terms); terms are noise, or the state itself with ``unit``.

    With ``norm``, the norm of the new state is left on the device for :class:`State` terms with ``unit``.
    """

    name: str
    keep: float
    terms: Sequence[Term]
    norm: bool = False


@dataclass(frozen=True, slots=True)
class FoldAndUpdate:
    """A fold and an update of theta, one after the other, in one pass over memory where that is possible."""

    fold: Fold
    update: Update
    fold_first: bool = True


@dataclass(frozen=True, slots=True)
class Rule:
    """theta and states through an elementwise rule of :func:`zoengine.ops.rule_step_`.

    Attributes:
        name: of the rule.
        terms: noise; for rules that combine it to g, its coefficients, else the steps in units of -lr.
        states: the method's states that the rule updates, in its order.
        scalars: the rule's numbers by name, without ``step``.
        step: the step in units of -lr, for the rules that have one.
        second: a second set of coefficients, for the rules that have one.
    """

    name: str
    terms: Sequence[Noise]
    states: Sequence[str] = ()
    scalars: Mapping[str, float] = field(default_factory=dict)
    step: float | None = None
    second: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """Run ``function`` while theta is clean (nothing outstanding); it may read and write theta and states.

    ``prepares``: it does not change theta, and doing it twice is doing it once (a mask, a basis). Only such calls may
    come before a step's last evaluation.
    """

    function: Callable[[], None]
    prepares: bool = False


# A method yields a list of Evaluate (answered with the list of their losses, read from the device at once) or one of
# the others (answered with None).
Change = Update | Fold | FoldAndUpdate | Rule | Call
Request = Sequence[Evaluate] | Change


@dataclass(frozen=True, slots=True)
class Step:
    """Step ``number`` of the run ``run_seed``: where a method's seeds come from."""

    run_seed: int
    number: int

    def seed(self, query: int = 0) -> int:
        """The direction seed of a query."""
        return query_seeds(self.run_seed, self.number, query).direction

    def last(self, interval: int) -> Step:
        """The latest step whose number is a multiple of ``interval``: where a slow draw was made."""
        return Step(self.run_seed, self.number - self.number % interval)

    def rounding_seed(self) -> int:
        """The seed of the update's stochastic rounding."""
        return query_seeds(self.run_seed, self.number, 0).rounding

    def auxiliary_rounding_seed(self, count: int) -> int:
        """The seed of the ``count``-th other rounding within the step."""
        return query_seeds(self.run_seed, self.number, _AUXILIARY + count).rounding
