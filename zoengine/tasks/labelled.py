"""What the tasks have in common that give each example one of a few labels: their loss and their evaluation."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from zoengine.tasks.base import Batch, Encoded, Task
from zoengine.tasks.instance import Instance, TaskError


class LabelledTexts(Task):
    """A task that gives each example one of a few labels, by the largest of their logits.

    label_names: what to call the labels, where all examples have the same.
    """

    label_names: Sequence[str]

    @abstractmethod
    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """fp32 (B, labels) in the model's present weights; -inf where an example has fewer labels."""

    def names(self, item: Encoded) -> Sequence[str]:
        """What to call the labels of an encoded example."""
        return self.label_names

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return F.cross_entropy(self.logits(model, batch), batch["labels"], reduction="sum"), len(batch["labels"])

    def tally(self, model: nn.Module, items: Sequence[Encoded]) -> dict[str, float]:
        batch = self.on_device(model, items)
        logits = self.logits(model, batch)
        right = int((logits.argmax(dim=1) == batch["labels"]).sum())
        return {"accuracy": right, "loss": float(F.cross_entropy(logits, batch["labels"], reduction="sum"))}

    def predict(self, model: nn.Module, examples: Sequence[Instance | Encoded], batch_size: int = 32) -> list[str]:
        encoded = self.encoded(examples)
        return [self.names(item)[k] for item, k in zip(encoded, self.choices(model, encoded, batch_size), strict=True)]

    def expected(self, item: Encoded) -> tuple[str, ...]:
        return (self.names(item)[item["labels"]],)

    def scores(self, model: nn.Module, encoded: Sequence[Encoded], batch_size: int = 32) -> list[float]:
        """The metric of each example alone."""
        chosen = self.choices(model, encoded, batch_size)
        return [float(k == item["labels"]) for item, k in zip(encoded, chosen, strict=True)]

    def choices(self, model: nn.Module, encoded: Sequence[Encoded], batch_size: int = 32) -> list[int]:
        """The index of the label that the model gives each example."""

        def largest(items: list[Encoded]) -> list[int]:
            return self.logits(model, self.on_device(model, items)).argmax(dim=1).tolist()

        return self.for_each(model, encoded, batch_size, largest)


def label(instance: Instance, names: Sequence[Any], what: str) -> int:
    """The gold label of a classification, which must be one of `names`.

    Raises:
        TaskError: there is not exactly one, or it is none of them; `what` says what the names are.
    """
    if len(instance.gold) != 1 or not 0 <= instance.label < len(names):
        shown = (instance.texts or (instance.prompt,))[0]
        given = f"label {instance.gold[0]}" if len(instance.gold) == 1 else f"labels {instance.gold}"
        raise TaskError(f"{given} of {shown!r} has no {what} among {tuple(names)}")
    return instance.label
