"""ZO-signSGD: Liu et al. 2019, "signSGD via Zeroth-Order Oracle", Algorithm 1."""

from __future__ import annotations

import dataclasses
from typing import Literal

from zoengine.directions import Noise, Rule, Step, Update
from zoengine.methods import spsa
from zoengine.methods.base import Run, ZOOptimizer
from zoengine.methods.fields import Fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class SignFields(Fields):
    """Fields of ZO-signSGD."""

    sign_mode: Literal["elementwise", "scalar"] = dataclasses.field(
        default="elementwise",
        metadata={"help": "elementwise: the sign of every coordinate of g; scalar: that of each projected gradient"},
    )


class ZOSignSGD(ZOOptimizer):
    """theta <- (1 - lr wd) theta - lr sign(g), elementwise, with sign(0) = 0; g is the SPSA estimate.

    With ``sign_mode="scalar"`` the step is lr (1/q) sum_k sign(c_k) z_k, as some public code has it. Either way its
    length does not depend on the projected gradient: where MeZO moves lr |c|, this moves lr.
    """

    name = "zo-signsgd"
    Fields = SignFields

    def run(self, step: Step) -> Run:
        estimate = yield from spsa.estimate(step, self.fields)
        if self.fields.sign_mode == "elementwise":
            yield Rule("sign", estimate.terms, step=1.0)
        else:
            q = len(estimate.weights)
            yield Update([Noise(step.seed(k), sign(w) / q) for k, w in enumerate(estimate.weights)])
        return estimate.loss


def sign(x: float) -> float:
    """-1, 0 or 1."""
    return float((x > 0) - (x < 0))
