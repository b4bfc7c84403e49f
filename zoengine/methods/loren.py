"""LOREN: "Low-Rank Curvature for Zeroth-Order Optimization in LLM Fine-Tuning", Algorithm 1."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Literal

from zoengine.directions import Call, Evaluate, Fold, Noise, State, Step, Update
from zoengine.methods import spsa
from zoengine.methods.base import Run, ZOOptimizer
from zoengine.methods.fields import Fields, require
from zoengine.transforms import Dense, Kron


@dataclasses.dataclass(frozen=True, kw_only=True)
class CovarianceFields(Fields):
    """Fields of methods that learn the covariance of one-sided queries: LOREN, and as its authors' code has it."""

    n_queries: int = dataclasses.field(default=6, metadata={"help": "one-sided directions per step, at least 2"})
    two_sided: bool = dataclasses.field(default=False, metadata={"help": "always false: queries are one-sided"})
    weighting: Literal["rloo"] = dataclasses.field(default="rloo", metadata={"help": "always leave-one-out"})
    beta1: float = dataclasses.field(default=0.9, metadata={"help": "heavy-ball momentum of matrices, in [0, 1)"})
    damping: float = dataclasses.field(default=0.1, metadata={"help": "rho of the covariance (rho I + a a')^-1"})
    lr_cov: float = dataclasses.field(default=1e-3, metadata={"help": "learning rate of the vectors a"})

    def __post_init__(self) -> None:
        require(
            self.n_queries is True or not isinstance(self.n_queries, int) or self.n_queries >= 2,
            self, "n_queries", "at least 2: a query's baseline is the mean of the others",
        )  # fmt: skip
        super().__post_init__()
        require(
            not self.two_sided,
            self,
            "two_sided",
            "false: LOREN compares one-sided queries with each other; raise n_queries",
        )
        require(0 <= self.beta1 < 1, self, "beta1", "in [0, 1)")
        require(self.damping > 0, self, "damping", "greater than 0")
        require(self.lr_cov >= 0, self, "lr_cov", "at least 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LORENFields(CovarianceFields):
    """Fields of LOREN."""

    loren_adv_a: Literal["rloo", "standardised"] = dataclasses.field(
        default="rloo", metadata={"help": "weights that a learns from: as for the weights, or over their deviation"}
    )


class LOREN(ZOOptimizer):
    """Evolution strategy with covariance (rho I + a a')^-1 for the rows of each matrix, one vector a per matrix.

        w_k = sqrt(rho) Sigma^(1/2) u_k row by row,   f_k = L(theta + eps w_k),   adv_k = f_k - mean(f)
        M <- b1 M + 1/(eps (K-1)) sum_k adv_k w_k,    X <- (1 - lr wd) X - lr M
        a <- a - lr_cov 1/(K-1) sum_k adv_k score_k

    all from the same old a; vectors take the plain estimate without momentum. K forwards. The momentum is heavy-ball:
    its long-run step is 1/(1 - b1) times that of the estimate.

    Two things follow the authors' code and not the formulas of the paper: directions carry no 1/sqrt(rho), neither
    when queried nor when applied, and zo_eps is the size of the perturbation (the paper's Sigma would hold it).
    Elsewhere the code departs from the paper and this follows the paper: one vector per matrix and a dot product per
    row instead of one over the whole tiled matrix, all queries before the one update, and no further factor eps^2 on
    the gradient of a, which would keep a where it started. a is random at the start, a ~ N(0, 1), because its gradient
    is 0 at 0. ``loren_adv_a="standardised"`` divides adv by its standard deviation for a (fitness shaping); lr_cov is
    then of the order 1e-5 to 1e-4.
    """

    name = "loren"
    Fields = LORENFields
    state_names = ("momentum",)
    transform: Kron

    @classmethod
    def forwards_per_step(cls, fields: Fields) -> int:
        return fields.n_queries

    def make_transform(self) -> Dense:
        f = self.fields
        return Kron(self.arena, f.noise, self._states, f.damping, "curvature", Step(f.seed, 0).seed())

    def run(self, step: Step) -> Run:
        f = self.fields
        seeds = [step.seed(k) for k in range(f.n_queries)]
        losses = yield [Evaluate([Noise(seed, f.zo_eps)]) for seed in seeds]
        weights = spsa.advantages(losses, f.zo_eps)
        yield Fold("momentum", f.beta1, [Noise(s, w) for s, w in zip(seeds, weights, strict=True)])
        yield Update([State("momentum", 1.0)])
        yield Call(lambda: self.transform.learn(f.lr_cov * self._shape(losses)))
        return sum(losses) / len(losses)

    def _shape(self, losses: list[float]) -> float:
        """What turns the fold's weights adv / (eps (K - 1)) into those of a's gradient."""
        if self.fields.loren_adv_a == "rloo":
            return self.fields.zo_eps
        spread = statistics.pstdev(losses)
        return self.fields.zo_eps / spread if spread > 0 else 0.0
