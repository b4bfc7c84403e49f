"""Prompt classification with a causal language model: which label word does the model expect after the prompt?

    "A joy to watch. It was" -> logits of " terrible" and " great" at the last position -> cross-entropy over them

With single-token label words this is both the autoregressive and the masked-LM form of prompt-based fine-tuning used by
Malladi et al. 2023 (MeZO, https://arxiv.org/abs/2305.17333). It computes no logit it does not need (label_logits.py).
"""

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from zoengine.data import Example
from zoengine.tasks.label_logits import LabelLogits
from zoengine.tasks.labelled import Encoded, LabelledTexts, TaskError

_log = logging.getLogger(__name__)


class PromptClassification(LabelledTexts):
    """Classify a text by the label word that follows `template` filled with it.

    tokenizer: any Hugging Face tokenizer. template: has one `{text}`; outer white space of the prompt is removed, so a
    space before a label word belongs to the word. label_words: one a label, in the labels' order; each must add
    exactly one token to a prompt, else TaskError. max_length: longer prompts lose tokens on the left (a leading BOS
    stays); `truncated` counts them.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: str = "{text} It was",
        label_words: Sequence[str] = (" terrible", " great"),
        max_length: int = 2048,
    ) -> None:
        if template.count("{text}") != 1:
            raise TaskError(f"template {template!r} must contain {{text}} exactly once")
        if max_length < 2:
            raise TaskError(f"max_length is {max_length}; a prompt needs at least 2 tokens")
        self.tokenizer = tokenizer
        self.template = template
        self.label_words = tuple(label_words)
        self.label_names = tuple(word.strip() for word in label_words)
        self.max_length = max_length
        self.truncated = 0
        self.label_ids = self._label_ids()
        self._label_logits = LabelLogits(self.label_ids)

    def encode(self, example: Example) -> Encoded:
        """Token ids of the example's prompt, special tokens as the tokenizer adds them, and its label."""
        if not 0 <= example.label < len(self.label_words):
            raise TaskError(f"label {example.label} of {example.text!r} has no label word among {self.label_words}")
        ids = self._ids(self.template.replace("{text}", example.text).strip())
        if len(ids) > self.max_length:
            if not self.truncated:
                _log.warning(
                    "a prompt of %d tokens is longer than max_length=%d; it and all others like it are cut on the left",
                    len(ids), self.max_length,
                )  # fmt: skip
            self.truncated += 1
            head = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
            ids = head + ids[len(ids) - self.max_length + len(head) :]
        return {"input_ids": ids, "labels": example.label}

    def collate(self, examples: Sequence[Example | Encoded]) -> dict[str, Tensor]:
        """A batch of B examples, encoded or not, padded on the right to the longest, L tokens.

        Returns int64 tensors: input_ids (B, L); last (B,), the position of each prompt's last token; labels (B,).
        There is no attention mask: under causal attention no token sees the padding to its right, and without a mask
        torch's attention takes its fast causal path.
        """
        input_ids, lengths, labels = self._padded(self._encoded(examples), pad=0)  # any valid id serves as padding
        return {"input_ids": input_ids, "last": lengths - 1, "labels": labels}

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """fp32 (B, number of labels): the label words' logits after each prompt, in the model's present weights."""
        return self._label_logits(model, batch["input_ids"], batch["last"])

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, truncation=False, verbose=False)["input_ids"]

    def _label_ids(self) -> tuple[int, ...]:
        """The token each label word adds after a prompt; it may differ from the word's tokens alone."""
        if len(set(self.label_words)) != len(self.label_words) or len(self.label_words) < 2:
            raise TaskError(f"label_words must be at least two different words, not {self.label_words}")
        prompt = self.template.replace("{text}", "A film.").strip()
        before = self._ids(prompt)
        if before[-1] == self.tokenizer.eos_token_id:
            raise TaskError("the tokenizer ends every text with its EOS token, after which no label word can follow")
        ids = []
        for word in self.label_words:
            after = self._ids(prompt + word)
            if after[: len(before)] != before or len(after) != len(before) + 1:
                same = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
                tokens = self.tokenizer.convert_ids_to_tokens(after[same:])
                raise TaskError(
                    f"label word {word!r} adds to the prompt not one token but {tokens}; choose another word "
                    "(mind its leading space)"
                )
            ids.append(after[-1])
        if len(set(ids)) != len(ids):
            raise TaskError(f"label words {self.label_words} share a token, {ids}; choose words the tokenizer knows")
        return tuple(ids)
