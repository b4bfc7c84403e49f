"""What the tasks on labelled texts have in common: their data sets, their loss and their evaluation."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoengine.data import Example
from zoengine.tasks.instance import TaskError

_log = logging.getLogger(__name__)


class Encoded(TypedDict):
    """One tokenised example."""

    input_ids: list[int]
    labels: int


class LabelledTexts(ABC):
    """A task that gives each text one of a few labels, by the largest of their logits.

    Attributes:
        tokenizer: any Hugging Face tokenizer.
        label_names: what to call the labels, in their order.
        max_length: tokens at most.
        truncated: how many texts were longer and have been cut.
    """

    tokenizer: Any
    label_names: tuple[str, ...]
    max_length: int
    truncated: int

    @abstractmethod
    def encode(self, example: Example) -> Encoded:
        """Token ids of the example's text, and its label."""

    @abstractmethod
    def collate(self, examples: Sequence[Example | Encoded]) -> dict[str, Tensor]:
        """A batch of B examples, encoded or not, among it ``labels`` (B,) int64."""

    @abstractmethod
    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """fp32 (B, number of labels) in the model's present weights."""

    def dataset(self, examples: Sequence[Example]) -> list[Encoded]:
        """All examples tokenised once: a map-style dataset for a DataLoader or a Trainer, with `collate` beside it."""
        return [self.encode(example) for example in examples]

    def loss_sum(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """(sum of the examples' losses, an fp32 scalar; number of examples): adds up right over unequal batches."""
        return F.cross_entropy(self.logits(model, batch), batch["labels"], reduction="sum"), len(batch["labels"])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy over the labels, an fp32 scalar."""
        total, count = self.loss_sum(model, batch)
        return total / count

    @torch.inference_mode()
    def evaluate(
        self,
        model: nn.Module,
        examples: Sequence[Example | Encoded],
        batch_size: int = 32,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, float]:
        """{"accuracy", "loss" (mean), "n"} over `examples`, with dropout off and examples of like length together.

        progress(done, total) is called after every batch, counting examples.
        """
        if not examples:
            raise TaskError("evaluate was given no examples")
        encoded = self._encoded(examples)
        encoded.sort(key=lambda item: len(item["input_ids"]))
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        try:
            right, total, done = 0, 0.0, 0
            for start in range(0, len(encoded), batch_size):
                batch = {k: v.to(device) for k, v in self.collate(encoded[start : start + batch_size]).items()}
                logits = self.logits(model, batch)
                right += int((logits.argmax(dim=1) == batch["labels"]).sum())
                total += float(F.cross_entropy(logits, batch["labels"], reduction="sum"))
                done += len(logits)
                if progress is not None:
                    progress(done, len(encoded))
        finally:
            model.train(was_training)
        return {"accuracy": right / done, "loss": total / done, "n": done}

    def _encoded(self, examples: Sequence[Example | Encoded]) -> list[Encoded]:
        return [self.encode(item) if isinstance(item, Example) else item for item in examples]

    def _padded(self, encoded: Sequence[Encoded], pad: int) -> tuple[Tensor, Tensor, Tensor]:
        """input_ids (B, L) padded on the right with `pad`, lengths (B,) and labels (B,), all int64."""
        if not encoded:
            raise TaskError("collate was given no examples")
        lengths = torch.tensor([len(item["input_ids"]) for item in encoded])
        input_ids = torch.full((len(encoded), int(lengths.max())), pad, dtype=torch.int64)
        for row, item in zip(input_ids, encoded, strict=True):
            row[: len(item["input_ids"])] = torch.tensor(item["input_ids"])
        return input_ids, lengths, torch.tensor([item["labels"] for item in encoded])


def cut(task: LabelledTexts, text: str) -> list[int]:
    """Token ids of `text`, with the tokenizer's special tokens, cut on the right to the task's `max_length`."""
    ids = task.tokenizer(text, truncation=False, verbose=False)["input_ids"]
    if len(ids) <= task.max_length:
        return ids
    if not task.truncated:
        _log.warning(
            "a text of %d tokens is longer than max_length=%d; it and all others like it are cut on the right",
            len(ids), task.max_length,
        )  # fmt: skip
    task.truncated += 1
    return task.tokenizer(text, truncation=True, max_length=task.max_length)["input_ids"]
