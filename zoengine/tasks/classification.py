"""Classification by a head on top of the model: the text alone goes in, one logit for each class comes out."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from zoengine.tasks.base import Batch, Encoded
from zoengine.tasks.encoder_texts import Texts, labels, run
from zoengine.tasks.instance import Instance, TaskError
from zoengine.tasks.labelled import LabelledTexts, label


class Classification(LabelledTexts):
    """Classify a text or a pair by a sequence-classification model, as `zoengine.models.load(..., head=n)` gives it.

    tokenizer, max_length: see :class:`Texts`. options: the names of the classes, in the labels' order.

    The logits are the model's own, taken to fp32: a head in bf16 has rounded them before, more coarsely than the
    differences of loss that zeroth-order methods live on; prefer fp32 weights.
    """

    def __init__(self, tokenizer: Any, *, options: Sequence[str] = ("0", "1"), max_length: int = 128) -> None:
        if len(set(options)) != len(options) or len(options) < 2:
            raise TaskError(f"options must be at least two different names, not {tuple(options)}")
        self.reader = Texts(tokenizer, max_length)
        self.label_names = tuple(options)

    def encode(self, instance: Instance) -> Encoded:
        """Token ids of the example's texts, special tokens as the tokenizer adds them, and its label."""
        return {**self.reader.encode(instance), "labels": label(instance, self.label_names, "class")}

    def collate(self, examples: Sequence[Instance | Encoded]) -> Batch:
        """A batch of B examples, encoded or not, padded on the right to the longest, L tokens.

        Returns int64 tensors: input_ids, attention_mask and for pairs token_type_ids (B, L), labels (B,).
        """
        encoded = self.encoded(examples)
        return {**self.reader.collate(encoded), "labels": labels(encoded)}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """fp32 (B, number of classes), in the model's present weights."""
        logits = run(model, batch).logits
        if logits.shape != (len(batch["input_ids"]), len(self.label_names)):
            raise TaskError(
                f"{type(model).__name__} gives logits of shape {tuple(logits.shape)}, not one for each of the "
                f"{len(self.label_names)} classes of every text; load it with head={len(self.label_names)}"
            )
        return logits.float()
