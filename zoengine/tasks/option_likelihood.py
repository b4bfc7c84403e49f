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

from zoengine.tasks.base import Batch, Encoded, check_length, pad
from zoengine.tasks.decoder import Decoder
from zoengine.tasks.instance import Instance
from zoengine.tasks.labelled import LabelledTexts, label
from zoengine.tasks.sequences import Scored, Sequences, common


class OptionLikelihood(LabelledTexts):
    """Classify an instance's prompt by the most likely of its options.

    tokenizer: any Hugging Face tokenizer. max_length: tokens the model reads at most, see :class:`Sequences`.
    """

    def __init__(self, tokenizer: Any, *, max_length: int = 2048) -> None:
        self.sequences = Sequences(tokenizer, max_length)
        self._decoder = Decoder()

    @property
    def truncated(self) -> int:
        return self.sequences.truncated

    def encode(self, instance: Instance) -> Encoded:
        """{"input_ids": the tokens all options have before them, "endings": what follows, an option each, ...}."""
        right = label(instance, instance.options, "option")
        found = self.sequences.encode(instance.prompt, instance.options)
        shared = common([ids[:start] for ids, start in found])
        return {
            "input_ids": found[0].ids[:shared],
            "endings": [ids[shared:] for ids, _ in found],
            "starts": [start for _, start in found],
            "labels": right,
            "options": instance.options,
        }

    def collate(self, examples: Sequence[Instance | Encoded]) -> Batch:
        """A batch of B examples, encoded or not, padded on the right.

        Returns int64 tensors. Where the options are single tokens, the same after every prompt: input_ids (B, L),
        last (B,), the position of each prompt's last token, options (B, O), the options' tokens, labels (B,).
        Otherwise as :func:`scored` for R sequences, one an option, and their example (R,) and option (R,).
        """
        encoded = self.encoded(examples)
        labels = torch.tensor([item["labels"] for item in encoded])
        if _one_token_each(encoded):
            ids = [item["input_ids"] for item in encoded]
            return {
                "input_ids": pad(ids, 0),  # any valid id serves as padding
                "last": torch.tensor([len(row) - 1 for row in ids]),
                "options": torch.tensor([[token for (token,) in encoded[0]["endings"]]] * len(ids)),
                "labels": labels,
            }
        rows = [
            Scored(item["input_ids"] + ending, start)
            for item in encoded
            for ending, start in zip(item["endings"], item["starts"], strict=True)
        ]
        counts = [len(item["endings"]) for item in encoded]
        return {
            **scored(rows),
            "example": torch.arange(len(encoded)).repeat_interleave(torch.tensor(counts)),
            "option": torch.cat([torch.arange(count) for count in counts]),
            "labels": labels,
        }

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """fp32 (B, O): the options' logits or, where they have several tokens, mean log-probabilities."""
        check_length(model, batch["input_ids"].shape[1])
        if "last" in batch:
            return self._decoder.label_logits(model, batch["input_ids"], batch["last"], batch["options"][0])
        means = mean_log_probs(self._decoder, model, batch)
        table = means.new_full((len(batch["labels"]), int(batch["option"].max()) + 1), -torch.inf)
        return table.index_put((batch["example"], batch["option"]), means)

    def names(self, item: Encoded) -> Sequence[str]:
        return [option.strip() for option in item["options"]]

    def size(self, item: Encoded) -> tuple[int, int]:
        longest = max(map(len, item["endings"]))
        single = all(len(ending) == 1 for ending in item["endings"])
        return 1 if single else len(item["endings"]), len(item["input_ids"]) + longest - 1

    def split(self, batch: Batch) -> tuple[Batch, Batch] | None:
        if "last" in batch:
            return super().split(batch)
        middle = len(batch["labels"]) // 2
        if middle == 0:
            return None
        rows = int((batch["example"] < middle).sum())
        first = {k: v[: middle if k == "labels" else rows] for k, v in batch.items()}
        second = {k: v[middle if k == "labels" else rows :] for k, v in batch.items()}
        return first, {**second, "example": second["example"] - middle}


def _one_token_each(encoded: Sequence[Encoded]) -> bool:
    """Whether all options are single tokens after their prompts, and the same for every example."""
    endings = encoded[0]["endings"]
    return all(len(ending) == 1 for ending in endings) and all(item["endings"] == endings for item in encoded)


def scored(rows: Sequence[Scored]) -> Batch:
    """int64 tensors for R sequences, padded on the right: input_ids (R, L), each without its last token, which nothing
    follows; start (R,), and targets (R, T), the tokens from there on, padded with -100."""
    return {
        "input_ids": pad([ids[:-1] for ids, _ in rows], 0),
        "start": torch.tensor([start for _, start in rows]),
        "targets": pad([ids[start:] for ids, start in rows], -100),
    }


def mean_log_probs(decoder: Decoder, model: nn.Module, batch: Batch) -> Tensor:
    """fp32 (R,): the mean log-probability of each sequence's targets."""
    found = decoder.log_probs(model, batch["input_ids"], batch["start"], batch["targets"])
    return found.sum(1) / (batch["targets"] != -100).sum(1)
