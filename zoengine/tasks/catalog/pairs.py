"""Pairs of sentences: does the second follow from the first?

Prompts of RTE and CB are those of Malladi et al. 2023 (MeZO, https://arxiv.org/abs/2305.17333) and their reference
code; masked prompts and their words are those of Gao et al. 2021 (LM-BFF, https://arxiv.org/abs/2012.15723), which MeZO
took over. Neither gives SNLI, MNLI and QNLI a prompt for causal language models: SNLI and MNLI have CB's here, and QNLI
one of our own in the manner of RTE's.
"""

from __future__ import annotations

from zoengine.tasks.catalog.build import classification
from zoengine.tasks.catalog.sentences import GLUE
from zoengine.tasks.entry import Hub, Masked

SUPERGLUE = "aps/super_glue"

_INFER = 'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n'
_MASKED = "{0}?{mask}, {1}"
_PAIR = ("premise", "hypothesis")
_THREE = (" Yes", " Maybe", " No")

# Pairs whose annotators found no majority have the label -1: 785 of 550,152 for training.
SNLI = classification(
    "snli", prompt=_INFER, options=("Yes", "Maybe", "No"), columns=_PAIR,
    labels=("entailment", "neutral", "contradiction"), hub=Hub("stanfordnlp/snli"),
    masked=Masked(_MASKED, _THREE, max_length=256, pair=True),
)  # fmt: skip

MNLI = classification(
    "mnli", prompt=_INFER, options=("Yes", "Maybe", "No"), columns=_PAIR,
    labels=("entailment", "neutral", "contradiction"), hub=Hub(GLUE, "mnli", test="validation_matched"),
    masked=Masked(_MASKED, _THREE, first_limit=240, max_length=256, pair=True),
)  # fmt: skip

QNLI = classification(
    "qnli", prompt='{sentence}\nDoes this answer the question "{question}" Yes or No?\n', options=("Yes", "No"),
    columns=("question", "sentence"), labels=("entailment", "not_entailment"), hub=Hub(GLUE, "qnli"),
    masked=Masked(_MASKED, (" Yes", " No"), pair=True),
)  # fmt: skip

RTE = classification(
    "rte", prompt='{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n', options=("Yes", "No"),
    columns=_PAIR, labels=("entailment", "not_entailment"), hub=Hub(SUPERGLUE, "rte"),
    masked=Masked(_MASKED, (" Yes", " No"), first_limit=240, max_length=256, pair=True), num_test=277,
)  # fmt: skip

# Of 250 rows; the order of the labels is not that of SNLI.
CB = classification(
    "cb", prompt=_INFER, options=("Yes", "No", "Maybe"), columns=_PAIR,
    labels=("entailment", "contradiction", "neutral"), hub=Hub(SUPERGLUE, "cb"),
    num_train=150, num_eval=100, num_test=56,
)  # fmt: skip

ENTRIES = (SNLI, MNLI, QNLI, RTE, CB)
