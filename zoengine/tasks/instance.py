"""A row of data as a task reads it, whatever the columns it came from."""

from __future__ import annotations

from dataclasses import dataclass


class TaskError(ValueError):
    """A task that does not fit its tokenizer, model or data; the message says what was given and what to do."""


@dataclass(frozen=True)
class Instance:
    """One example: what stands before the scored text, what may follow, and what is right.

    Attributes:
        prompt: the text before the option, as the reference prompts write it. Its outer spaces are not significant;
            newlines are.
        options: what may follow the prompt, each with its leading space or newline. A generation has one, the
            completion to learn.
        gold: indices of the right options; a classification has exactly one, its label.
        answers: of a generation, every accepted answer.
        texts: the raw sentence, or pair of sentences, for models with a head and for masked prompts.
    """

    prompt: str = ""
    options: tuple[str, ...] = ()
    gold: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()

    @property
    def label(self) -> int:
        """The right option of a classification."""
        return self.gold[0]
