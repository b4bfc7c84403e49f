"""Preconditioners of a step in the coordinates (dB, dA) of a LoRA pair."""

from __future__ import annotations

import torch
from torch import Tensor

from zoengine.rozo.manifold import FLOOR


def adam_(direction: Tensor, gradient: Tensor, second: Tensor, t: int, beta2: float, adam_eps: float) -> Tensor:
    """second <- beta2 second + (1 - beta2) gradient^2; returns direction / (sqrt(second / (1 - beta2^t)) + adam_eps).

    Args:
        direction: what the step goes along, the gradient estimate or a momentum; any shape.
        gradient: this step's estimate in the same coordinates.
        second: the average, changed in place; zeros before the first step.
        t: number of this step, from 1.

    The RoZO paper averages "squared perturbations (dA, dB)". Taken literally those are squares of unit noise, whose
    average is 1 and says nothing; averaged here are the squares of the estimate c (dA, dB). Elementwise squares depend
    on the basis, so the caller keeps the basis continuous, as :meth:`zoengine.rozo.Point.retract` does.
    """
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    return direction / (second.div(1 - beta2**t).sqrt_().add_(adam_eps))


def scaled(B: Tensor, A: Tensor, dB: Tensor, dA: Tensor) -> tuple[Tensor, Tensor]:
    """(dB (A A')^-1, (B'B)^-1 dA): for gradients with respect to the factors, a step of Y that no gauge changes.

    With the gradients dB = G A', dA = B' G of a function of Y this moves Y by G V V' + U U' G, whatever factors of Y
    are used. The opposite pairing is not invariant. (Tong, Ma and Chi 2021, "Accelerating ill-conditioned low-rank
    matrix estimation via scaled gradient descent".) Eigenvalues below FLOOR times the largest count as that.
    """
    return dB @ _floored_inverse(A @ A.mT), _floored_inverse(B.mT @ B) @ dA


def _floored_inverse(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    floored = torch.maximum(values, FLOOR * values[..., -1:])
    return (vectors / floored.unsqueeze(-2)) @ vectors.mT
