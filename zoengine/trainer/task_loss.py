"""The loss that a step's closure returns for a task, as a whole and in halves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoengine.evaluation import EvaluationError

Batch = dict[str, Any]


class TaskLoss:
    """Callable without arguments: the mean loss over ``batches`` at whatever the weights are, a one-element tensor.

    Args:
        task: its ``loss_sum(model, batch)`` returns (sum of the items' losses, number of items). If it has it,
            ``split(batch)`` returns two halves of a batch, or None; else every value has one row an item.
        model: what it runs.
        batches: the micro-batches of one step.
    """

    def __init__(self, task: Any, model: nn.Module, batches: Sequence[Batch]) -> None:
        self._task = task
        self._model = model
        self._batches = batches

    def __call__(self) -> Tensor:
        return mean([self._task.loss_sum(self._model, batch) for batch in self._batches])

    @property
    def halves(self) -> tuple[TaskLoss, TaskLoss]:
        """The losses of two halves of the items, for methods that compare them (``tr_mode=halves`` of RoZO).

        An even number of micro-batches is split between them, else each micro-batch is, by items; with an odd number of
        items the halves differ by one, and the mean of their losses from the loss by as much.

        Raises:
            EvaluationError: the items of a batch cannot be told apart, or there is only one.
        """
        count = len(self._batches)
        if count % 2 == 0:
            parts = self._batches[: count // 2], self._batches[count // 2 :]
        else:
            split = getattr(self._task, "split", _rows)
            parts = zip(*(_halves(batch, split) for batch in self._batches), strict=True)
        first, second = (TaskLoss(self._task, self._model, list(part)) for part in parts)
        return first, second


def mean(parts: Sequence[tuple[Tensor, Tensor | int]]) -> Tensor:
    """The mean over all items from (sum, number of items) of each part."""
    return torch.stack([total for total, _ in parts]).sum() / sum(count for _, count in parts)


def _halves(batch: Batch, split: Callable[[Batch], tuple[Batch, Batch] | None]) -> tuple[Batch, Batch]:
    found = split(batch)
    if found is None:
        lengths = ", ".join(f"{name}: {len(value)}" for name, value in batch.items())
        raise EvaluationError(
            f"a batch with {lengths} rows has no halves; accumulate an even number of micro-batches a step, or set "
            "tr_mode to none"
        )
    return found


def _rows(batch: Batch) -> tuple[Batch, Batch] | None:
    rows = {len(value) for value in batch.values()}
    if len(rows) != 1 or min(rows) < 2:
        return None
    middle = rows.pop() // 2
    return {k: v[:middle] for k, v in batch.items()}, {k: v[middle:] for k, v in batch.items()}
