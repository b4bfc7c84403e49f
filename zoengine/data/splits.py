"""Which rows are trained on, which evaluate during training and which are reported on.

Every draw is a permutation of numpy's legacy generator, written out here: the 32-bit Mersenne twister of Matsumoto and
Nishimura 1998 (https://doi.org/10.1145/272991.272995), seeded with one integer, and the shuffle from the last element
down, each partner drawn by masking bits and rejecting. So the draws never change with a version of Python or numpy, and
``official=True`` picks the very rows that the reference code of Malladi et al. 2023
(https://arxiv.org/abs/2305.17333) picks, if the data set's rows stand in the same order.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Generic, TypeVar

from zoengine.data.table import DataError

Row = TypeVar("Row")
_log = logging.getLogger(__name__)

# The few-shot data of Gao et al. 2021 (https://arxiv.org/abs/2012.15723) has one test set for all training seeds.
FEW_SHOT_TEST_SEED = 42


@dataclass(frozen=True)
class Splits(Generic[Row]):
    """Three lists without a row in common, unless the sources had one in common."""

    train: list[Row]
    eval: list[Row]
    test: list[Row]


def permutation(n: int, seed: int) -> list[int]:
    """0 .. n-1 in the order of ``numpy.random.RandomState(seed).permutation(n)``; 0 <= seed < 2**32.

    Raises:
        DataError: the seed is outside that range.
    """
    if not 0 <= seed < 2**32:
        raise DataError(f"a split seed is a number from 0 to 4294967295, not {seed}")
    words = [seed]
    for k in range(1, 624):
        words.append((1812433253 * (words[-1] ^ (words[-1] >> 30)) + k) & 0xFFFFFFFF)
    twister = random.Random()
    twister.setstate((3, (*words, 624), None))
    order = list(range(n))
    for k in range(n - 1, 0, -1):
        mask = (1 << k.bit_length()) - 1
        # 32 bits are drawn and the low ones kept: the high ones, which getrandbits(bits) would give, differ.
        while (partner := twister.getrandbits(32) & mask) > k:
            pass
        order[k], order[partner] = order[partner], order[k]
    return order


def draw(rows: Sequence[Row], count: int | None, seed: int) -> list[Row]:
    """The first ``count`` rows of a seeded permutation; all rows, in their own order, where None or fewer are there."""
    if count is None or count >= len(rows):
        return list(rows)
    return _permuted(rows, seed)[:count]


def divide(
    pool: Sequence[Row], *, seed: int, num_train: int | None, num_eval: int | None, official: bool = False
) -> tuple[list[Row], list[Row]]:
    """(training rows, evaluation rows) of one pool, by one permutation.

    The first ``num_train`` + ``num_eval`` rows of the permutation are used and the last ``num_eval`` of them evaluate.
    Where the pool has fewer, or ``num_train`` is None, a fifth of the pool evaluates, at most ``num_eval``, and the
    rest is trained on. ``official=True`` leaves ``num_eval`` as it is, as the reference code does: of the 554 rows of
    WSC, 1000 + 500 asked, it trains on 54.

    Raises:
        DataError: one of the two would be empty.
    """
    wanted = None if num_train is None or num_eval is None else num_train + num_eval
    chosen = _permuted(pool, seed)[:wanted]
    n = len(chosen)
    if wanted is not None and (official or n == wanted):
        evaluating = num_eval
    else:
        fifth = max(1, n // 5)
        evaluating = fifth if num_eval is None else min(num_eval, fifth)
        if num_train is not None:
            chosen = chosen[: num_train + evaluating]
            n = len(chosen)
    if evaluating >= n or evaluating < 1:
        raise DataError(
            f"of {len(pool)} rows for training and evaluation, {max(n - evaluating, 0)} would be trained on and "
            f"{min(evaluating, n)} evaluated; give more rows, ask for other numbers, or give evaluation data of its own"
        )
    return chosen[: n - evaluating], chosen[n - evaluating :]


def few_shot(
    pool: Sequence[Row], label: Callable[[Row], Hashable], *, seed: int, k: int, official: bool = False
) -> tuple[list[Row], list[Row]]:
    """(training rows, evaluation rows): of one permutation, the first k of each label and the next k.

    A label with fewer than 2 k rows gives half of them to each, with a warning (512 of each are more than TREC has);
    with ``official=True`` the first k, as far as they go, are trained on, as in Gao et al. 2021.

    Raises:
        DataError: nothing would be left to evaluate on.
    """
    groups: dict[Hashable, list[Row]] = {}
    for row in _permuted(pool, seed):
        groups.setdefault(label(row), []).append(row)
    train: list[Row] = []
    evaluating: list[Row] = []
    for name, group in groups.items():
        first = k if official else min(k, (len(group) + 1) // 2)
        if len(group) < 2 * k:
            _log.warning("label %s has %d rows, fewer than k_shot %d for each of two splits", name, len(group), k)
        train += group[:first]
        evaluating += group[first : first + k]
    if not train or not evaluating:
        raise DataError(f"k_shot {k} leaves {len(train)} rows for training and {len(evaluating)} for evaluation")
    return train, evaluating


def _permuted(rows: Sequence[Row], seed: int) -> list[Row]:
    return [rows[k] for k in permutation(len(rows), seed)]


def split_hash(examples: Sequence[Any]) -> str:
    """16 hexadecimal digits that change with anything in the examples and with their order.

    Takes dataclasses such as :class:`zoengine.tasks.instance.Instance`. Quote them beside a result.
    """
    digest = hashlib.sha256()
    for example in examples:
        line = json.dumps(astuple(example), ensure_ascii=False, separators=(",", ":"))
        digest.update(f"{line}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]
