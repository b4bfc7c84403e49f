"""Supervised fine-tuning on instruction data: how likely are the completions, token by token?

Only the tokens of completions are trained, and only their positions go through the output embedding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoengine.tasks import chat
from zoengine.tasks.base import Batch, Encoded, Task, pad
from zoengine.tasks.cached import greedy
from zoengine.tasks.chat import IGNORED, Exchange, Message
from zoengine.tasks.decoder import Decoder, Places, count
from zoengine.tasks.instance import TaskError
from zoengine.tasks.sequences import positions

_log = logging.getLogger(__name__)


class Completions(Task):
    """Learns the completions of exchanges (:func:`zoengine.tasks.chat.read` makes one of a row).

    tokenizer: any Hugging Face tokenizer; messages need its chat template. max_length: tokens of prompt and completion
    together; longer ones are cut on the right, as TRL cuts them, and `truncated` counts them. A row whose cut leaves no
    token of a completion teaches nothing and is left out, `skipped` counts it. max_new_tokens: of an answer in
    :meth:`predict`.

    Loss and count are of tokens, so a long completion counts for more than a short one. The metric is the share of
    tokens that are the model's first choice where all before them are given.
    """

    metric = "token_accuracy"
    truncated = 0

    def __init__(self, tokenizer: Any, *, max_length: int = 2048, max_new_tokens: int = 128) -> None:
        if max_length < 2:
            raise TaskError(f"max_length is {max_length}; a prompt and its completion need at least 2 tokens")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_new_tokens = max_new_tokens
        self._decoder = Decoder()

    def encode(self, exchange: Exchange) -> Encoded:
        """{"input_ids": tokens, "labels": the same where they are trained, else -100}, both of one length."""
        ids, labels = chat.tokens(self.tokenizer, exchange)
        if len(ids) > self.max_length:
            if not self.truncated:
                _log.warning(
                    "a row of %d tokens is longer than max_length=%d; it and all others like it are cut on the right",
                    len(ids), self.max_length,
                )  # fmt: skip
            self.truncated += 1
        return {"input_ids": ids[: self.max_length], "labels": labels[: self.max_length]}

    def encoded(self, examples: Sequence[Exchange | Encoded]) -> list[Encoded]:
        """The examples, those encoded that are not yet, without those that the cut has left with nothing to learn."""
        found = super().encoded(examples)
        kept = [item for item in found if any(label != IGNORED for label in item["labels"])]
        if len(kept) < len(found):
            self.skipped += len(found) - len(kept)
            _log.warning(
                "%d of %d rows are left out: their prompts fill max_length=%d",
                len(found) - len(kept), len(found), self.max_length,
            )  # fmt: skip
        if not kept:
            raise TaskError(f"every prompt fills max_length={self.max_length}, so nothing is left to learn; raise it")
        return kept

    def collate(self, examples: Sequence[Exchange | Encoded]) -> Batch:
        """A batch of B examples, encoded or not, padded on the right.

        Returns int64 tensors (B, L): input_ids, each row without its last token, which nothing follows; targets, what
        is to follow each token, -100 where that is not trained. On the host, places: see :mod:`zoengine.tasks.decoder`.
        """
        encoded = self.encoded(examples)
        follow = [item["labels"][1:] for item in encoded]
        return {
            "input_ids": pad([item["input_ids"][:-1] for item in encoded], 0),  # any valid id serves as padding
            "targets": pad(follow, IGNORED),
            "places": [frozenset(k for k, label in enumerate(row) if label != IGNORED) for row in follow],
        }

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """(sum of the trained tokens' cross-entropy, an fp32 scalar; their number)."""
        found = self._decoder.log_probs(model, *_read(batch))
        return -found.sum(), count(batch["places"])

    def tally(self, model: nn.Module, items: Sequence[Encoded]) -> dict[str, float]:
        batch = self.on_device(model, items)
        found, best = self._decoder.log_probs_and_best(model, *_read(batch))
        sums = {"token_accuracy": int(best.sum()), "loss": -float(found.double().sum())}
        return {**sums, "tokens": count(batch["places"])}

    def averages(self, sums: dict[str, float], n: int) -> dict[str, float]:
        """{"token_accuracy", "loss", "perplexity"}, all by token."""
        loss = sums["loss"] / sums["tokens"]
        # The largest float is about e to the 709.
        perplexity = math.exp(loss) if loss < 709 else math.inf
        return {"token_accuracy": sums["token_accuracy"] / sums["tokens"], "loss": loss, "perplexity": perplexity}

    def asked(self, exchange: Exchange) -> str | list[Message]:
        """The prompt: text, or the messages before the first answer, as :meth:`predict` answers them."""
        if isinstance(exchange.prompt, str):
            return exchange.prompt
        answers = (k for k, message in enumerate(exchange.completion) if message["role"] == "assistant")
        return [*exchange.prompt, *exchange.completion[: next(answers)]]

    def expected(self, item: Encoded) -> tuple[str, ...]:
        """The completion; of a conversation, the first answer."""
        begin = _begin(item)
        labels = [*item["labels"][begin:], IGNORED]
        return (self._text(labels[: labels.index(IGNORED)]),)

    def predict(self, model: nn.Module, examples: Sequence[Exchange | Encoded], batch_size: int = 32) -> list[str]:
        """What the model, always by its likeliest token, says after each row's prompt; of a conversation, after what
        comes before the first answer. Without special tokens and outer white space. A prompt that fills max_length is
        answered as the cut has left it."""
        encoded = super().encoded(examples)
        prompts = [{"input_ids": item["input_ids"][: _begin(item)]} for item in encoded]
        longest, room = max(len(prompt["input_ids"]) for prompt in prompts), positions(model)
        new_tokens = self.max_new_tokens if room is None else min(self.max_new_tokens, room - longest)
        if new_tokens < 1:
            raise TaskError(
                f"a prompt of {longest} tokens leaves no room for an answer in the {room} tokens that "
                f"{type(model).__name__} reads; lower task.max_length"
            )
        ends = {self.tokenizer.eos_token_id, *_ends(model)}

        def answers(items: list[Encoded]) -> list[str]:
            found = greedy(model, [item["input_ids"] for item in items], new_tokens, ends.__contains__)
            return [self._text(ids) for ids in found]

        return self.for_each(model, prompts, batch_size, answers)

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def _begin(item: Encoded) -> int:
    """Where the first trained token stands, or would stand."""
    return next((k for k, label in enumerate(item["labels"]) if label != IGNORED), len(item["labels"]))


def _read(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Places]:
    """What the decoder takes for a batch whose targets begin with the second token of every row."""
    return batch["input_ids"], torch.ones_like(batch["targets"][:, 0]), batch["targets"], batch["places"]


def _ends(model: nn.Module) -> Sequence[int]:
    """The tokens with which the model itself ends an answer: a chat model has one for a turn, and one for a text."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [] if found is None else [found] if isinstance(found, int) else found
