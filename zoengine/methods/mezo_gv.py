"""MeZO-GV and MeZO-Greedy: candidates that guide the direction of a MeZO step.

"Prior-Driven Zeroth-Order Optimization for Scalable and Memory-Efficient LLM Fine-Tuning": Algorithm 1 and Greedy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

from zoengine.directions import Evaluate, Noise, Step, Update
from zoengine.methods import spsa
from zoengine.methods.base import Run, ZOOptimizer
from zoengine.methods.fields import Fields, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class CandidateFields(Fields):
    """What GV and Greedy share."""

    gv_m: int = dataclasses.field(default=4, metadata={"help": "candidate directions per step"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.gv_m >= 1, self, "gv_m", "at least 1")
        require(
            self.n_queries == 1 and self.two_sided and self.weighting == "mean",
            self, "n_queries", "1, with two_sided=true and weighting=mean: gv_m says how many candidates a step has",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class GVFields(CandidateFields):
    """Fields of MeZO-GV."""

    gv_alpha: float = dataclasses.field(default=0.5, metadata={"help": "share of the candidates that is elite"})
    gv_norm: Literal["none", "unit"] = dataclasses.field(
        default="none", metadata={"help": "unit: scale the guide so that E||v||^2 = d"}
    )
    gv_history: bool = dataclasses.field(
        default=False, metadata={"help": "two candidates: the best of the step before, and a new one"}
    )
    gv_weights: Literal["ranks", "rloo"] = dataclasses.field(
        default="ranks", metadata={"help": "rloo: no guide, the candidates weighted by their loss; gv_m forwards"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.gv_m >= 3 or self.gv_history or self.gv_weights == "rloo",
            self, "gv_m", "at least 3: with 2 candidates the guide is +-(z1 - z2), along which the two-sided "
            "estimate is the same either way, so the ranking has no effect and the step is MeZO's at twice the cost",
        )  # fmt: skip
        require(self.gv_m >= 2, self, "gv_m", "at least 2")
        require(0 < self.gv_alpha < 1, self, "gv_alpha", "in (0, 1)")
        require(
            self.gv_history or 1 <= int(self.gv_alpha * self.gv_m) < self.gv_m,
            self, "gv_alpha", "so large that gv_alpha * gv_m is at least one candidate",
        )  # fmt: skip
        require(not (self.gv_history and self.gv_weights == "rloo"), self, "gv_history", "false with gv_weights=rloo")


class MeZOGV(ZOOptimizer):
    """A two-sided step along v = mean of the elite candidates - mean of the others; M + 2 forwards.

    The M candidates z_i are ranked by L(theta + eps z_i), ties by index; the best floor(alpha M) are the elite. v is a
    sum of M noise terms, listed by index whatever their rank, so it is as exact as any direction and nothing is stored.
    ||v||^2 / d is 1/|E| + 1/|R| on average (1 at M = 4, 1/3 at M = 12): ``gv_norm="unit"`` takes that out.

    ``gv_history`` is what the released trainer runs: the best seed is carried over, ranked against one new one, and
    v = z_best - z_other; 4 forwards. ``gv_weights="rloo"`` uses the candidates' losses themselves, see
    :mod:`zoengine.methods.spsa`.
    """

    name = "mezo-gv"
    Fields = GVFields

    @classmethod
    def forwards_per_step(cls, fields: Fields) -> int:
        if fields.gv_weights == "rloo":
            return fields.gv_m
        return 4 if fields.gv_history else fields.gv_m + 2

    def new_memory(self) -> dict[str, Any]:
        return {"best": None} if self.fields.gv_history else {}

    def run(self, step: Step) -> Run:
        f = self.fields
        origins = self._candidates(step)
        seeds = [Step(step.run_seed, number).seed(query) for number, query in origins]
        losses = yield [Evaluate([Noise(seed, f.zo_eps)]) for seed in seeds]
        if f.gv_weights == "rloo":
            yield Update([Noise(s, w) for s, w in zip(seeds, spsa.advantages(losses, f.zo_eps), strict=True)])
            return sum(losses) / len(losses)
        elite = 1 if f.gv_history else int(f.gv_alpha * len(seeds))
        v = [Noise(s, w) for s, w in zip(seeds, guide(losses, elite, f.gv_norm == "unit"), strict=True)]
        estimate = yield from spsa.estimate(step, f, [v])
        yield Update(estimate.terms)
        if f.gv_history:
            self.memory["best"] = list(origins[losses.index(min(losses))])
        return estimate.loss

    def _candidates(self, step: Step) -> list[tuple[int, int]]:
        """(step, query) of each candidate's seed."""
        if not self.fields.gv_history:
            return [(step.number, k) for k in range(self.fields.gv_m)]
        best = self.memory["best"]
        return [tuple(best) if best else (step.number, 1), (step.number, 0)]


def guide(losses: Sequence[float], elite: int, unit: bool) -> list[float]:
    """The weight of each candidate: +1/elite for the lowest losses, -1/rest for the others, ties by index."""
    best = set(sorted(range(len(losses)), key=lambda k: (losses[k], k))[:elite])
    rest = len(losses) - elite
    scale = 1 / math.sqrt(1 / elite + 1 / rest) if unit else 1.0
    return [scale / elite if k in best else -scale / rest for k in range(len(losses))]


class MeZOGreedy(ZOOptimizer):
    """A two-sided step along the best candidate z*, the one with the lowest L(theta + eps z_i); M + 1 forwards.

    The loss that chose z* is the L(+) of its estimate. Up to M = 2 this gains nothing: the better of two symmetric
    draws has the even moments of one draw. M = 1 is MeZO.
    """

    name = "mezo-greedy"
    Fields = CandidateFields

    @classmethod
    def forwards_per_step(cls, fields: Fields) -> int:
        return fields.gv_m + 1

    def run(self, step: Step) -> Run:
        eps = self.fields.zo_eps
        seeds = [step.seed(k) for k in range(self.fields.gv_m)]
        losses = yield [Evaluate([Noise(seed, eps)]) for seed in seeds]
        plus = min(losses)
        seed = seeds[losses.index(plus)]
        (minus,) = yield [Evaluate([Noise(seed, -eps)])]
        yield Update([Noise(seed, (plus - minus) / (2 * eps))])
        return (plus + minus) / 2
