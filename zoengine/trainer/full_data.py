"""The loss over the whole training set, for methods that measure it now and then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from zoengine.trainer.task_loss import mean


class FullLoss:
    """Callable without arguments: the mean loss over ``dataset`` at whatever the weights are, a one-element tensor.

    Args:
        dataset: the rows, taken in their order.
        batch_size: rows a forward pass takes; the last one takes what is left.
        collate: rows to a batch.
        loss_sum: batch to (sum of its items' losses, number of items), as a task has it.

    Attributes:
        forwards: forward passes of one call.
    """

    def __init__(
        self,
        dataset: Sequence[Any],
        batch_size: int,
        collate: Callable[[list[Any]], dict[str, Any]],
        loss_sum: Callable[[dict[str, Any]], tuple[Tensor, Tensor | int]],
    ) -> None:
        self._dataset, self._collate, self._loss_sum = dataset, collate, loss_sum
        self._starts = range(0, len(dataset), batch_size)
        self.forwards = len(self._starts)

    def __call__(self) -> Tensor:
        return mean([self._loss_sum(self._collate(self._rows(start))) for start in self._starts])

    def _rows(self, start: int) -> list[Any]:
        stop = min(start + self._starts.step, len(self._dataset))
        return [self._dataset[k] for k in range(start, stop)]
