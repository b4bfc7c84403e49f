"""MeZO-SVRG: Gautam et al. 2024, "Variance-reduced Zeroth-Order Methods for Fine-Tuning Language Models"."""

from __future__ import annotations

import dataclasses
from typing import Any

from zoengine.directions import Call, Evaluate, Noise, Step, Update, scaled
from zoengine.methods.base import Run, ZOOptimizer
from zoengine.methods.fields import Fields, require

_FLOORS = (1e-5, 1e-6)  # what annealing leaves of lr_full and lr
_WORSE = 1.05  # the loss has risen if its mean is this many times the earlier one


@dataclasses.dataclass(frozen=True, kw_only=True)
class SVRGFields(Fields):
    """Fields of MeZO-SVRG."""

    lr_full: float = dataclasses.field(metadata={"help": "learning rate of the full-batch steps; has no default"})
    svrg_q: int = dataclasses.field(default=2, metadata={"help": "every this many steps is one over all the data"})
    lr_anneal: float = dataclasses.field(
        default=1.0, metadata={"help": "what both rates are divided by when the loss of an epoch has risen; 1: never"}
    )
    anneal_epoch: int = dataclasses.field(default=0, metadata={"help": "minibatch steps per epoch, for lr_anneal"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lr_full >= 0, self, "lr_full", "at least 0")
        require(self.lr > 0 or self.lr_full == 0, self, "lr", "greater than 0 unless lr_full is 0 too")
        require(self.svrg_q >= 1, self, "svrg_q", "at least 1")
        require(self.lr_anneal >= 1, self, "lr_anneal", "at least 1")
        require(
            self.lr_anneal == 1 or self.anneal_epoch > 0,
            self,
            "anneal_epoch",
            "the steps of an epoch with lr_anneal > 1",
        )
        require(
            self.two_sided and self.weighting == "mean",
            self, "two_sided", "true, with weighting=mean: the correction is a difference of central differences",
        )  # fmt: skip


class MeZOSVRG(ZOOptimizer):
    """Minibatch estimates corrected by the difference to the full batch at an anchor.

    Every ``svrg_q`` steps: anchor <- theta, and a step lr_full along g_f = (1/q) sum_k cf_k z(sf_k), measured on all
    the data. Otherwise, with fresh directions, theta <- theta - lr [(1/q) sum_k (c_k - ca_k) z(s_k) + g_f], where c is
    measured at theta and ca at the anchor, along the same z and on the same minibatch. Then the correction vanishes as
    theta goes to the anchor. Public code draws a new z for the second estimate and lets the anchor alias
    the weights, by which c z - ca z' corrects nothing. The anchor removes the noise of minibatches, not that of
    directions; and all minibatch steps until the next anchor share z(sf).

    Needs ``full_closure``; a schedule of the learning rate acts on both rates. 4 q forwards on minibatch steps.
    """

    name = "mezo-svrg"
    Fields = SVRGFields
    copy_names = ("anchor",)
    needs_full_data = True

    @classmethod
    def forwards_per_step(cls, fields: Fields) -> int:
        return 4 * fields.n_queries

    def new_memory(self) -> dict[str, Any]:
        return {"full": [], "divided": 1.0, "losses": []}

    def run(self, step: Step) -> Run:
        seeds = [step.seed(k) for k in range(self.fields.n_queries)]
        if step.number % self.fields.svrg_q == 0:
            losses = yield self._points(seeds, None, full=True)
            full = [[step.number, k, slope] for k, slope in enumerate(self._slopes(losses))]
            yield Call(self._drop_anchor)
            self.memory["full"] = full
            yield Update(scaled(self._gradient(full), self._rates()[0]))
        else:
            losses = yield [*self._points(seeds, None), *self._points(seeds, "anchor")]
            half = len(losses) // 2
            here, there = self._slopes(losses[:half]), self._slopes(losses[half:])
            losses = losses[:half]
            change = [Noise(s, c - ca) for s, c, ca in zip(seeds, here, there, strict=True)]
            yield Update(scaled([*change, *self._gradient(self.memory["full"])], self._rates()[1]))
            self._anneal(sum(losses) / len(losses))
        return sum(losses) / len(losses)

    def _points(self, seeds: list[int], base: str | None, full: bool = False) -> list[Evaluate]:
        eps = self.fields.zo_eps
        return [Evaluate([Noise(seed, sign * eps)], base, full) for seed in seeds for sign in (1.0, -1.0)]

    def _slopes(self, losses: list[float]) -> list[float]:
        """The projected gradients over q."""
        width = 2 * self.fields.zo_eps * self.fields.n_queries
        return [(plus - minus) / width for plus, minus in zip(losses[::2], losses[1::2], strict=True)]

    def _gradient(self, full: list[list]) -> list[Noise]:
        return [Noise(Step(self.fields.seed, number).seed(k), slope) for number, k, slope in full]

    def _drop_anchor(self) -> None:
        for anchor, buffer in zip(self.copies["anchor"], self.arena.buffers, strict=True):
            anchor.copy_(buffer)

    def _rates(self) -> tuple[float, float]:
        """What full and minibatch updates are multiplied by, in units of the scheduled lr."""
        f, divided = self.fields, self.memory["divided"]
        full, mini = (
            max(rate / divided, min(rate, floor)) for rate, floor in zip((f.lr_full, f.lr), _FLOORS, strict=True)
        )
        return (full / f.lr, mini / f.lr) if f.lr else (0.0, 0.0)

    def _anneal(self, loss: float) -> None:
        """Once an epoch, divide the rates if the mean loss of the last one is above that of two epochs earlier."""
        f = self.fields
        if f.lr_anneal == 1:
            return
        losses = [*self.memory["losses"], loss][-3 * f.anneal_epoch :]
        if len(losses) == 3 * f.anneal_epoch:
            earlier, latest = sum(losses[: f.anneal_epoch]), sum(losses[-f.anneal_epoch :])
            if latest > _WORSE * earlier:
                self.memory["divided"] *= f.lr_anneal
            losses = losses[f.anneal_epoch :]
        self.memory["losses"] = losses
