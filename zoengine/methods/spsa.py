"""The SPSA gradient estimate, shared by every method that averages it over independent directions.

Spall 1992; for language models Malladi et al. 2023 (MeZO), Definition 1.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from zoengine.directions import Evaluate, Noise, Request, Step
from zoengine.methods.fields import Fields


def estimate(step: Step, fields: Fields) -> Generator[Request, Any, tuple[list[Noise], float]]:
    """g = (1/q) sum_k c_k z_k, all c_k measured at the same theta and the same batch.

    Two-sided: c_k = (L(theta + eps z_k) - L(theta - eps z_k)) / (2 eps), 2q forwards.
    One-sided: c_k = (L(theta + eps z_k) - L(theta)) / eps, q + 1 forwards.

    Returns:
        The terms of g in query order, and the loss to report.
    """
    q, eps = fields.n_queries, fields.zo_eps
    seeds = [step.seed(k) for k in range(q)]
    if fields.two_sided:
        points = [Evaluate([Noise(seed, sign * eps)]) for seed in seeds for sign in (1.0, -1.0)]
        losses = yield points
        slopes = [(plus - minus) / (2 * eps) for plus, minus in zip(losses[::2], losses[1::2], strict=True)]
        loss = sum(losses) / len(losses)
    else:
        losses = yield [Evaluate(), *(Evaluate([Noise(seed, eps)]) for seed in seeds)]
        loss = losses[0]
        slopes = [(plus - loss) / eps for plus in losses[1:]]
    return [Noise(seed, slope / q) for seed, slope in zip(seeds, slopes, strict=True)], loss


def forwards(fields: Fields) -> int:
    """Forward passes of one estimate."""
    return 2 * fields.n_queries if fields.two_sided else fields.n_queries + 1
