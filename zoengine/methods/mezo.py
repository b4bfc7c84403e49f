"""MeZO, zeroth-order SGD: Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes", Algorithm 1."""

from __future__ import annotations

from zoengine.directions import Step, Update
from zoengine.methods import spsa
from zoengine.methods.base import Run, ZOOptimizer
from zoengine.methods.fields import Fields


class MeZO(ZOOptimizer):
    """theta <- (1 - lr weight_decay) theta - lr g, with g the SPSA estimate over ``n_queries`` directions.

    All queries are measured before the one update, which regenerates their q normals in a single pass.
    No state: a step is its losses and its number.
    """

    name = "mezo"
    Fields = Fields

    def run(self, step: Step) -> Run:
        estimate = yield from spsa.estimate(step, self.fields)
        yield Update(estimate.terms)
        return estimate.loss
