"""Classification without a head: which label's description is the text's embedding nearest to?

    "A joy to watch." -> cosine with "A terrible film." and with "A great film." -> cross-entropy over scale * cosines

What a prompt is to a language model, descriptions are to an encoder of sentences: it is right more often than not
before any training, which is where zeroth-order methods do well. The embedding is the mean of the last hidden states.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoengine.data import Example
from zoengine.tasks.labelled import Encoded, LabelledTexts, TaskError, cut


class LabelSimilarity(LabelledTexts):
    """Classify a text by the description, of one for each label, to which a model finds it most similar.

    tokenizer: any Hugging Face tokenizer. descriptions: one a label, in the labels' order; they go through the model
    with every batch, so training moves them too. scale: of the cosines, to make them logits. max_length: longer texts
    are cut on the right, special tokens stay; `truncated` counts them. Never more than the tokenizer's own
    `model_max_length`. The model is one without a head, as `zoengine.models.load(..., head="none")` gives it.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        descriptions: Sequence[str] = ("A terrible film.", "A great film."),
        scale: float = 20.0,
        max_length: int = 128,
    ) -> None:
        if len(set(descriptions)) != len(descriptions) or len(descriptions) < 2:
            raise TaskError(f"descriptions must be at least two different texts, not {tuple(descriptions)}")
        if max_length < 3:
            raise TaskError(f"max_length is {max_length}; a text with its special tokens needs at least 3 tokens")
        self.tokenizer = tokenizer
        self.label_names = tuple(descriptions)
        self.scale = scale
        self.max_length = min(max_length, tokenizer.model_max_length)
        self.truncated = 0
        self._described = [self.encode(Example(text, label)) for label, text in enumerate(descriptions)]

    def encode(self, example: Example) -> Encoded:
        """Token ids of the example's text, special tokens as the tokenizer adds them, and its label."""
        if not 0 <= example.label < len(self.label_names):
            raise TaskError(f"label {example.label} of {example.text!r} has no description among {self.label_names}")
        return {"input_ids": cut(self, example.text), "labels": example.label}

    def collate(self, examples: Sequence[Example | Encoded]) -> dict[str, Tensor]:
        """A batch of B examples, encoded or not, with the C descriptions below them, padded to the longest, L tokens.

        Returns int64 tensors: input_ids and attention_mask (B + C, L), labels (B,).
        """
        if not examples:
            raise TaskError("collate was given no examples")
        pad = self.tokenizer.pad_token_id or 0  # masked, so any valid id will do
        input_ids, lengths, labels = self._padded([*self._encoded(examples), *self._described], pad)
        mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels[: len(examples)]}

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """fp32 (B, C): scale times the cosines, in the model's present weights."""
        hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(2).float()
        embedded = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
        texts = len(batch["labels"])
        return self.scale * embedded[:texts] @ embedded[texts:].T
