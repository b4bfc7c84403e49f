"""Token sequences of a prompt followed by an option, and which of their tokens are the option's."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from zoengine.tasks.instance import TaskError

_log = logging.getLogger(__name__)


class Scored(NamedTuple):
    """A sequence of tokens. Those from ``start`` on belong to the option, and what comes before says how likely."""

    ids: list[int]
    start: int


class Sequences:
    """Encodes prompts with their options for a causal language model.

    A prompt loses its outer spaces (newlines stay), so that a space before an option belongs to the option. The
    option's tokens are those of prompt and option together after the longest beginning that these share with the
    prompt's own: all of the prompt's, unless the tokenizer merges across the boundary. Where that leaves no token
    before the option, the tokenizer's BOS or EOS token stands there.

    Args:
        tokenizer: any Hugging Face tokenizer.
        max_length: tokens that the model reads at most; the last token of an option is only predicted. Of what is
            longer, tokens on the left go, as many for every option of an example, except a leading BOS. Never more than
            the tokenizer's own ``model_max_length``.

    Attributes:
        truncated: how many examples were too long.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        if max_length < 2:
            raise TaskError(f"max_length is {max_length}; a prompt needs at least 2 tokens")
        self.tokenizer = tokenizer
        self.max_length = min(max_length, tokenizer.model_max_length)
        self.truncated = 0
        ids = self._ids("A film.")
        if ids and ids[-1] == tokenizer.eos_token_id:
            raise TaskError("the tokenizer ends every text with its EOS token, after which no option can follow")

    def encode(self, prompt: str, options: Sequence[str]) -> list[Scored]:
        """One sequence an option.

        Raises:
            TaskError: no option; one that adds no token to the prompt, or too many for ``max_length``.
        """
        if not options:
            raise TaskError(f"an example has no option to follow its prompt {_short(prompt)}")
        prompt = prompt.strip(" ")
        before = self._ids(prompt)
        found = []
        for option in options:
            ids = self._ids(prompt + option)
            start = common([before, ids])
            if start == len(ids):
                raise TaskError(
                    f"option {option!r} tokenises to nothing after the prompt {_short(prompt)}; give it a visible text"
                )
            found.append(Scored(ids, start))
        if min(start for _, start in found) == 0:
            found = [Scored([self._first(), *ids], start + 1) for ids, start in found]
        return self._cut(found, options)

    def prompt(self, text: str) -> list[int]:
        """Tokens of a prompt alone, at least one; cut like any, but not counted as truncated."""
        ids = self._ids(text.strip(" ")) or [self._first()]
        excess = max(0, len(ids) - self.max_length)
        head = int(ids[0] == self.tokenizer.bos_token_id)
        return ids[:head] + ids[head + excess :]

    def _cut(self, found: list[Scored], options: Sequence[str]) -> list[Scored]:
        longest = max(len(ids) for ids, _ in found)
        excess = longest - 1 - self.max_length
        if excess <= 0:
            return found
        head = int(found[0].ids[0] == self.tokenizer.bos_token_id)
        for (ids, start), option in zip(found, options, strict=True):
            if start - excess < max(head, 1):
                raise TaskError(
                    f"option {_short(option)} has {len(ids) - start} tokens, which leaves no room for its prompt in "
                    f"max_length={self.max_length}; raise max_length, or drop the example"
                )
        if not self.truncated:
            _log.warning(
                "a prompt with %d tokens to read is longer than max_length=%d; it and all others like it are cut on "
                "the left", longest - 1, self.max_length,
            )  # fmt: skip
        self.truncated += 1
        return [Scored(ids[:head] + ids[head + excess :], start - excess) for ids, start in found]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, truncation=False, verbose=False)["input_ids"]

    def _first(self) -> int:
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise TaskError("a prompt is empty and the tokenizer has neither a BOS nor an EOS token to begin with")


def common(sequences: Sequence[Sequence[Any]]) -> int:
    """How many tokens, or characters, all sequences have in common at their beginning."""
    first, last = min(sequences), max(sequences)  # in the order of words: what these two begin with, all between do
    shortest = min(len(first), len(last))
    return next((k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), shortest)


def positions(model: nn.Module) -> int | None:
    """How many tokens the model can read at most, a PEFT prefix deducted; None if it does not say."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return None
    if getattr(config, "model_type", "") in _COUNT_FROM_PADDING:
        limit -= (config.pad_token_id or 0) + 1
    peft = getattr(model, "active_peft_config", None)
    return limit - (peft.num_virtual_tokens if getattr(peft, "is_prompt_learning", False) else 0)


# Their first token has the position after that of padding, pad_token_id, in a table of max_position_embeddings rows.
_COUNT_FROM_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "longformer")


def check_length(model: nn.Module, width: int) -> None:
    """Raises TaskError if the model has no positions for sequences of `width` tokens."""
    limit = positions(model)
    if limit is not None and width > limit:
        raise TaskError(
            f"a batch has sequences of {width} tokens and {type(model).__name__} reads {limit} at most; "
            f"set task.max_length to {limit} or less"
        )


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:25]}...{text[-25:]}")
