"""RoZO and RoZO-M: zeroth-order steps on the manifold of LoRA's low-rank products.

Song and Li, "RoZO: Geometry-Aware Zeroth-Order Fine-Tuning on Low-Rank Adapters for Black-Box Large Language Models",
sections 4 and 6. No code of the authors is known; where the text leaves a choice or cannot be meant literally, the
docstrings here and in :mod:`zoengine.rozo` say what is done and why.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Generator
from typing import Any, Literal

import torch
from torch import Tensor

from zoengine.directions import Call, State, Step
from zoengine.evaluation import Closure
from zoengine.methods import spsa
from zoengine.methods.base import Run, ZOOptimizer
from zoengine.methods.fields import Fields, require
from zoengine.rozo import TrustRegion, adam_
from zoengine.rozo.adapters import Adapters
from zoengine.transforms import Dense

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoZOFields(Fields):
    """Fields of MeZO plus the geometry of the step."""

    beta2: float = dataclasses.field(default=0.999, metadata={"help": "decay of the second moments (adam)"})
    adam_eps: float = dataclasses.field(default=1e-8, metadata={"help": "added to their root (adam)"})
    rozo_sampling: Literal["orthonormal", "factor"] = dataclasses.field(
        default="orthonormal", metadata={"help": "isotropic tangent vectors, or unit noise on A and B as MeZO has it"}
    )
    rozo_retract: Literal["svd", "factor"] = dataclasses.field(
        default="svd", metadata={"help": "cut Y + step to rank r, or step in A and B"}
    )
    rozo_precond: Literal["adam", "scaled", "none"] = dataclasses.field(
        default="adam", metadata={"help": "adam on (dB, dA); scaled: by (A A')^-1 and (B'B)^-1, for factor sampling"}
    )
    rozo_offset: bool = dataclasses.field(
        default=True, metadata={"help": "half of the adapter's rank cancels its start, so the model starts unchanged"}
    )
    tr_mode: Literal["none", "halves", "kl"] = dataclasses.field(
        default="none", metadata={"help": "trust region on (zo_eps, lr); halves and kl need a closure that offers them"}
    )
    tr_window: int = dataclasses.field(default=50, metadata={"help": "the trust region acts once in so many steps"})
    step_interval: int = dataclasses.field(
        default=1, metadata={"help": "steps taken in one tangent space before the retraction"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.beta2 < 1, self, "beta2", "in [0, 1)")
        require(self.adam_eps > 0, self, "adam_eps", "greater than 0")
        require(self.tr_window >= 1, self, "tr_window", "at least 1")
        require(self.step_interval >= 1, self, "step_interval", "at least 1")
        require(
            self.rozo_precond != "scaled" or self.rozo_sampling == "factor",
            self, "rozo_precond", "adam or none with rozo_sampling=orthonormal, which no change of gauge affects",
        )  # fmt: skip
        require(
            self.tr_mode != "kl" or (self.two_sided and self.weighting == "mean"),
            self, "tr_mode", "none or halves unless two_sided is true and weighting is mean",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoZOMomentumFields(RoZOFields):
    """Fields of RoZO plus the decay of the momentum."""

    beta1: float = dataclasses.field(default=0.9, metadata={"help": "decay of the momentum, in [0, 1)"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.beta1 < 1, self, "beta1", "in [0, 1)")


class RoZO(ZOOptimizer):
    """Y <- Retract((1 - lr weight_decay) Y - lr g) for every adapter product Y = B A; g is tangent at Y.

    Trains LoRA adapters only, found by peft's names, and refuses to be built over anything else. W = W0 + s B A: the
    point that moves is Y = B A, of rank r exactly; W0 is never touched.

    * Directions (equation 6): (dB, dA) at random, one for all adapters, so that B dA + dB A is tangent. Unit noise on
      B and A (``rozo_sampling=factor``) is not isotropic in Y: its estimate is B B' G + G A' A, the flow of plain LoRA.
      ``orthonormal`` is: its estimate is P_T(G).
    * Estimate (equation 7): as in :class:`zoengine.MeZO`, at (B +- eps dB) (A +- eps dA). The product differs from
      Y +- eps xi by eps^2 dB dA on both sides, which the two-sided difference cancels.
    * Preconditioner (section 4.4): ``adam`` averages the squares of the estimate's coordinates c (dB, dA). The paper's
      "squared perturbations" would average squared unit noise, which is 1.
    * Step and retraction (equation 8): by thin SVD, written as balanced factors in the gauge nearest to the old ones,
      so that elementwise averages keep their meaning. ``factor`` steps in B and A instead.
    * Trust region (sections 4.4, 6.5): :class:`zoengine.rozo.TrustRegion`. ``halves`` asks the closure for an attribute
      ``halves``: two closures, the losses of the two halves of the batch, whose mean is the loss. ``kl`` asks for
      ``kl``, a function returning the KL divergence between the model's outputs in the last two calls of the closure.
      Their answers stand among ``last_losses``, so a replay follows the same path.
    * ``step_interval``: that many steps are taken in one tangent space, in its coordinates, before they are retracted
      together, and the next tangent space is taken. (The paper speaks of reusing a "subspace matrix V", of which RoZO
      has none.) Weight decay acts on Y's singular values, when it is retracted.

    Start. B = 0, LoRA's usual start, is a singular point: of B dA + dB A only dB A is left. A and B are therefore drawn
    from N(0, 0.02^2) when the optimizer is built, unless the adapter is trained already. Alone that changes the model
    (``rozo_offset=False``, the paper's text). With ``rozo_offset``, half of the adapter's rank R holds (-B0, A0) and
    stays there: the adapter computes s (B A - B0 A0), which is 0 at first, with r = R / 2. So an ordinary PEFT
    adapter, on the unchanged base, is the trained model at any time: saving, loading and merging need no extra care.
    Shifting W0 in memory instead would make every saved adapter wrong on the original base.

    With rozo_sampling=factor, rozo_retract=factor, rozo_precond=none this is MeZO on A and B. The paper uses
    weight_decay 0.01 and lr 1e-5 to 1e-4.
    """

    name = "rozo"
    Fields = RoZOFields

    @classmethod
    def forwards_per_step(cls, fields: Fields) -> int:
        """Forward passes over a whole batch; with ``tr_mode=halves`` each is made of two over half of it."""
        return spsa.forwards(fields)

    def make_transform(self) -> Dense:
        own = self.fields
        self._directions = [f"direction{k}" for k in range(own.n_queries)]
        kept = ["second_moment"] * (own.rozo_precond == "adam") + ["base"] * (own.step_interval > 1)
        for name in self._directions + kept:
            self._states.tensors[name] = self.arena.new_state()
        return super().make_transform()

    def new_memory(self) -> dict[str, Any]:
        region = TrustRegion.start(self.fields.zo_eps, self.fields.tr_window)
        return {"trust_region": region.to_dict(), **self._new_window()}

    def start(self) -> None:
        own = self.fields
        retracts = own.rozo_retract == "svd"
        self._adapters = Adapters(self.arena, self.states, offset=own.rozo_offset, retracts=retracts)
        self._trained = self._adapters.start(Step(own.seed, 0).seed())

    def step(self, closure: Closure) -> float:  # type: ignore[override]
        return super().step(closure if closure is None else self._asking(closure))

    def run(self, step: Step) -> Run:
        if step.number == 0 and self._trained and self.fields.rozo_offset:
            logger.warning(
                "%d adapters, %r for one, are trained already. rozo_offset keeps the second half of each as it is, "
                "which is right for adapters of an earlier such run; for others set rozo_offset to false",
                len(self._trained), self._trained[0],
            )  # fmt: skip
        yield Call(lambda: self._prepare(step), prepares=True)
        estimate, region = yield from self._measure(step)
        yield Call(lambda: self._move(step, estimate.weights))
        self.memory["trust_region"] = region.to_dict()
        return estimate.loss

    def _average(self, gradient: str) -> str:
        """The state that holds what the step goes along, made from the one that holds the estimate."""
        return gradient

    def _new_window(self) -> dict[str, Any]:
        """Since the last retraction, by parameter group: the product of 1 - lr weight_decay, and whether lr was > 0."""
        groups = len(self.param_groups)
        return {"window_keeps": [1.0] * groups, "window_moved": [0.0] * groups}

    def _prepare(self, step: Step) -> None:
        own = self.fields
        if own.rozo_sampling == "orthonormal" or own.rozo_retract == "svd":
            if own.step_interval == 1:
                self._adapters.stand()
            elif step.number % own.step_interval == 0:
                torch._foreach_copy_(self.states["base"], self.arena.buffers)
                self._adapters.stand("base")
            elif not self._adapters.stands:  # after loading a state
                self._adapters.stand("base")
        for k, name in enumerate(self._directions):
            self._adapters.draw(name, step.seed(k), own.noise, own.rozo_sampling == "orthonormal")

    def _measure(self, step: Step) -> Generator[Any, Any, tuple[spsa.Estimate, TrustRegion]]:
        """The estimate, and the trust region of the next step."""
        region, own = TrustRegion(**self.memory["trust_region"]), self.fields
        fields = dataclasses.replace(own, zo_eps=region.eps)
        terms = [[State(name, 1.0)] for name in self._directions]

        def ask() -> tuple[Generator, list]:
            estimate = spsa.estimate(step, fields, terms)
            return estimate, next(estimate)

        estimate, points = ask()
        if own.tr_mode == "none":
            return _answered(estimate, (yield points)), region
        if own.tr_mode == "kl":
            answers = yield [p for k, point in enumerate(points) for p in [point] * (1 + k % 2)]  # +, -, and - for kl
            losses = [loss for k, loss in enumerate(answers) if k % 3 < 2]
            kl = sum(answers[2::3]) / len(terms)
            return _answered(estimate, losses), region.after_kl(kl, own.tr_window)
        answers = yield [p for p in points for _ in range(2)]
        halves = [answers[::2], answers[1::2]]
        slopes = [_answered(ask()[0], losses).weights for losses in halves]
        agreeing = sum(a * b > 0 for a, b in zip(*slopes, strict=True)) / len(terms)
        losses = [(a + b) / 2 for a, b in zip(*halves, strict=True)]
        return _answered(estimate, losses), region.after_halves(agreeing, own.tr_window)

    def _move(self, step: Step, weights: list[float]) -> None:
        own, region = self.fields, TrustRegion(**self.memory["trust_region"])
        scratch, *others = self._directions  # the directions have served: the first takes the estimate, then the step
        torch._foreach_mul_(self.states[scratch], weights[0])
        for name, weight in zip(others, weights[1:], strict=True):
            torch._foreach_add_(self.states[scratch], self.states[name], alpha=weight)
        direction = self._average(scratch)
        if own.rozo_precond != "none":
            self._precondition(step, direction, scratch)
            direction = scratch
        lrs = [float(group["lr"]) * region.lr_factor for group in self.param_groups]
        decays = [float(group["weight_decay"]) for group in self.param_groups]
        momentum = "momentum" if "momentum" in self.states else None
        keeps = [1 - lr * decay for lr, decay in zip(lrs, decays, strict=True)]
        if own.rozo_retract == "factor":
            return self._adapters.move(direction, lrs, keeps)
        if own.step_interval == 1:
            return self._adapters.retract(direction, lrs, keeps, momentum)
        # within a window: a step in the coordinates of its base; the last one retracts the sum of them
        self._adapters.move(direction, lrs, [1.0] * len(lrs))
        memory = self.memory
        memory["window_keeps"] = [a * b for a, b in zip(memory["window_keeps"], keeps, strict=True)]
        memory["window_moved"] = [1.0 if lr else moved for lr, moved in zip(lrs, memory["window_moved"], strict=True)]
        if (step.number + 1) % own.step_interval == 0:
            for way, base, theta in zip(self.states[scratch], self.states["base"], self.arena.buffers, strict=True):
                torch.sub(base, theta, out=way)
            self._adapters.retract(scratch, memory["window_moved"], memory["window_keeps"], momentum)
            memory.update(self._new_window())

    def _precondition(self, step: Step, direction: str, gradient: str) -> None:
        """Preconditioned ``direction``, written to ``gradient``."""
        own = self.fields
        if own.rozo_precond == "adam":
            parts = (self.states[name] for name in (direction, gradient, "second_moment"))
            for d, g, v in zip(*parts, strict=True):
                g.copy_(adam_(d, g, v, step.number + 1, own.beta2, own.adam_eps))
        else:
            torch._foreach_copy_(self.states[gradient], self.states[direction])
            self._adapters.precondition(gradient)

    def _asking(self, closure: Closure) -> Closure:
        """``closure`` as the evaluations of a step call it one after the other, with what the trust region asks."""
        mode = self.fields.tr_mode
        if mode == "none":
            return closure
        offered = getattr(closure, mode, None)
        if offered is None:
            raise TypeError(
                f"tr_mode={mode} needs a closure with an attribute {mode!r}, as {type(self).__name__} describes it; "
                "offer it, or set tr_mode to none"
            )
        turns = itertools.cycle(offered if mode == "halves" else (closure, closure, offered))
        return lambda: next(turns)()

    def _drive(self, step: Step, answer: Callable, *args: Any) -> float:
        before = self.forward_passes
        loss = super()._drive(step, answer, *args)
        self.forward_passes = before + self.forwards_per_step(self.fields)
        return loss

    def _stored(self) -> dict[str, list[Tensor]]:
        """Without the directions, which every step draws anew."""
        return {name: tensors for name, tensors in super()._stored().items() if name not in self._directions}

    def _restored(self) -> None:
        self._adapters.forget()


class RoZOMomentum(RoZO):
    """RoZO along a momentum (equation 9): m <- beta1 Transport(m) + (1 - beta1) g;  Y <- Retract(Y - lr m).

    Kept as coordinates (dB, dA), in which beta1 = 0 is RoZO bit for bit. Transport is the orthogonal projection onto
    the new tangent space, done when the point has been retracted; with ``rozo_retract=factor`` the coordinates carry
    over as they are, since B dA + dB A is tangent at whatever point B A is.
    """

    name = "rozo-m"
    Fields = RoZOMomentumFields
    state_names = ("momentum",)

    def _average(self, gradient: str) -> str:
        beta1 = self.fields.beta1
        torch._foreach_mul_(self.states["momentum"], beta1)
        torch._foreach_add_(self.states["momentum"], self.states[gradient], alpha=1 - beta1)
        return "momentum"


def _answered(estimate: Generator, losses: list[float]) -> spsa.Estimate:
    """What a generator that has asked its one question returns when it is answered."""
    try:
        estimate.send(losses)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("the estimate asked twice")
