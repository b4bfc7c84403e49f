"""BoolQ, WSC, WiC, MultiRC, COPA and ReCoRD, of SuperGLUE (Wang et al. 2019, https://arxiv.org/abs/1905.00537).

Prompts are those of the reference code of Malladi et al. 2023 (MeZO, https://arxiv.org/abs/2305.17333); their paper's
table prints some of them a little differently.
"""

from __future__ import annotations

from zoengine.tasks.catalog.build import choice, classification
from zoengine.tasks.catalog.fields import Labels, Row, text, texts
from zoengine.tasks.catalog.pairs import SUPERGLUE
from zoengine.tasks.entry import Hub
from zoengine.tasks.instance import TaskError


def _boolq(row: Row) -> str:
    question = text(row, "question")
    if not question.endswith("?"):
        question += "?"
    return f"{text(row, 'passage')} {question[0].upper()}{question[1:]}\n"


# Not SuperGLUE's copy but the original, whose label is a truth value, as in the reference code.
BOOLQ = classification(
    "boolq", prompt=_boolq, options=("Yes", "No"), columns=("passage", "question"),
    label="answer", values=(True, False), labels=("yes", "no"), hub=Hub("google/boolq"),
)  # fmt: skip


def _wsc(row: Row) -> str:
    pronoun, noun = text(row, "span2_text").lower(), text(row, "span1_text")
    return (
        f"{text(row, 'text')}\n"
        f'In the previous sentence, does the pronoun "{pronoun}" refer to {noun}? Yes or No?\n'
    )  # fmt: skip


# Of 554 rows, too few for 1000 and 500: a fifth evaluates.
WSC = classification(
    "wsc", prompt=_wsc, options=("No", "Yes"), columns=("text", "span1_text", "span2_text"),
    labels=("no", "yes"), hub=Hub(SUPERGLUE, "wsc.fixed"), num_test=104,
    texts=("{text}", "{span2_text} is {span1_text}"),
)  # fmt: skip

WIC = classification(
    "wic",
    prompt='Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n',
    options=("No", "Yes"), columns=("word", "sentence1", "sentence2"), labels=("no", "yes"),
    hub=Hub(SUPERGLUE, "wic"), num_test=638, texts=("{sentence1}", "{sentence2}"),
)  # fmt: skip

# One row an answer: accuracy is over answers, not over questions.
MULTIRC = classification(
    "multirc",
    prompt='{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
    options=("No", "Yes"), columns=("paragraph", "question", "answer"), labels=("no", "yes"),
    hub=Hub(SUPERGLUE, "multirc"), texts=("{paragraph}", "{question} {answer}"),
)  # fmt: skip


def _copa(row: Row) -> str:
    words = {"effect": "so", "cause": "because"}
    question = text(row, "question")
    if question not in words:
        raise TaskError(f"the column 'question' holds {question!r}; expected 'effect' or 'cause'")
    return f"{text(row, 'premise').rstrip().removesuffix('.')} {words[question]}"


def _continued(candidate: str) -> str:
    """A sentence as it goes on after "so" or "because": its first word in lower case, unless that is "I"."""
    first, space, rest = candidate.partition(" ")
    return f" {first if first == 'I' else first.lower()}{space}{rest}"


_copa_label = Labels((0, 1), ("choice1", "choice2"))


def _copa_gold(row: Row) -> tuple[int, ...]:
    label = _copa_label.index(row, "label")
    return () if label is None else (label,)


COPA = choice(
    "copa", prompt=_copa, options=lambda row: (_continued(text(row, "choice1")), _continued(text(row, "choice2"))),
    gold=_copa_gold, columns=("premise", "choice1", "choice2", "question", "label"), hub=Hub(SUPERGLUE, "copa"),
    num_train=300, num_eval=100, num_test=100,
)  # fmt: skip


def _record(row: Row) -> str:
    highlighted = text(row, "passage").replace("@highlight\n", "- ")
    return f"{highlighted}\n-"


def _record_gold(row: Row) -> tuple[int, ...]:
    """Every entity among the answers, in the answers' order: the first is the one trained on. Without any, none."""
    index = {entity: k for k, entity in reversed(list(enumerate(texts(row, "entities"))))}
    return tuple(dict.fromkeys(index[answer] for answer in texts(row, "answers") if answer in index))


RECORD = choice(
    "record", prompt=_record,
    options=lambda row: tuple(
        " " + text(row, "query").replace("@placeholder", entity) for entity in texts(row, "entities")
    ),
    gold=_record_gold, columns=("passage", "query", "entities", "answers"), hub=Hub(SUPERGLUE, "record"),
)  # fmt: skip

ENTRIES = (BOOLQ, WSC, WIC, MULTIRC, COPA, RECORD)
