"""The quadratic of the ConMeZO paper, runs of our optimizers on it, and MeZO's exact expectation there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoengine import ConMeZO, MeZO
from zoengine.evaluation import NonFiniteLossError

DIMENSION, NORM, EPS = 1000, 10.0, 0.01
_DIVERGED = 1e3  # a loss this many times the first one will not come back


@dataclass(frozen=True)
class Quadratic:
    """f(x) = factor sum_i sigma_i x_i^2, with sigma geometric from 1 / condition to 1."""

    factor: float
    condition: float

    def weights(self) -> Tensor:
        """factor sigma, float64 of shape (DIMENSION,)."""
        return self.factor * torch.logspace(-math.log10(self.condition), 0, DIMENSION, dtype=torch.float64)


def start(seed: int) -> Tensor:
    """A random point of norm 10, float64 of shape (DIMENSION,); the same for every method."""
    x = torch.randn(DIMENSION, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return NORM * x / x.norm()


class Run:
    """One optimizer on one quadratic, from :func:`start`; two-sided, so a step is two evaluations.

    Args:
        fields: lr, and cone_theta and cone_beta for ConMeZO; without them it is MeZO.
        every: steps between recorded losses.

    Attributes:
        losses: f at the start and after every ``every`` steps, float64; inf from where it diverged.
    """

    def __init__(self, problem: Quadratic, seed: int, fields: dict[str, float], every: int) -> None:
        self._weights = problem.weights()
        self._x = nn.Parameter(start(seed).float())
        method = ConMeZO if "cone_theta" in fields else MeZO
        self._optimizer = method([self._x], zo_eps=EPS, seed=seed, mode="shadow", **fields)
        self.every = every
        self.losses = [self._now()]

    @property
    def steps(self) -> int:
        return (len(self.losses) - 1) * self.every

    @property
    def diverged(self) -> bool:
        return self.losses[-1] == math.inf

    def until(self, steps: int, below: float = -1.0, report: Callable[[int], None] = lambda steps: None) -> float:
        """Go on to ``steps`` steps in all, or to a recorded loss of ``below``; returns the last recorded loss."""
        while self.steps < steps and self.losses[-1] > below and not self.diverged:
            try:
                for _ in range(self.every):
                    self._optimizer.step(self._loss)
                loss = self._now()
            except NonFiniteLossError:
                loss = math.inf
            self.losses.append(loss if loss < _DIVERGED * self.losses[0] else math.inf)
            report(self.every)
        return self.losses[-1]

    def _loss(self) -> Tensor:
        return torch.dot(self._weights, self._x.double().square())

    def _now(self) -> float:
        with torch.no_grad():
            return float(self._loss())


def mezo_expectation(problem: Quadratic, x: Tensor, lrs: Sequence[float], steps: int, every: int) -> Tensor:
    """What f is on average after 0, every, 2 every, ... steps of MeZO from ``x``.

    A central difference of a quadratic is exact whatever zo_eps, c = g . u, and for normal u

        E (x_i - lr c u_i)^2 = x_i^2 (1 - 2 lr h_i + 2 lr^2 h_i^2) + lr^2 sum_j h_j^2 x_j^2,   h the Hessian's diagonal,

    so the squares follow a linear recursion that needs no samples.

    Returns:
        float64 of shape (len(lrs), steps // every + 1); inf or nan where it diverges.
    """
    weights = problem.weights()
    h = 2 * weights
    lr = torch.tensor(list(lrs), dtype=torch.float64)[:, None]
    own, common = 1 - 2 * lr * h + 2 * (lr * h) ** 2, lr**2
    squares, found = x.square().expand(len(lrs), -1), []
    for step in range(steps + 1):
        if step % every == 0:
            found.append(squares @ weights)
        squares = own * squares + common * (squares @ h.square())[:, None]
    return torch.stack(found, dim=1)


def crossing(losses: Sequence[float], every: int, target: float) -> float | None:
    """The steps at which ``losses`` first reach ``target``, between records by the logarithm; None if they do not."""
    for k, loss in enumerate(losses):
        if loss <= target:
            if k == 0:
                return 0.0
            before = losses[k - 1]
            part = math.log(before / target) / math.log(before / loss) if math.isfinite(before) else 1.0
            return (k - 1 + part) * every
    return None
