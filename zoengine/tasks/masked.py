"""Classification with a masked language model: which label's word does it expect in place of the mask?

    "A joy to watch. It was<mask>." -> logits of " terrible" and " great" at the mask -> cross-entropy over them

Templates and limits are those of LM-BFF (Gao et al. 2021, https://arxiv.org/abs/2012.15723), which MeZO (Malladi et al.
2023, https://arxiv.org/abs/2305.17333) uses for RoBERTa.
"""

import logging
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoengine.tasks.base import Batch, Encoded
from zoengine.tasks.encoder_texts import Texts, labels, run
from zoengine.tasks.entry import Masked
from zoengine.tasks.instance import Instance, TaskError
from zoengine.tasks.labelled import LabelledTexts, label

_log = logging.getLogger(__name__)


class MaskedPrompt(LabelledTexts):
    """Classify a text or a pair by the word that belongs in the mask of a template.

    tokenizer: any Hugging Face tokenizer with a mask token. masked: template, words and limits. max_length: tokens, if
    fewer than `masked` has. A text longer than its limit, or too long for the whole, loses tokens on its right, so
    template and mask stay; `truncated` counts the examples.
    """

    def __init__(self, tokenizer: Any, masked: Masked, *, max_length: int | None = None) -> None:
        if tokenizer.mask_token_id is None:
            raise TaskError("the tokenizer has no mask token; a masked prompt needs a masked language model")
        if masked.template.count("{mask}") != 1:
            raise TaskError(f"template {masked.template!r} must contain {{mask}} exactly once")
        self.tokenizer = tokenizer
        self.masked = masked
        self.reader = Texts(tokenizer, min(masked.max_length, max_length or masked.max_length))
        self.word_ids = [self._word_id(word) for word in masked.words]
        if len(set(self.word_ids)) != len(self.word_ids) or len(self.word_ids) < 2:
            raise TaskError(f"words {masked.words} must be at least two different tokens")
        self.label_names = [word.strip() for word in masked.words]
        self._sparse: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()

    def encode(self, instance: Instance) -> Encoded:
        """Token ids of the filled template, special tokens as the tokenizer adds them, and the label."""
        right = label(instance, self.masked.words, "word")
        ids, cut = self._fitted(self._pieces(instance))
        if cut and not self.reader.truncated:
            _log.warning("a text is longer than its masked prompt has room for; it and all others like it are cut")
        self.reader.truncated += cut
        return {"input_ids": ids, "labels": right}

    def collate(self, examples: Sequence[Instance | Encoded]) -> Batch:
        """A batch of B examples, encoded or not, padded on the right to the longest, L tokens.

        Returns int64 tensors: input_ids and attention_mask (B, L), mask (B,), the masks' positions, labels (B,).
        """
        encoded = self.encoded(examples)
        where = [item["input_ids"].index(self.tokenizer.mask_token_id) for item in encoded]
        return {**self.reader.collate(encoded), "mask": torch.tensor(where), "labels": labels(encoded)}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """fp32 (B, number of words): the words' logits in place of the mask, in the model's present weights.

        The model's own head computes them, for the positions of the masks only.
        """
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if base not in self._sparse:
            self._sparse[base] = self._agrees(model, base, {name: x[:2] for name, x in batch.items()})
        return self._at_masks(model, base, batch) if self._sparse[base] else self._everywhere(model, batch)

    def _at_masks(self, model: nn.Module, base: nn.Module, batch: Batch) -> Tensor:
        """The head sees the hidden states of the masks alone: (B, 1, width) in place of (B, L, width)."""

        def only_masks(module: nn.Module, inputs: Any, output: Any) -> Any:
            rows = torch.arange(len(batch["mask"]), device=batch["mask"].device)
            output["last_hidden_state"] = output["last_hidden_state"][rows, batch["mask"]][:, None]
            return output

        handle = base.base_model.register_forward_hook(only_masks)
        try:
            logits = run(model, batch).logits
        finally:
            handle.remove()
        return self._of_words(logits[:, 0])

    def _everywhere(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = run(model, batch).logits
        return self._of_words(logits[torch.arange(len(logits), device=logits.device), batch["mask"]])

    def _of_words(self, logits: Tensor) -> Tensor:
        """fp32 (B, number of words) of (B, V)."""
        return torch.stack([logits[:, k] for k in self.word_ids], 1).float()  # a list of indices would be copied over

    @torch.no_grad()
    def _agrees(self, model: nn.Module, base: nn.Module, batch: Batch) -> bool:
        own = self._everywhere(model, batch)
        try:
            sparse = self._at_masks(model, base, batch)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError):
            sparse = torch.full_like(own, torch.nan)
        tolerance = 1e-4 if next(base.parameters()).dtype in (torch.float32, torch.float64) else 2.0**-6
        if not (own - sparse).abs().max() <= tolerance * own.abs().max().clamp(min=1.0):
            _log.warning("%s: computing the logits of all positions, not of the masks alone", type(base).__name__)
            return False
        return True

    def _pieces(self, instance: Instance) -> list[str]:
        count = 2 if "{1}" in self.masked.template else 1
        if len(instance.texts) < count:
            raise TaskError(f"template {self.masked.template!r} needs {count} texts, an example has {instance.texts}")
        texts = [text.replace(self.tokenizer.mask_token, " ") for text in instance.texts[:count]]
        if self.masked.pair:
            texts = [texts[0][:-1], texts[1][:1].lower() + texts[1][1:]]
        return texts

    def _fitted(self, texts: list[str]) -> tuple[list[int], bool]:
        """Token ids of the template with `texts`, as much of them as fits; and whether that is less than all."""
        given = list(texts)
        if self.masked.first_limit is not None:
            texts[0] = self._shortened(texts[0], self.masked.first_limit)
        shortened = 0
        while True:
            ids = self._ids(self.masked.template.format(*texts, mask=self.tokenizer.mask_token))
            excess = len(ids) - self.reader.max_length
            if excess <= 0:
                return ids, texts != given
            lengths = [len(self._ids(text, special=False)) for text in texts]
            longest = lengths.index(max(lengths))
            if lengths[longest] == 0:
                raise TaskError(f"max_length={self.reader.max_length} has no room for {self.masked.template!r}")
            # What is left of a text may need a token more than was counted: each round takes one more.
            texts[longest] = self._shortened(texts[longest], max(0, lengths[longest] - excess - shortened))
            shortened += 1

    def _shortened(self, text: str, tokens: int) -> str:
        ids = self._ids(text, special=False)
        if len(ids) <= tokens:
            return text
        # A cut within a character leaves a replacement character at the end.
        return self.tokenizer.decode(ids[:tokens], clean_up_tokenization_spaces=False).rstrip("\ufffd")

    def _word_id(self, word: str) -> int:
        ids = self._ids(word, special=False)
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            tokens = self.tokenizer.convert_ids_to_tokens(ids)
            raise TaskError(f"word {word!r} is not one token but {tokens}; choose another (mind its leading space)")
        return ids[0]

    def _ids(self, text: str, special: bool = True) -> list[int]:
        return self.tokenizer(text, truncation=False, add_special_tokens=special, verbose=False)["input_ids"]
