"""ZO-AdaMU: Jiang et al. 2024, "ZO-AdaMU Optimizer: Adapting Perturbation by the Momentum and Uncertainty"."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from zoengine.directions import Noise, Rule, State, Step
from zoengine.methods import spsa
from zoengine.methods.base import Run, ZOOptimizer
from zoengine.methods.fields import Fields, require
from zoengine.methods.zo_sign import sign
from zoengine.noise.table import STREAM_SECOND

_SIGMA = 1e-8  # added to v under the root
_FLOOR = 0.05  # the least an annealed coefficient falls to


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaMUFields(Fields):
    """Fields of ZO-AdaMU."""

    adamu_alpha: float = dataclasses.field(default=0.5, metadata={"help": "share of the fresh noise, in (0, 1]"})
    adamu_b1: float = dataclasses.field(default=0.9, metadata={"help": "weight of the fresh part of m, in [0, 1]"})
    adamu_b2: float = dataclasses.field(default=0.01, metadata={"help": "weight of the fresh part of v, in [0, 1]"})
    adamu_schedule: Literal["constant", "anneal"] = dataclasses.field(
        default="constant", metadata={"help": "anneal: all three fall from 1 by a cosine, over the steps of the run"}
    )
    steps: int = dataclasses.field(default=0, metadata={"help": "steps of the run, for adamu_schedule=anneal"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.adamu_alpha <= 1, self, "adamu_alpha", "in (0, 1]")
        require(0 <= self.adamu_b1 <= 1, self, "adamu_b1", "in [0, 1]")
        require(0 <= self.adamu_b2 <= 1, self, "adamu_b2", "in [0, 1]")
        require(self.steps >= 0, self, "steps", "at least 0")
        require(
            self.adamu_schedule == "constant" or self.steps > 0,
            self, "steps", "the number of steps of the run with adamu_schedule=anneal",
        )  # fmt: skip
        require(
            self.n_queries == 1,
            self, "n_queries", "1: the momentum takes the sign of the one projected gradient along it",
        )  # fmt: skip


class ZOAdaMU(ZOOptimizer):
    """Queries along a simulated momentum m and steps along m / sqrt(v).

        p = sqrt(alpha) z1,   s = h + sqrt(1 - alpha) z2,   m = b1 p + (1 - b1) s,   v = b2 p^2 + (1 - b2) s^2
        theta <- (1 - lr wd) theta - lr c m / sqrt(v + 1e-8),   h <- sign(c) m

    z1 and z2 are the same seed on streams 0 and 1; c is measured along m. Only h is stored. The released code queries
    along another mixture than it applies, and its schedule depends on the number of tensors; here m is one direction
    and the schedule a function of the step. By Cauchy-Schwarz |m| / sqrt(v) <= sqrt(b1^2 / b2 + (1 - b1)^2 / (1 - b2)).
    """

    name = "zo-adamu"
    Fields = AdaMUFields
    state_names = ("simulated_momentum",)

    def run(self, step: Step) -> Run:
        alpha, b1, b2 = coefficients(self.fields, step.number)
        seed, first, second = step.seed(), math.sqrt(alpha), math.sqrt(1 - alpha)
        noise = [Noise(seed, b1 * first), Noise(seed, (1 - b1) * second, STREAM_SECOND)]
        momentum = [*noise, State("simulated_momentum", 1 - b1)]
        estimate = yield from spsa.estimate(step, self.fields, [momentum])
        c = estimate.weights[0]
        scalars = {
            "state": 1 - b1, "first": first, "second": second, "beta2": b2, "one_minus_beta2": 1 - b2, "eps": _SIGMA,
            "sign": sign(c),
        }  # fmt: skip
        yield Rule("adamu", noise, ("simulated_momentum",), scalars, c)
        return estimate.loss


def coefficients(fields: AdaMUFields, step: int) -> tuple[float, float, float]:
    """alpha, b1 and b2 of a step: constant, or annealed with speeds 1, 0.1 and 1.5."""
    if fields.adamu_schedule == "constant":
        return fields.adamu_alpha, fields.adamu_b1, fields.adamu_b2
    return tuple(annealed(step, fields.steps, speed) for speed in (1.0, 0.1, 1.5))


def annealed(step: int, steps: int, speed: float) -> float:
    """1 for a tenth of the run (1,024 steps at most), a cosine until 0.8 of it, then constant; never below 0.05."""
    start, stop = min(1024, steps // 10), int(0.8 * steps)
    progress = min(1.0, speed * (min(step, stop) - start) / steps) if step >= start else 0.0
    return max(_FLOOR, 0.5 * (1 + math.cos(math.pi * progress)))
