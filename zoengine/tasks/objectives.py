"""Objectives that have no gradient: a task's metric, or any function of prompts and completions, as the loss.

Zeroth-order methods ask for losses only, so these train like any other (Malladi et al. 2023, section 3.3,
https://arxiv.org/abs/2305.17333).
"""

import importlib
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoengine.tasks.base import Batch, Encoded, Task
from zoengine.tasks.instance import Instance, TaskError

Reward = Callable[[list[str], list[str]], Sequence[float]]


class Objective(Task):
    """A task whose loss is minus a score of what the model answers to each example.

    Its batches hold only the numbers of the examples, which it keeps as it encodes them.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self._kept: list[Encoded] = []

    @abstractmethod
    def scores(self, model: nn.Module, encoded: Sequence[Encoded], batch_size: int = 32) -> list[float]:
        """One an example, the larger the better."""

    @property
    def truncated(self) -> int:
        return self.task.truncated

    @property
    def skipped(self) -> int:  # type: ignore[override]
        return self.task.skipped

    def encode(self, instance: Instance) -> Encoded:
        self._kept.append({**self.task.encode(instance), "prompt": self.task.asked(instance)})
        return {**self._kept[-1], "item": len(self._kept) - 1}

    def collate(self, examples: Sequence[Instance | Encoded]) -> Batch:
        """{"item": int64 (B,)}, the numbers of the examples."""
        return {"item": torch.tensor([item["item"] for item in self.encoded(examples)])}

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        items = [self._kept[k] for k in batch["item"].tolist()]
        found = self.scores(model, items, len(items))
        return torch.tensor(-math.fsum(found), device=batch["item"].device), len(items)

    def tally(self, model: nn.Module, items: Sequence[Encoded]) -> dict[str, float]:
        return self.task.tally(model, items)

    def averages(self, sums: dict[str, float], n: int) -> dict[str, float]:
        """The task's own scores, with this objective's loss in place of its."""
        found = self.task.averages(sums, n)
        return {**found, "loss": -found[self.metric]}

    def expected(self, item: Encoded) -> tuple[str, ...]:
        return self.task.expected(item)

    def predict(self, model: nn.Module, examples: Sequence[Instance | Encoded], batch_size: int = 32) -> list[str]:
        return self.task.predict(model, self.encoded(examples), batch_size)

    def size(self, item: Encoded) -> tuple[int, int]:
        return self.task.size(item)


class MetricObjective(Objective):
    """Minus the task's metric: the accuracy of its choice, or the F1 or exact match of its greedy generation.

    The task has ``scores(model, encoded, batch_size)``, which gives the metric of each example.
    """

    def __init__(self, task: Task) -> None:
        self.check(type(task))
        super().__init__(task)
        self.metric = task.metric

    @staticmethod
    def check(kind: type[Task]) -> None:
        """Raises TaskError if tasks of this kind have no metric of one example."""
        if not hasattr(kind, "scores"):
            raise TaskError(
                f"objective metric needs a score of each example, and the {kind.metric} of {kind.__name__} is of all "
                "together; take cross-entropy, or a reward as package.module:function"
            )

    def scores(self, model: nn.Module, encoded: Sequence[Encoded], batch_size: int = 32) -> list[float]:
        return self.task.scores(model, encoded, batch_size)


class RewardObjective(Objective):
    """Minus a reward, which gives every pair of a prompt and the model's answer to it a finite number.

    reward: called with the prompts and the completions (the task's answers: what it generates greedily, or the option
    it chooses), two lists of equal length; returns one number for each.
    """

    metric = "reward"

    def __init__(self, task: Task, reward: Reward) -> None:
        super().__init__(task)
        self.reward = reward

    def scores(self, model: nn.Module, encoded: Sequence[Encoded], batch_size: int = 32) -> list[float]:
        """Raises TaskError if the reward does not return one finite number for each completion."""
        prompts = [item["prompt"] for item in encoded]
        completions = self.task.predict(model, encoded, batch_size)
        found = self.reward(list(prompts), list(completions))
        name = getattr(self.reward, "__qualname__", type(self.reward).__name__)
        try:
            scores = [float(score) for score in found]
        except (TypeError, ValueError) as error:
            raise TaskError(f"reward {name} must return a list of numbers, not {found!r} ({error})") from error
        if len(scores) != len(completions):
            raise TaskError(f"reward {name} returned {len(scores)} scores for {len(completions)} completions")
        for prompt, completion, score in zip(prompts, completions, scores, strict=True):
            if not math.isfinite(score):
                raise TaskError(f"reward {name} gave {score} to {completion!r} after {prompt[-60:]!r}")
        return scores

    def tally(self, model: nn.Module, items: Sequence[Encoded]) -> dict[str, float]:
        return {"reward": math.fsum(self.scores(model, items, len(items)))}

    def averages(self, sums: dict[str, float], n: int) -> dict[str, float]:
        """{"reward" (mean), "loss"}."""
        reward = sums["reward"] / n
        return {"reward": reward, "loss": -reward}


def resolve(name: str) -> Reward:
    """The callable that "package.module:function" names.

    Raises:
        TaskError: the name is of another form, cannot be imported, or is not callable.
    """
    module_name, colon, path = name.partition(":")
    if not colon or not module_name or not path:
        raise TaskError(f"objective {name!r} is not of the form package.module:function")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise TaskError(
            f"objective {name!r}: cannot import {module_name} ({error}); install it, or put its folder on PYTHONPATH"
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            known = sorted(item for item in vars(found) if not item.startswith("_") and callable(getattr(found, item)))
            raise TaskError(f"objective {name!r}: {module_name} has no {part}; it has {', '.join(known) or 'nothing'}")
        found = getattr(found, part)
    if not callable(found):
        raise TaskError(f"objective {name!r} is not callable but {type(found).__name__}")
    return found
