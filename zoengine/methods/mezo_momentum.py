"""MeZO with momentum: the update direction is an exponential average, the query direction stays fresh noise."""

from __future__ import annotations

import dataclasses

from zoengine.directions import Fold, FoldAndUpdate, State, Step, Update, scaled
from zoengine.methods import spsa
from zoengine.methods.base import Run, ZOOptimizer
from zoengine.methods.fields import Fields, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class MomentumFields(Fields):
    """Fields of MeZO plus the decay of the average."""

    beta1: float = dataclasses.field(default=0.9, metadata={"help": "decay of the momentum, in [0, 1)"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.beta1 < 1, self, "beta1", "in [0, 1)")


class MeZOMomentum(ZOOptimizer):
    """m <- beta1 m + (1 - beta1) g;  theta <- (1 - lr weight_decay) theta - lr m.

    g is the SPSA estimate of :class:`zoengine.MeZO`. m is fp32 whatever the dtype of the weights and starts at 0,
    without bias correction: the first step is (1 - beta1) of MeZO's. The heavy-ball form m <- beta1 m + g is this
    one with lr / (1 - beta1).
    """

    name = "mezo-momentum"
    Fields = MomentumFields
    state_names = ("momentum",)

    def run(self, step: Step) -> Run:
        estimate = yield from spsa.estimate(step, self.fields)
        beta1 = self.fields.beta1
        fold = Fold("momentum", beta1, scaled(estimate.terms, 1 - beta1))
        yield FoldAndUpdate(fold, Update([State("momentum", 1.0)]))
        return estimate.loss
