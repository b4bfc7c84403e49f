"""LOZO and LOZO-M: Chen et al. 2025, "Enhancing Zeroth-order Fine-tuning ... with Low-rank Structures"."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from zoengine.directions import Call, Fold, State, Step, Update, scaled
from zoengine.methods import spsa
from zoengine.methods.base import Run, ZOOptimizer
from zoengine.methods.fields import Fields, require
from zoengine.transforms import Dense, Lozo


@dataclasses.dataclass(frozen=True, kw_only=True)
class LOZOFields(Fields):
    """Fields of LOZO."""

    rank: int = dataclasses.field(default=2, metadata={"help": "rank of the directions of matrices"})
    step_interval: int = dataclasses.field(default=50, metadata={"help": "steps after which V is drawn anew"})
    lozo_scale: Literal["none", "1/r"] = dataclasses.field(
        default="none", metadata={"help": "factor on the update: none as the authors' code, 1/r as the paper"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rank >= 1, self, "rank", "at least 1")
        require(self.step_interval >= 1, self, "step_interval", "at least 1")


class LOZO(ZOOptimizer):
    """MeZO along U V' in every matrix: U (m x r) fresh for each direction, V (n x r) fixed for ``step_interval`` steps.

    X <- (1 - lr wd) X - lr c U V', times 1/r under ``lozo_scale``. Vectors, and matrices with a side below r, take
    dense directions. E||U V'||^2 = r m n, so the perturbation is sqrt(r) times MeZO's at the same ``zo_eps``. V is
    regenerated from the seed of the step at which it was drawn: no state.
    """

    name = "lozo"
    Fields = LOZOFields
    transform: Lozo

    def make_transform(self) -> Dense:
        self._drawn: Step | None = None
        return Lozo(self.arena, self.fields.noise, self._states, self.fields.rank)

    def run(self, step: Step) -> Run:
        yield Call(lambda: self._redraw(step), prepares=True)
        estimate = yield from spsa.estimate(step, self.fields)
        yield from self._move(step, scaled(estimate.terms, self._scale()))
        return estimate.loss

    def _move(self, step: Step, terms: list) -> Any:
        yield Update(terms)

    def _scale(self) -> float:
        return 1 / self.fields.rank if self.fields.lozo_scale == "1/r" else 1.0

    def _redraw(self, step: Step) -> None:
        drawn = step.last(self.fields.step_interval)
        if drawn != self._drawn:
            self.transform.redraw(drawn.seed())
            self._drawn = drawn


@dataclasses.dataclass(frozen=True, kw_only=True)
class LOZOMFields(LOZOFields):
    """Fields of LOZO-M."""

    beta1: float = dataclasses.field(default=0.9, metadata={"help": "decay of the momentum, in [0, 1)"})
    transport: Literal["mean", "exact"] = dataclasses.field(
        default="mean",
        metadata={"help": "of the momentum to a new V: N V'V_new / n as the paper, or exact least squares"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.beta1 < 1, self, "beta1", "in [0, 1)")


class LOZOM(LOZO):
    """LOZO with momentum kept in the factor: N <- b1 N + (1 - b1) c U, X <- (1 - lr wd) X - lr N V'.

    When V changes, N <- N (V_old' V_new) / n first. Independent V are nearly orthogonal, so of the momentum's norm only
    about sqrt(r / n) is carried over: in effect it restarts every ``step_interval`` steps. Vectors keep an ordinary
    average. N starts at 0, where the authors' code starts at c U.
    """

    name = "lozo-m"
    Fields = LOZOMFields
    state_names = ("momentum",)

    def _move(self, step: Step, terms: list) -> Any:
        fields = self.fields
        if step.number and step.number % fields.step_interval == 0:
            old = Step(step.run_seed, step.number - 1).last(fields.step_interval)
            yield Call(lambda: self.transform.transport("momentum", old.seed(), fields.transport == "exact"))
        yield Fold("momentum", fields.beta1, scaled(terms, 1 - fields.beta1))
        yield Update([State("momentum", 1.0)])
