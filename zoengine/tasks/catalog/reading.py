"""SQuAD and DROP: a question about a passage, answered by generation.

Prompts are those of the reference code of Malladi et al. 2023 (MeZO, https://arxiv.org/abs/2305.17333).
"""

from __future__ import annotations

from zoengine.tasks.catalog.build import generation
from zoengine.tasks.catalog.fields import Row, text, texts
from zoengine.tasks.entry import Hub


def _squad(row: Row) -> str:
    question = text(row, "question").strip()
    return f"Title: {text(row, 'title')}\nContext: {text(row, 'context')}\nQuestion: {question}\nAnswer:"


# Version 1.1, where every question has an answer.
SQUAD = generation(
    "squad", prompt=_squad, answers=lambda row: texts(row, "answers", "text"),
    columns=("title", "context", "question", "answers"), hub=Hub("rajpurkar/squad"),
)  # fmt: skip


def _drop(row: Row) -> str:
    return f"Passage: {text(row, 'passage')}\nQuestion: {text(row, 'question').strip()}\nAnswer:"


# Each span counts as an answer of its own, also where the question asks for several together.
DROP = generation(
    "drop", prompt=_drop, answers=lambda row: texts(row, "answers_spans", "spans"),
    columns=("passage", "question", "answers_spans"), hub=Hub("ucinlp/drop"),
)  # fmt: skip

ENTRIES = (SQUAD, DROP)
