"""LOREN as its authors' code has it (github.com/hseung88/loren, model/glue_transformer_loren.py), for comparison."""

from __future__ import annotations

import dataclasses

from zoengine.directions import Call, Evaluate, Fold, Noise, State, Step, Update
from zoengine.methods import spsa
from zoengine.methods.base import Run, ZOOptimizer
from zoengine.methods.loren import CovarianceFields
from zoengine.transforms import Dense, KronTiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class LORENOfficialFields(CovarianceFields):
    """Fields of LOREN's published code, with LOREN's defaults (its own: 10 queries, lr_cov 2e-3, weight_decay 0.01)."""

    beta1: float = dataclasses.field(
        default=0.9, metadata={"help": "heavy-ball momentum of matrices, once per query, in [0, 1)"}
    )
    weight_decay: float = dataclasses.field(
        default=0.0,
        metadata={"help": "theta *= 1 - lr * weight_decay once per query, matrices only; a decays too, with lr_cov"},
    )


class LORENOfficial(ZOOptimizer):
    """The released code of LOREN, which departs from the paper; :class:`zoengine.LOREN` is the paper's method.

        w_k = u_k - kappa (b . u_k) b for a whole matrix, b its vector a repeated in all m rows
        f_k = L(theta + eps w_k) for all K directions,   adv_k = f_k - mean(f)
        then for each k in turn, with w_k made anew from the a of that moment:
            M <- b1 M + adv_k w_k / (eps (K-1)),    X <- (1 - lr wd) X - lr M
            a <- (1 - lr_cov wd) a - lr_cov eps^2 adv_k score_k / (K-1)

    What differs from the paper:

    * One rank-1 term and one dot product for a matrix, not one per row; |a|^2 becomes m |a|^2. Of m n dimensions one
      is changed, by w = u - (1 + sqrt(rho) / t) (e . u) e with e = b / |b|.
    * kappa = (t + sqrt(rho)) / (|b|^2 t), the root as the paper prints it, which is not positive definite.
    * The weights, M and a change between the queries of a step. From the second query on, what is applied is not what
      was measured.
    * The gradient of a is multiplied by eps^2. With the default rates a moves by some 1e-11 of its size a step, which
      fp32 mostly rounds away: a stays what it was drawn as, unless weight decay shrinks it.
    * a decays, and the weights do so K times a step.
    * Vectors have an a too. Its gradient is summed over their elements, so all of them move alike.
    * The momentum decays once per query, b1^K a step.

    With a standing still this is leave-one-out MeZO with momentum, of :class:`zoengine.MeZOMomentum` with
    ``weighting="rloo"``, beta1 = b1^K and lr / (1 - b1), up to two things: one dimension in m n, and the k-th direction
    of a step coming in k - 1 queries later. Vectors have no momentum, so theirs is plain lr.

    Two details are the engine's: weight decay leaves vectors alone, the code decays them, and at a = 0, where the code
    divides by 0, w is u.
    """

    name = "loren-official"
    Fields = LORENOfficialFields
    state_names = ("momentum",)
    transform: KronTiled

    @classmethod
    def forwards_per_step(cls, fields: CovarianceFields) -> int:
        return fields.n_queries

    def make_transform(self) -> Dense:
        f = self.fields
        return KronTiled(self.arena, f.noise, self._states, f.damping, "curvature", Step(f.seed, 0).seed())

    def run(self, step: Step) -> Run:
        f = self.fields
        seeds = [step.seed(k) for k in range(f.n_queries)]
        losses = yield [Evaluate([Noise(seed, f.zo_eps)]) for seed in seeds]
        for seed, weight in zip(seeds, spsa.advantages(losses, f.zo_eps), strict=True):
            yield Fold("momentum", f.beta1, [Noise(seed, weight)])
            yield Update([State("momentum", 1.0)])
            yield Call(self._learn)
        return sum(losses) / len(losses)

    def _learn(self) -> None:
        """The fold's weights are adv / (eps (K - 1)): one eps to undo, two more as in the code."""
        f = self.fields
        decays = [f.lr_cov * float(group["weight_decay"]) for group in self.param_groups]
        self.transform.learn(f.lr_cov * f.zo_eps**3, decays)
