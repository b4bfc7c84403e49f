"""Classification with a causal language model: which option does the model expect after the prompt?

    "A joy to watch. It was" -> likelihoods of " terrible" and " great" -> cross-entropy over them

The likelihood of an option is the mean of its tokens' log-probabilities, as in prompt-based fine-tuning with
zeroth-order methods by Malladi et al. 2023 (MeZO, https://arxiv.org/abs/2305.17333). Where every option is one token,
it differs from the token's logit by a constant, and a prompt costs one sequence whatever the number of its options.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoengine.tasks.base import Batch, Encoded, pad
from zoengine.tasks.cached import SharedPrompts
from zoengine.tasks.decoder import Decoder
from zoengine.tasks.instance import Instance
from zoengine.tasks.labelled import LabelledTexts, label
from zoengine.tasks.options import encoded_options, every_option, size, table
from zoengine.tasks.sequences import Sequences

_OF_EXAMPLES = ("labels", "counts", "beginning")  # of a batch of every option; all else is of sequences


class OptionLikelihood(LabelledTexts):
    """Classify an instance's prompt by the most likely of its options.

    tokenizer: any Hugging Face tokenizer. max_length: tokens the model reads at most, see :class:`Sequences`.
    """

    def __init__(self, tokenizer: Any, *, max_length: int = 2048) -> None:
        self.reader = Sequences(tokenizer, max_length)
        self._decoder = Decoder()
        self._options = SharedPrompts(self._decoder)

    def encode(self, instance: Instance) -> Encoded:
        """{"input_ids": the tokens all options have before them, "endings": what follows, an option each, ...}."""
        right = label(instance, instance.options, "option")
        return {**encoded_options(self.reader, instance), "labels": right}

    def collate(self, examples: Sequence[Instance | Encoded]) -> Batch:
        """A batch of B examples, encoded or not, padded on the right.

        Returns int64 tensors. Where the options are single tokens, the same after every prompt: input_ids (B, L),
        last (B,), the position of each prompt's last token, options (B, O), the options' tokens, labels (B,), and
        on the host places, the sets of these positions. Otherwise as :func:`every_option`, and labels.
        """
        encoded = self.encoded(examples)
        labels = torch.tensor([item["labels"] for item in encoded])
        if _one_token_each(encoded):
            ids = [item["input_ids"] for item in encoded]
            return {
                "input_ids": pad(ids, 0),  # any valid id serves as padding
                "last": torch.tensor([len(row) - 1 for row in ids]),
                "places": [frozenset({len(row) - 1}) for row in ids],
                "options": torch.tensor([[token for (token,) in encoded[0]["endings"]]] * len(ids)),
                "labels": labels,
            }
        return {**every_option(encoded), "labels": labels}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """fp32 (B, O): the options' logits or, where they have several tokens, mean log-probabilities."""
        if "last" in batch:
            return self._decoder.label_logits(
                model, batch["input_ids"], batch["last"], batch["options"][0], batch["places"]
            )
        return table(model, self._options, batch)

    def names(self, item: Encoded) -> Sequence[str]:
        return [option.strip() for option in item["options"]]

    def size(self, item: Encoded) -> tuple[int, int]:
        return size(item)

    def split(self, batch: Batch) -> tuple[Batch, Batch] | None:
        if "last" in batch:
            return super().split(batch)
        middle = len(batch["labels"]) // 2
        if middle == 0:
            return None
        rows = sum(batch["counts"][:middle])
        ends = {k: middle if k in _OF_EXAMPLES else rows for k in batch}
        first, second = {k: v[: ends[k]] for k, v in batch.items()}, {k: v[ends[k] :] for k, v in batch.items()}
        return first, {**second, "example": second["example"] - middle}


def _one_token_each(encoded: Sequence[Encoded]) -> bool:
    """Whether all options are single tokens after their prompts, and the same for every example."""
    endings = encoded[0]["endings"]
    return all(len(ending) == 1 for ending in endings) and all(item["endings"] == endings for item in encoded)
