"""Trust region of RoZO: scales the perturbation size and the learning rate by 1/2, 1 or 2.

The paper scales them "when consecutive finite-difference estimates show inconsistent directions". Two independent
random directions are orthogonal on average, so the sign of their estimates' product is a coin flip whatever the loss
looks like. Consistency is judged instead by what can be seen in one direction: whether two halves of the batch agree
on the sign of the slope (``halves``), or how far the outputs at the two query points are apart (``kl``, the paper's
other proposal).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

Mode = Literal["none", "halves", "kl"]

EPS_RANGE = (1e-5, 1e-3)
SMALLEST_LR_FACTOR = 1 / 16
START_AGREEMENT, AGREEMENT_DECAY = 0.65, 0.9
LOW_AGREEMENT, HIGH_AGREEMENT = 0.5, 0.8
LARGE_KL, SMALL_KL = 0.05, 0.005


@dataclasses.dataclass(frozen=True, slots=True)
class TrustRegion:
    """One state of the rule; each step makes the next one. All of it is numbers: see :meth:`to_dict`.

    Attributes:
        eps: perturbation size of the next step. It stays within EPS_RANGE, widened to hold the eps it started from.
        lr_factor: what the learning rate is multiplied with, in [SMALLEST_LR_FACTOR, 1].
        agreement: exponential average of "both halves' slopes have the same sign" (``halves``).
        wait: steps until the rule may act again; it acts at most once in ``window`` steps.
        lowest, highest: the range of eps.
    """

    eps: float
    lr_factor: float
    agreement: float
    wait: int
    lowest: float
    highest: float

    @classmethod
    def start(cls, eps: float, window: int) -> TrustRegion:
        """The state before the first step; the rule first acts after ``window`` steps."""
        low, high = EPS_RANGE
        return cls(eps, 1.0, START_AGREEMENT, window, min(low, eps), max(high, eps))

    def after_halves(self, agreeing: float, window: int) -> TrustRegion:
        """The next state; ``agreeing``: share of the directions along which both halves' slopes had the same sign."""
        agreement = AGREEMENT_DECAY * self.agreement + (1 - AGREEMENT_DECAY) * agreeing
        factor = 0.5 if agreement < LOW_AGREEMENT else 2.0 if agreement > HIGH_AGREEMENT else 1.0
        return dataclasses.replace(self, agreement=agreement)._after(factor, window)

    def after_kl(self, kl: float, window: int) -> TrustRegion:
        """The next state, from KL(p(theta + eps xi) || p(theta - eps xi)) of the model's outputs."""
        return self._after(0.5 if kl > LARGE_KL else 2.0 if kl < SMALL_KL else 1.0, window)

    def _after(self, factor: float, window: int) -> TrustRegion:
        wait = max(self.wait - 1, 0)
        if wait > 0 or factor == 1.0:
            return dataclasses.replace(self, wait=wait)
        return dataclasses.replace(
            self,
            eps=min(max(self.eps * factor, self.lowest), self.highest),
            lr_factor=min(max(self.lr_factor * factor, SMALLEST_LR_FACTOR), 1.0),
            wait=window,
        )

    def to_dict(self) -> dict[str, float | int]:
        """As JSON numbers; ``TrustRegion(**d)`` is the same state again."""
        return dataclasses.asdict(self)
