"""HiZOO: Zhao et al. 2025, "Second-Order Fine-Tuning without Pain for LLMs"."""

from __future__ import annotations

import dataclasses
from typing import Literal

from zoengine.directions import Evaluate, Noise, Rule, Step
from zoengine.methods.base import Run, ZOOptimizer
from zoengine.methods.fields import Fields, require
from zoengine.transforms import Dense, Diagonal


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiZOOFields(Fields):
    """Fields of HiZOO."""

    hessian_smooth: float = dataclasses.field(default=1e-8, metadata={"help": "weight of a new curvature, in [0, 1)"})
    hizoo_order: Literal["step_then_hess", "hess_then_step"] = dataclasses.field(
        default="step_then_hess",
        metadata={"help": "step with the curvature of the query (the paper), or with the new one (the authors' code)"},
    )
    hess_center: bool = dataclasses.field(
        default=False, metadata={"help": "use z^2 - 1 for z^2, which takes the trace term out of the curvature"}
    )
    h_min: float = dataclasses.field(default=1e-2, metadata={"help": "least curvature, with hess_center"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.hessian_smooth < 1, self, "hessian_smooth", "in [0, 1)")
        require(self.h_min > 0, self, "h_min", "greater than 0")
        require(
            self.two_sided and self.weighting == "mean",
            self, "two_sided", "true, with weighting=mean: the curvature is the second difference of the losses",
        )  # fmt: skip
        require(
            not (self.hess_center and self.noise == "rademacher"),
            self, "noise", "gaussian with hess_center: z^2 - 1 is 0 for rademacher noise; drop one of the two",
        )  # fmt: skip


class HiZOO(ZOOptimizer):
    """Directions u = z / sqrt(h) with a diagonal curvature h that starts at 1; 2q + 1 forwards.

        D_k = |L(+) + L(-) - 2 L(theta)|,   h <- (1 - a) h + a (1/q) sum_k D_k / (2 eps^2) h z_k^2
        theta <- (1 - lr wd) theta - lr (1/q) sum_k c_k z_k / sqrt(h)

    with a = ``hessian_smooth``. E[D / (2 eps^2) h z^2] = diag(G) + tr(G / h) h / 2 for curvature G: the second term is
    about d times too large, which is why a has to be tiny. ``hess_center`` replaces z^2 by z^2 - 1 and removes it.
    """

    name = "hizoo"
    Fields = HiZOOFields
    state_names = ("hessian",)

    @classmethod
    def forwards_per_step(cls, fields: Fields) -> int:
        return 2 * fields.n_queries + 1

    def make_transform(self) -> Dense:
        return Diagonal(self.arena, self.fields.noise, self._states, "hessian")

    def start(self) -> None:
        for tensor in self.states["hessian"]:
            tensor.fill_(1.0)

    def run(self, step: Step) -> Run:
        f, seeds = self.fields, [step.seed(k) for k in range(self.fields.n_queries)]
        points = [Evaluate([Noise(seed, sign * f.zo_eps)]) for seed in seeds for sign in (1.0, -1.0)]
        centre, *losses = yield [Evaluate(), *points]
        terms, curvatures, q = [], [], f.n_queries
        for seed, plus, minus in zip(seeds, losses[::2], losses[1::2], strict=True):
            terms.append(Noise(seed, (plus - minus) / (2 * f.zo_eps) / q))
            curvatures.append(f.hessian_smooth * abs(plus + minus - 2 * centre) / (2 * f.zo_eps**2) / q)
        scalars = {
            "keep": 1 - f.hessian_smooth, "centre": float(f.hess_center), "floor": f.h_min if f.hess_center else 0.0,
            "hessian_first": float(f.hizoo_order == "hess_then_step"),
        }  # fmt: skip
        yield Rule("hizoo", terms, ("hessian",), scalars, second=curvatures)
        return centre
