"""Options by how much likelier the prompt makes them, not by how likely they are: no bias to frequent wordings.

    score(option) = sum log p(option | prompt) - sum log p(option | null prompt)

The null prompt is what is left of the prompt without the example's own text, such as " It was". Sums, not means: a
long option is as unlikely after the one as after the other. Holtzman et al. 2021, https://arxiv.org/abs/2104.08315.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from zoengine.tasks.base import Progress, measuring, moved
from zoengine.tasks.cached import SharedPrompts
from zoengine.tasks.decoder import Decoder
from zoengine.tasks.instance import Instance, TaskError
from zoengine.tasks.multiple_choice import MultipleChoice
from zoengine.tasks.options import encoded_options, every_option


class Calibrated:
    """Measures classification and multiple choice by calibrated scores, without training.

    tokenizer: any Hugging Face tokenizer. max_length: tokens the model reads at most, see :class:`Sequences`.
    """

    metric = "accuracy"
    skipped = 0

    def __init__(self, tokenizer: Any, *, max_length: int = 2048) -> None:
        self._task = MultipleChoice(tokenizer, max_length=max_length)
        self._options = SharedPrompts(Decoder())

    @property
    def truncated(self) -> int:
        """How many prompts were longer than allowed and have been cut."""
        return self._task.truncated

    def evaluate(
        self,
        model: nn.Module,
        instances: Sequence[Instance],
        null_prompts: str | Sequence[str],
        batch_size: int = 32,
        progress: Progress | None = None,
    ) -> dict[str, float]:
        """{"accuracy", "n"}; arguments as in :meth:`scores`."""
        found = self.scores(model, instances, null_prompts, batch_size, progress)
        right = [row.index(max(row)) in i.gold for row, i in zip(found, instances, strict=True)]
        return {"accuracy": sum(right) / len(right), "n": len(right)}

    def scores(
        self,
        model: nn.Module,
        instances: Sequence[Instance],
        null_prompts: str | Sequence[str],
        batch_size: int = 32,
        progress: Progress | None = None,
    ) -> list[list[float]]:
        """The calibrated score of each option of each instance.

        null_prompts: one for all instances or one for each. batch_size, progress: see :meth:`Task.evaluate`.

        Raises:
            TaskError: no instances, or another number of null prompts.
        """
        nulls = [null_prompts] * len(instances) if isinstance(null_prompts, str) else list(null_prompts)
        if not instances or len(nulls) != len(instances):
            raise TaskError(f"{len(instances)} instances are given, and {len(nulls)} null prompts")
        # Examples often share a null prompt and options: each pair is run once.
        pairs = {(prompt, i.options): 0 for prompt, i in zip(nulls, instances, strict=True)}
        both = [*instances, *(Instance(prompt=prompt, options=options) for prompt, options in pairs)]
        encoded = [encoded_options(self._task.reader, instance) for instance in both]
        found: dict[int, list[float]] = {}
        with measuring(model):
            for chosen in self._task.batches(encoded, batch_size):
                sums = self._sums(model, [encoded[k] for k in chosen]).tolist()
                for k in chosen:
                    found[k], sums = sums[: len(both[k].options)], sums[len(both[k].options) :]
                if progress is not None:
                    progress(len(found), len(both))
        of_null = {pair: found[len(instances) + k] for k, pair in enumerate(pairs)}
        return [
            [given - null for given, null in zip(found[k], of_null[nulls[k], i.options], strict=True)]
            for k, i in enumerate(instances)
        ]

    def _sums(self, model: nn.Module, encoded: Sequence[dict[str, Any]]) -> Tensor:
        """fp32 (R,): the log-probability of every option of every example, one after the other."""
        return self._options.log_probs(model, moved(model, every_option(encoded))).sum(1)
