"""Texts, or pairs of texts, as a tokenizer with special tokens gives them to a model that reads both directions."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from zoengine.tasks.base import Batch, Encoded, pad
from zoengine.tasks.instance import Instance, TaskError
from zoengine.tasks.sequences import check_length

_log = logging.getLogger(__name__)


class Texts:
    """Encodes an instance's ``texts``, one or two, and runs models on them.

    tokenizer: any Hugging Face tokenizer; its pad token, or else its EOS token, fills a batch. max_length: longer
    texts are cut on the right, of a pair the longer one first, and special tokens stay; `truncated` counts them. Never
    more than the tokenizer's own `model_max_length`.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        if max_length < 3:
            raise TaskError(f"max_length is {max_length}; a text with its special tokens needs at least 3 tokens")
        fill = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if fill is None:
            raise TaskError("the tokenizer has neither a pad token nor an EOS token; set tokenizer.pad_token")
        self.tokenizer = tokenizer
        self.max_length = min(max_length, tokenizer.model_max_length)
        self.truncated = 0
        self.fill = fill

    def encode(self, instance: Instance) -> Encoded:
        """{"input_ids", and "token_type_ids" where they tell the texts of a pair apart}."""
        if len(instance.texts) not in (1, 2):
            raise TaskError(f"an example has {len(instance.texts)} texts; this task reads one or a pair")
        found = self.tokenizer(*instance.texts, truncation=False, verbose=False)
        if len(found["input_ids"]) > self.max_length:
            if not self.truncated:
                _log.warning(
                    "a text of %d tokens is longer than max_length=%d; it and all others like it are cut on the right",
                    len(found["input_ids"]), self.max_length,
                )  # fmt: skip
            self.truncated += 1
            found = self.tokenizer(*instance.texts, truncation=True, max_length=self.max_length)
        types = found.get("token_type_ids", [])
        # An empty text of a tokenizer without special tokens would leave nothing to read.
        return {"input_ids": found["input_ids"] or [self.fill], **({"token_type_ids": types} if any(types) else {})}

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        """int64 (B, L): input_ids, attention_mask and, if an example has them, token_type_ids."""
        ids = [item["input_ids"] for item in encoded]
        batch = {"input_ids": pad(ids, self.fill), "attention_mask": pad([[1] * len(row) for row in ids], 0)}
        if any("token_type_ids" in item for item in encoded):
            types = [item.get("token_type_ids", [0] * len(item["input_ids"])) for item in encoded]
            batch["token_type_ids"] = pad(types, 0)
        return batch


def run(model: nn.Module, batch: Batch) -> Any:
    """The model's own output for a batch of :class:`Texts`, token types only for a model that tells them apart."""
    check_length(model, batch["input_ids"].shape[1])
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "token_type_ids" in batch and getattr(base.config, "type_vocab_size", 0) > 1:
        given["token_type_ids"] = batch["token_type_ids"]
    return model(**given)


def labels(encoded: Sequence[Encoded]) -> torch.Tensor:
    """int64 (B,)"""
    return torch.tensor([item["labels"] for item in encoded])
