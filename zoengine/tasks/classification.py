"""Classification by a head on top of the model: the text alone goes in, one logit for each class comes out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoengine.data import Example
from zoengine.tasks.labelled import Encoded, LabelledTexts, TaskError, cut


class Classification(LabelledTexts):
    """Classify a text by a sequence-classification model, as `zoengine.models.load(..., head=n)` gives it.

    tokenizer: any Hugging Face tokenizer; its pad token, or else its EOS token, fills a batch. options: the names of
    the classes, in the labels' order. max_length: longer texts are cut on the right, special tokens stay; `truncated`
    counts them. Never more than the tokenizer's own `model_max_length`.

    The logits are the model's own, taken to fp32: a head in bf16 has rounded them before, more coarsely than the
    differences of loss that zeroth-order methods live on; prefer fp32 weights.
    """

    def __init__(self, tokenizer: Any, *, options: Sequence[str] = ("0", "1"), max_length: int = 128) -> None:
        if len(set(options)) != len(options) or len(options) < 2:
            raise TaskError(f"options must be at least two different names, not {tuple(options)}")
        if max_length < 3:
            raise TaskError(f"max_length is {max_length}; a text with its special tokens needs at least 3 tokens")
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if pad is None:
            raise TaskError("the tokenizer has neither a pad token nor an EOS token; set tokenizer.pad_token")
        self.tokenizer = tokenizer
        self.label_names = tuple(options)
        self.max_length = min(max_length, tokenizer.model_max_length)
        self.truncated = 0
        self._pad = pad

    def encode(self, example: Example) -> Encoded:
        """Token ids of the example's text, special tokens as the tokenizer adds them, and its label."""
        if not 0 <= example.label < len(self.label_names):
            raise TaskError(f"label {example.label} of {example.text!r} is none of the classes {self.label_names}")
        return {"input_ids": cut(self, example.text), "labels": example.label}

    def collate(self, examples: Sequence[Example | Encoded]) -> dict[str, Tensor]:
        """A batch of B examples, encoded or not, padded on the right to the longest, L tokens.

        Returns int64 tensors: input_ids and attention_mask (B, L), labels (B,).
        """
        input_ids, lengths, labels = self._padded(self._encoded(examples), self._pad)
        mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """fp32 (B, number of classes), in the model's present weights."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        if logits.shape != (len(batch["input_ids"]), len(self.label_names)):
            raise TaskError(
                f"{type(model).__name__} gives logits of shape {tuple(logits.shape)}, not one for each of the "
                f"{len(self.label_names)} classes of every text; load it with head={len(self.label_names)}"
            )
        return logits.float()
