"""The zeroth-order gradient estimate, shared by every method that averages it over directions.

SPSA: Spall 1992; for language models Malladi et al. 2023 (MeZO), Definition 1. Leave-one-out: LOREN, section 3.
"""

from __future__ import annotations

import statistics
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from zoengine.directions import Evaluate, Noise, Request, Step, Term, merged, scaled
from zoengine.methods.fields import Fields


@dataclass(frozen=True)
class Estimate:
    """An estimate g = sum_k weights[k] direction_k.

    Attributes:
        terms: of g, in query order, with equal seeds and states merged.
        weights: one per query.
        loss: to report; the mean over the queries, or at theta for one-sided ones.
    """

    terms: list[Term]
    weights: list[float]
    loss: float


def estimate(
    step: Step, fields: Fields, directions: Sequence[Sequence[Term]] | None = None
) -> Generator[Request, Any, Estimate]:
    """Measure every direction at the same theta and the same batch; q of them, each theta + eps u_k.

    By ``fields.weighting`` and ``fields.two_sided``:

    * mean, two-sided: w_k = (L(theta + eps u_k) - L(theta - eps u_k)) / (2 eps q), 2q forwards.
    * mean, one-sided: w_k = (L(theta + eps u_k) - L(theta)) / (eps q), q + 1 forwards.
    * rloo: w_k = (L_k - mean L) / (eps (q - 1)), q forwards: unbiased like the others, the baseline costs nothing.
    * fitness: w_k = (L_k - mean L) / (q std L), q forwards: indifferent to the scale of the loss, as evolution
      strategies shape it (Salimans et al. 2017, section 2.1).

    Args:
        directions: the u_k as terms; by default z(seed of query k).
    """
    eps = fields.zo_eps
    if directions is None:
        directions = [[Noise(step.seed(k), 1.0)] for k in range(fields.n_queries)]
    q = len(directions)
    if fields.weighting != "mean":
        losses = yield [Evaluate(scaled(u, eps)) for u in directions]
        weights, loss = advantages(losses, eps, fields.weighting == "fitness"), sum(losses) / q
    elif fields.two_sided:
        losses = yield [Evaluate(scaled(u, sign * eps)) for u in directions for sign in (1.0, -1.0)]
        weights = [(plus - minus) / (2 * eps) / q for plus, minus in zip(losses[::2], losses[1::2], strict=True)]
        loss = sum(losses) / len(losses)
    else:
        losses = yield [Evaluate(), *(Evaluate(scaled(u, eps)) for u in directions)]
        loss = losses[0]
        weights = [(plus - loss) / eps / q for plus in losses[1:]]
    terms = [term for u, w in zip(directions, weights, strict=True) for term in scaled(u, w)]
    return Estimate(merged(terms), weights, loss)


def advantages(losses: Sequence[float], eps: float, fitness: bool = False) -> list[float]:
    """The weights of one-sided queries whose baseline is their own mean: rloo, or fitness."""
    q, mean = len(losses), sum(losses) / len(losses)
    if fitness:
        spread = statistics.pstdev(losses)
        return [(loss - mean) / (q * spread) if spread > 0 else 0.0 for loss in losses]
    return [(loss - mean) / (eps * (q - 1)) for loss in losses]


def forwards(fields: Fields) -> int:
    """Forward passes of one estimate over ``n_queries`` directions."""
    if fields.weighting != "mean":
        return fields.n_queries
    return 2 * fields.n_queries if fields.two_sided else fields.n_queries + 1
