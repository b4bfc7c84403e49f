"""What people do today, in plain torch: the noise as a temporary, one parameter tensor at a time.

The loop is that of the MeZO repository (Malladi et al. 2023), written anew: all randomness of a step comes from one
seed, and every pass over the weights draws the same numbers again. Theirs adds with ``p.data = p.data + scale * z *
eps``, which makes two more temporaries and a new parameter; here ``add_`` with ``alpha`` does it in one go, so that
the comparison is with the best form of the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def normal_add_(x: Tensor, coeff: float, generator: torch.Generator | None = None) -> Tensor:
    """``x += coeff z`` with ``z`` from ``torch.normal`` in a temporary of ``x``'s shape and dtype; returns ``x``."""
    return x.add_(_normal(x, generator), alpha=coeff)


def perturb(parameters: Iterable[Tensor], seed: int, scale: float) -> None:
    """``p += scale z`` for each parameter in order, ``z`` being what ``torch.manual_seed(seed)`` leads to."""
    generators: dict[torch.device, torch.Generator] = {}
    for p in parameters:
        if p.device not in generators:
            generators[p.device] = torch.Generator(p.device).manual_seed(seed)
        normal_add_(p.data, scale, generators[p.device])


def mezo_step(
    parameters: Iterable[Tensor], closure: Callable[[], Tensor], seed: int, *, lr: float, eps: float
) -> float:
    """One step of MeZO as the tensor-by-tensor loop takes it: four passes over the weights and two forwards.

    Args:
        parameters: what to train, in an order that stays the same from pass to pass.
        closure: the loss in the present weights, a one-element tensor.
        seed: of this step.
        lr, eps: learning rate and perturbation size.

    Returns:
        The projected gradient (L(+) - L(-)) / (2 eps).
    """
    parameters = list(parameters)
    with torch.no_grad():
        perturb(parameters, seed, eps)
        plus = closure()
        perturb(parameters, seed, -2 * eps)
        minus = closure()
        gradient = float(plus - minus) / (2 * eps)
        perturb(parameters, seed, eps)
        perturb(parameters, seed, -lr * gradient)
    return gradient


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.normal(0.0, 1.0, size=tuple(like.shape), generator=generator, dtype=like.dtype, device=like.device)
