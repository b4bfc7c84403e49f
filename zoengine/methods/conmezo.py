"""ConMeZO: "ConMeZO: Adaptive Descent-Direction Sampling for Gradient-Free Finetuning of Large Language Models"."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from zoengine.directions import Fold, FoldAndUpdate, Noise, State, Step, Term, Update, scaled
from zoengine.methods import spsa
from zoengine.methods.base import Run, ZOOptimizer
from zoengine.methods.fields import Fields, require

_FIRST_BETA = 0.1  # of the warm-up


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConMeZOFields(Fields):
    """Fields of ConMeZO."""

    cone_theta: float = dataclasses.field(
        default=1.35, metadata={"help": "half-angle of the cone around the momentum, in [0, pi/2]; pi/2 is MeZO"}
    )
    cone_beta: float = dataclasses.field(default=0.99, metadata={"help": "decay of the momentum after warm-up"})
    steps: int = dataclasses.field(
        default=0, metadata={"help": "steps of the run, whose first tenth warms cone_beta up from 0.1; 0: no warm-up"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.cone_theta <= math.pi / 2, self, "cone_theta", "in [0, pi/2] (radians)")
        require(0 <= self.cone_beta < 1, self, "cone_beta", "in [0, 1)")
        require(self.steps >= 0, self, "steps", "at least 0")


class ConMeZO(ZOOptimizer):
    """Directions from a cone around the momentum m.

        u = sqrt(d) cos(theta) m / ||m|| + sin(theta) z,   c two-sided along u
        x <- (1 - lr wd) x - lr c u,   then m <- b m + (1 - b) c u

    The first direction is z itself and m starts at 0. (Starting m at z would make the first direction parallel to it.)
    ||m|| is over all parameters and measured by the pass that folds m, where the authors' code propagates an estimate
    of it; and m itself is stored, where the code keeps the direction in its place and subtracts the noise again, which
    fails at theta = pi/2 and cancels badly in 16 bit. The mean of c u is sin^2(theta) times the gradient plus
    d cos^2(theta) times its part along m.
    """

    name = "conmezo"
    Fields = ConMeZOFields
    state_names = ("momentum",)

    def new_memory(self) -> dict[str, Any]:
        return {"started": False}

    def run(self, step: Step) -> Run:
        directions = [self._direction(step.seed(k)) for k in range(self.fields.n_queries)]
        estimate = yield from spsa.estimate(step, self.fields, directions)
        beta = momentum_beta(step.number, self.fields)
        fold = Fold("momentum", beta, scaled(estimate.terms, 1 - beta), norm=True)
        yield FoldAndUpdate(fold, Update(estimate.terms), fold_first=False)
        if any(estimate.weights):
            self.memory["started"] = True
        return estimate.loss

    def _direction(self, seed: int) -> list[Term]:
        if not self.memory["started"]:
            return [Noise(seed, 1.0)]
        cosine, sine = math.cos(self.fields.cone_theta), math.sin(self.fields.cone_theta)
        if abs(cosine) < 1e-8:  # cos(pi/2) is 6e-17 in floating point
            return [Noise(seed, 1.0)]
        return [Noise(seed, sine), State("momentum", math.sqrt(self.arena.numel) * cosine, unit=True)]


def momentum_beta(step: int, fields: ConMeZOFields) -> float:
    """b of a step: 0.1 for the first hundredth of the run, then rising, ``cone_beta`` from the tenth on."""
    first, last, final = fields.steps / 100, fields.steps / 10, fields.cone_beta
    if step > last or fields.steps == 0:
        return final
    if step <= first:
        return min(_FIRST_BETA, final)
    progress = ((step - first) / (last - first)) ** 1.8
    return final - (final - min(_FIRST_BETA, final)) / (1 + 8 * progress) ** 3
