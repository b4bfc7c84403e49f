"""Multiple choice with a causal language model: each example has candidates of its own, of which some are right.

Training learns the first right candidate, token by token; the answer is the candidate whose tokens have the largest
mean log-probability (Malladi et al. 2023, MeZO, https://arxiv.org/abs/2305.17333).
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from zoengine.tasks.base import Batch, Encoded, Task, moved
from zoengine.tasks.cached import SharedPrompts
from zoengine.tasks.decoder import Decoder, count
from zoengine.tasks.instance import Instance, TaskError
from zoengine.tasks.options import encoded_options, every_option, scored, sequence, size, table
from zoengine.tasks.sequences import Sequences


class MultipleChoice(Task):
    """Choose among an instance's options after its prompt.

    tokenizer: any Hugging Face tokenizer. max_length: tokens the model reads at most, see :class:`Sequences`.

    The loss is the cross-entropy of tokens, so a batch's mean is over the tokens of its right candidates.
    """

    def __init__(self, tokenizer: Any, *, max_length: int = 2048) -> None:
        self.reader = Sequences(tokenizer, max_length)
        self._decoder = Decoder()
        self._options = SharedPrompts(self._decoder)

    def encode(self, instance: Instance) -> Encoded:
        """{"input_ids": the tokens all options have before them, "endings": what follows, "gold", ...}."""
        if not instance.gold or not all(0 <= k < len(instance.options) for k in instance.gold):
            raise TaskError(f"gold {instance.gold} of {instance.prompt[-60:]!r} is not among {instance.options}")
        return {**encoded_options(self.reader, instance), "gold": instance.gold}

    def collate(self, examples: Sequence[Instance | Encoded]) -> Batch:
        """A batch of B examples, encoded or not, each with its first right option: see :func:`options.scored`."""
        return scored([sequence(item, item["gold"][0]) for item in self.encoded(examples)])

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """(sum of the tokens' cross-entropy, an fp32 scalar; their number)."""
        found = self._decoder.log_probs(model, batch["input_ids"], batch["start"], batch["targets"], batch["places"])
        return -found.sum(), count(batch["places"])

    def tally(self, model: nn.Module, items: Sequence[Encoded]) -> dict[str, float]:
        sums = {"accuracy": 0.0, "loss": 0.0, "tokens": 0.0}
        for row, item in zip(self._means(model, items).tolist(), items, strict=True):
            gold = item["gold"][0]
            length = len(sequence(item, gold).ids) - item["starts"][gold]
            sums["accuracy"] += _best(row) in item["gold"]
            sums["loss"] -= row[gold] * length
            sums["tokens"] += length
        return sums

    def expected(self, item: Encoded) -> tuple[str, ...]:
        return tuple(item["options"][k].strip() for k in item["gold"])

    def predict(self, model: nn.Module, examples: Sequence[Instance | Encoded], batch_size: int = 32) -> list[str]:
        encoded = self.encoded(examples)
        chosen = self.choices(model, encoded, batch_size)
        return [item["options"][k].strip() for item, k in zip(encoded, chosen, strict=True)]

    def scores(self, model: nn.Module, encoded: Sequence[Encoded], batch_size: int = 32) -> list[float]:
        """The metric of each example alone."""
        chosen = self.choices(model, encoded, batch_size)
        return [float(k in item["gold"]) for item, k in zip(encoded, chosen, strict=True)]

    def choices(self, model: nn.Module, encoded: Sequence[Encoded], batch_size: int = 32) -> list[int]:
        """The index of the option that the model gives each example; of equals the first."""

        def best(items: list[Encoded]) -> list[int]:
            return [_best(means) for means in self._means(model, items).tolist()]

        return self.for_each(model, encoded, batch_size, best)

    def size(self, item: Encoded) -> tuple[int, int]:
        return size(item)

    def _means(self, model: nn.Module, encoded: Sequence[Encoded]) -> Tensor:
        return table(model, self._options, moved(model, every_option(encoded)))


def _best(means: list[float]) -> int:
    return means.index(max(means))
