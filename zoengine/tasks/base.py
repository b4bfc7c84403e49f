"""What all tasks have in common: a data set of tokens, a loss that adds up, and batches for an evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from zoengine.tasks.instance import Instance, TaskError

# Tensors, and lists of what the host has to know of a batch without asking the device; each with an entry for every
# sequence, or for every example.
Batch = dict[str, Any]
Encoded = dict[str, Any]
Progress = Callable[[int, int], None]
T = TypeVar("T")

# Tokens of a batch in an evaluation, padding included: its logits and activations stay small beside the weights.
BATCH_TOKENS = 16384


class Reader(Protocol):
    """Turns text into tokens, and counts the examples that were longer than allowed and have been cut."""

    truncated: int


class Task(ABC):
    """Turns instances into batches of tokens, and those into a loss, scores and answers.

    Attributes:
        metric: the name of the score that counts, a key of what ``evaluate`` returns.
        reader: what its examples' texts go through.
        skipped: how many examples were left out, because a cut would have left nothing to learn.
    """

    metric: str = "accuracy"
    reader: Reader
    skipped: int = 0

    @property
    def truncated(self) -> int:
        """How many examples were longer than allowed and have been cut."""
        return self.reader.truncated

    @abstractmethod
    def encode(self, instance: Instance) -> Encoded:
        """Tokens of one example; ``input_ids`` of a dict of plain values, by whose length examples are grouped."""

    @abstractmethod
    def collate(self, examples: Sequence[Instance | Encoded]) -> Batch:
        """A batch of B examples, encoded or not, on the CPU; Python values in it stay on the host."""

    @abstractmethod
    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """(sum of the examples' losses, an fp32 scalar; number of examples): adds up right over unequal batches."""

    @abstractmethod
    def tally(self, model: nn.Module, items: Sequence[Encoded]) -> dict[str, float]:
        """Sums over one batch: of each score, of the "loss", and of "tokens" if the loss is by token."""

    @abstractmethod
    def expected(self, item: Encoded) -> tuple[str, ...]:
        """The answers to an encoded example that are right, as ``predict`` would write them."""

    @abstractmethod
    def predict(self, model: nn.Module, examples: Sequence[Instance | Encoded], batch_size: int = 32) -> list[str]:
        """What the model answers to each example."""

    def averages(self, sums: dict[str, float], n: int) -> dict[str, float]:
        """The scores that the sums of :meth:`tally` over n examples come to."""
        tokens = sums.get("tokens", n)
        return {name: value / (tokens if name == "loss" else n) for name, value in sums.items() if name != "tokens"}

    def evaluate(
        self,
        model: nn.Module,
        examples: Sequence[Instance | Encoded],
        batch_size: int = 32,
        progress: Progress | None = None,
    ) -> dict[str, float]:
        """The scores over `examples`, their mean "loss", and "n", with dropout off.

        batch_size: sequences at most that go through the model at once. progress(done, total) is called after every
        batch, counting examples.
        """
        encoded = self.encoded(examples)
        sums: dict[str, float] = {}
        done = 0
        with measuring(model):
            for chosen in self.batches(encoded, batch_size):
                for name, value in self.tally(model, [encoded[k] for k in chosen]).items():
                    sums[name] = sums.get(name, 0) + value
                done += len(chosen)
                if progress is not None:
                    progress(done, len(encoded))
        return {**self.averages(sums, done), "n": done}

    def asked(self, instance: Instance) -> Any:
        """The prompt of an example, as a reward is given it."""
        return instance.prompt or "\n".join(instance.texts)

    def dataset(self, instances: Sequence[Instance]) -> list[Encoded]:
        """All examples tokenised once: a map-style dataset for a DataLoader or a Trainer, with `collate` beside it."""
        return self.encoded(instances)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss, an fp32 scalar."""
        total, count = self.loss_sum(model, batch)
        return total / count

    def split(self, batch: Batch) -> tuple[Batch, Batch] | None:
        """Two halves of a batch's examples, the first the smaller; None if there is only one example."""
        middle = len(next(iter(batch.values()))) // 2
        if middle == 0:
            return None
        return {k: v[:middle] for k, v in batch.items()}, {k: v[middle:] for k, v in batch.items()}

    def encoded(self, examples: Sequence[Instance | Encoded]) -> list[Encoded]:
        """The examples, those encoded that are not yet."""
        if not examples:
            raise TaskError("a task was given no examples")
        return [item if isinstance(item, dict) else self.encode(item) for item in examples]

    def size(self, item: Encoded) -> tuple[int, int]:
        """(sequences, tokens of the longest) that an encoded example sends through the model."""
        return 1, len(item["input_ids"])

    def batches(self, encoded: Sequence[Encoded], batch_size: int) -> Iterator[list[int]]:
        """Indices of examples of like length, at most `batch_size` sequences and BATCH_TOKENS tokens, or one."""
        sizes = [self.size(item) for item in encoded]
        chosen: list[int] = []
        sequences = 0
        for k in sorted(range(len(sizes)), key=lambda k: sizes[k][1]):
            count, longest = sizes[k]
            together = sequences + count
            if chosen and (together > batch_size or together * longest > BATCH_TOKENS):
                yield chosen
                chosen, together = [], count
            chosen.append(k)
            sequences = together
        yield chosen

    def for_each(
        self,
        model: nn.Module,
        encoded: Sequence[Encoded],
        batch_size: int,
        found: Callable[[list[Encoded]], Sequence[T]],
    ) -> list[T]:
        """What ``found`` gives for each example; it is called with one batch after the other, with dropout off."""
        results: dict[int, T] = {}
        with measuring(model):
            for chosen in self.batches(encoded, batch_size):
                results.update(zip(chosen, found([encoded[k] for k in chosen]), strict=True))
        return [results[k] for k in range(len(encoded))]

    def on_device(self, model: nn.Module, examples: Sequence[Encoded]) -> Batch:
        """The collated examples, on the model's device."""
        return moved(model, self.collate(examples))


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def moved(model: nn.Module, batch: Batch) -> Batch:
    """The batch, its tensors on the model's device."""
    device = next(model.parameters()).device

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # Of pinned memory the host need not wait for the copy.
        return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)

    return {name: move(value) for name, value in batch.items()}


def pad(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """int64 (len(rows), longest), padded on the right."""
    width = max(map(len, rows))
    filled = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.int64)
    return filled.view(len(rows), width)
