"""MeZO-Adam and ZO-AdaMM: Adam and AMSGrad fed with the zeroth-order gradient.

MeZO: Malladi et al. 2023, section 3 and appendix B (moments from the log of the steps). ZO-AdaMM: Chen et al. 2019,
Algorithm 1; its projection is the identity here. Adam: Kingma and Ba 2015; decay is decoupled (Loshchilov and Hutter
2019).

With independent directions E[g_i^2] = ||grad||^2 + 2 grad_i^2, so the second moment is nearly the same for all
coordinates: Adam is mostly a normaliser by the running size of the projected gradient here.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from zoengine.directions import Noise, Rule, Step
from zoengine.methods import spsa
from zoengine.methods.base import Run, ZOOptimizer
from zoengine.methods.fields import Fields, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamFields(Fields):
    """Fields of Adam's rule."""

    beta1: float = dataclasses.field(default=0.9, metadata={"help": "decay of the first moment, in [0, 1)"})
    beta2: float = dataclasses.field(default=0.999, metadata={"help": "decay of the second moment, in [0, 1)"})
    adam_eps: float = dataclasses.field(default=1e-8, metadata={"help": "added to the root of the second moment"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.beta1 < 1, self, "beta1", "in [0, 1)")
        require(0 <= self.beta2 < 1, self, "beta2", "in [0, 1)")
        require(self.adam_eps > 0, self, "adam_eps", "greater than 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeZOAdamFields(AdamFields):
    """Fields of MeZO-Adam."""

    moments: Literal["stored", "recomputed"] = dataclasses.field(
        default="stored", metadata={"help": "stored: two fp32 states; recomputed: no state, from the log of the steps"}
    )
    adam_window: int = dataclasses.field(
        default=128, metadata={"help": "recomputed: past steps that count; each costs a normal per parameter and step"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.adam_window >= 1, self, "adam_window", "at least 1")
        require(
            self.moments == "stored" or self.n_queries == 1,
            self, "n_queries", "1 with moments=recomputed: g^2 of several directions has products of different steps' "
            "noise; use moments=stored",
        )  # fmt: skip


class MeZOAdam(ZOOptimizer):
    """m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; theta <- (1 - lr wd) theta - lr m' / (sqrt(v') + adam_eps).

    m' and v' are bias-corrected; g is the SPSA estimate. With ``moments="recomputed"`` both are sums over the last W =
    ``adam_window`` steps, m = (1 - b1) sum_s b1^(t-s) c_s z(s) and v likewise with c_s^2 z(s)^2, regenerated in the
    pass of the update: no memory, W normals per parameter. What is cut off has relative weight b^W, and the correction
    uses min(t, W); 128 steps cut 1e-6 off for b = 0.9 but 88 % for b2 = 0.999, so lower b2 there.
    """

    name = "mezo-adam"
    Fields = MeZOAdamFields
    state_names = ("first_moment", "second_moment")

    def __init__(self, params: Any, **fields: Any) -> None:
        if fields.get("moments") == "recomputed":
            self.state_names = ()
        super().__init__(params, **fields)

    def new_memory(self) -> dict[str, Any]:
        return {"log": []} if self.fields.moments == "recomputed" else {}

    def run(self, step: Step) -> Run:
        estimate = yield from spsa.estimate(step, self.fields)
        if self.fields.moments == "stored":
            yield adam("adam", step, estimate.terms, self.fields, self.state_names)
        else:
            log = [*self.memory["log"], [step.number, estimate.weights[0]]][-self.fields.adam_window :]
            self.memory["log"] = log
            yield self._recomputed(step, log)
        return estimate.loss

    def _recomputed(self, step: Step, log: list[list]) -> Rule:
        f = self.fields
        terms, second = [], []
        for number, c in log:
            age = step.number - number
            terms.append(Noise(Step(step.run_seed, number).seed(), (1 - f.beta1) * f.beta1**age * c))
            second.append((1 - f.beta2) * f.beta2**age * c * c)
        correction1, correction2 = 1 - f.beta1 ** len(log), 1 - f.beta2 ** len(log)
        scalars = {"root_correction": correction2**-0.5, "eps": f.adam_eps}
        return Rule("adam_replay", terms, (), scalars, 1 / correction1, second)


class ZOAdaMM(ZOOptimizer):
    """As Adam, but divided by the root of the largest v so far, and without bias correction (AMSGrad)."""

    name = "zo-adamm"
    Fields = AdamFields
    state_names = ("first_moment", "second_moment", "largest_moment")

    def run(self, step: Step) -> Run:
        estimate = yield from spsa.estimate(step, self.fields)
        yield adam("amsgrad", step, estimate.terms, self.fields, self.state_names)
        return estimate.loss


def adam(name: str, step: Step, terms: list, fields: AdamFields, states: tuple[str, ...]) -> Rule:
    """The rule of one step; ``amsgrad`` corrects no bias."""
    corrected = name == "adam"
    correction1 = 1 - fields.beta1 ** (step.number + 1) if corrected else 1.0
    correction2 = 1 - fields.beta2 ** (step.number + 1) if corrected else 1.0
    scalars = {
        "beta1": fields.beta1, "one_minus_beta1": 1 - fields.beta1, "beta2": fields.beta2,
        "one_minus_beta2": 1 - fields.beta2, "root_correction": correction2**-0.5, "eps": fields.adam_eps,
    }  # fmt: skip
    return Rule(name, terms, states, scalars, 1 / correction1)
