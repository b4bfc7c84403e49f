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

from zoengine.tasks.base import Batch, Encoded
from zoengine.tasks.encoder_texts import Texts, labels, run
from zoengine.tasks.instance import Instance, TaskError
from zoengine.tasks.labelled import LabelledTexts, label


class LabelSimilarity(LabelledTexts):
    """Classify a text or a pair by the description, of one for each label, to which a model finds it most similar.

    tokenizer, max_length: see :class:`Texts`. descriptions: one a label, in the labels' order; they go through the
    model with every batch, so training moves them too. scale: of the cosines, to make them logits. The model is one
    without a head, as `zoengine.models.load(..., head="none")` gives it.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        descriptions: Sequence[str] = ("A terrible film.", "A great film."),
        scale: float = 20.0,
        max_length: int = 128,
    ) -> None:
        self.check(descriptions)
        self.reader = Texts(tokenizer, max_length)
        self.label_names = tuple(descriptions)
        self.scale = scale
        self._described = [self.reader.encode(Instance(texts=(text,))) for text in descriptions]

    @staticmethod
    def check(descriptions: Sequence[str]) -> None:
        """Raises TaskError unless there are at least two descriptions, no two of them alike."""
        if len(set(descriptions)) != len(descriptions) or len(descriptions) < 2:
            raise TaskError(f"descriptions must be at least two different texts, not {tuple(descriptions)}")

    def encode(self, instance: Instance) -> Encoded:
        """Token ids of the example's texts, special tokens as the tokenizer adds them, and its label."""
        return {**self.reader.encode(instance), "labels": label(instance, self.label_names, "description")}

    def collate(self, examples: Sequence[Instance | Encoded]) -> Batch:
        """A batch of B examples, encoded or not, with the C descriptions below them, padded to the longest, L tokens.

        Returns int64 tensors: input_ids and attention_mask (B + C, L), labels (B,).
        """
        encoded = self.encoded(examples)
        return {**self.reader.collate([*encoded, *self._described]), "labels": labels(encoded)}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """fp32 (B, C): scale times the cosines, in the model's present weights."""
        hidden = run(model, batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(2).float()
        embedded = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
        texts = len(batch["labels"])
        return self.scale * embedded[:texts] @ embedded[texts:].T

    def split(self, batch: Batch) -> tuple[Batch, Batch] | None:
        """Two halves of the texts, each with all descriptions."""
        texts = len(batch["labels"])
        if texts < 2:
            return None
        return self._part(batch, slice(texts // 2)), self._part(batch, slice(texts // 2, texts))

    @staticmethod
    def _part(batch: Batch, chosen: slice) -> Batch:
        below = slice(len(batch["labels"]), None)
        return {k: v[chosen] if k == "labels" else torch.cat([v[chosen], v[below]]) for k, v in batch.items()}
