"""The states of a method: fp32 storage by name, and the norms of those that need one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoengine.directions import State


class States:
    """Named states, each a list of tensors whose layout is the transform's business (see ``Transform.new_state``).

    Attributes:
        tensors: fp32 storage by name.
        squares: sum of squares by name, float64 of shape (1,) on the device, of states that were folded with a norm.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, list[Tensor]] = {}
        self.squares: dict[str, Tensor] = {}

    def coefficient(self, term: State) -> float | Tensor:
        """What the state is multiplied by: a number, or a float64 tensor of shape (1,) on the device for ``unit``."""
        if not term.unit:
            return term.coeff
        square = self.squares.get(term.name)
        if square is None:
            return 0.0
        return torch.where(square > 0, term.coeff / square.sqrt(), 0.0)

    def coefficients(self, terms: Sequence[State]) -> Tensor | list[float]:
        """The coefficients of several states, as :func:`zoengine.ops.add_noise_` takes them."""
        found = [self.coefficient(term) for term in terms]
        device = next((c.device for c in found if isinstance(c, Tensor)), None)
        if device is None:
            return found
        return torch.cat([c if isinstance(c, Tensor) else _filled(c, device) for c in found])


def _filled(value: float, device: torch.device) -> Tensor:
    return torch.full((1,), value, dtype=torch.float64, device=device)
