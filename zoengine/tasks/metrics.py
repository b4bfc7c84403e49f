"""Scores of a generated answer, as SQuAD defines them (Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250)."""

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalised(text: str) -> str:
    """In lower case, without ASCII punctuation and English articles, words separated by single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(found: str, answers: Sequence[str]) -> float:
    """1 if `found` is one of the answers after normalisation, else 0."""
    return float(any(normalised(found) == normalised(answer) for answer in answers))


def f1(found: str, answers: Sequence[str]) -> float:
    """The harmonic mean of precision and recall over the words that `found` shares with an answer, of the best one.

    Of two texts without words it is 1, of one such text and another 0.
    """
    return max((_f1(normalised(found).split(), normalised(answer).split()) for answer in answers), default=0.0)


def _f1(found: list[str], answer: list[str]) -> float:
    if not found or not answer:
        return float(found == answer)
    shared = (Counter(found) & Counter(answer)).total()
    return 2 * shared / (len(found) + len(answer))
