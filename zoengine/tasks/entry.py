"""What is to be known of a task: where its rows live, how one is read, what is measured. Models come in elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from zoengine.tasks.instance import Instance

if TYPE_CHECKING:
    from zoengine.tasks.chat import Exchange

Row = Mapping[str, Any]
Kind = Literal["classification", "choice", "generation", "chat"]


@dataclass(frozen=True)
class Hub:
    """Where a data set is on the Hugging Face Hub, and what its splits are called.

    ``train`` is the pool that training and evaluation examples are drawn from, ``test`` what results are reported on.
    """

    path: str
    config: str | None = None
    train: str = "train"
    test: str = "validation"

    @property
    def source(self) -> str:
        """As :func:`zoengine.data.read` takes it: ``hub:PATH`` or ``hub:PATH:CONFIG``."""
        return ":".join(filter(None, ("hub", self.path, self.config)))


@dataclass(frozen=True)
class Masked:
    """How a classification is put to a masked language model.

    Attributes:
        template: of the texts ``{0}`` and ``{1}``, and ``{mask}``.
        words: one a label, in the labels' order, each one token with its leading space.
        first_limit: tokens that the first text may have; None: no limit of its own.
        max_length: tokens of the whole prompt.
        pair: whether the first text loses its last character and the second starts in lower case.
    """

    template: str
    words: tuple[str, ...]
    first_limit: int | None = None
    max_length: int = 128
    pair: bool = False


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One task.

    Attributes:
        name: as configurations give it.
        kind: classification among labels; choice among the candidates of a row; generation of text; chat,
            what an assistant says.
        columns: that a row must have.
        read: makes an :class:`Instance` of a row, of kind chat an :class:`~zoengine.tasks.chat.Exchange`; raises
            TaskError for a label that is none of the options.
        labels: of a classification, names of its classes in the order of the label's index.
        hub: None for rows that only files hold.
        metric: what is reported first: accuracy, f1, exact_match or token_accuracy.
        masked: None where no masked prompt is known.
        num_train, num_eval, num_test: how many examples its users take; None: all.
        max_new_tokens: of an answer, in a generation or chat.
    """

    name: str
    kind: Kind
    columns: tuple[str, ...]
    read: Callable[[Row], Instance | Exchange]
    labels: tuple[str, ...] = ()
    hub: Hub | None = None
    metric: str = "accuracy"
    masked: Masked | None = None
    num_train: int | None = 1000
    num_eval: int | None = 500
    num_test: int | None = 1000
    max_new_tokens: int = 50
