"""Permutations against numpy's, and the rule by which a pool is divided."""

import logging
import random
from collections import Counter

import pytest

from zoengine.data import DataError, divide, draw, few_shot, permutation, split_hash
from zoengine.tasks.instance import Instance


@pytest.mark.parametrize(
    ("n", "seed"), [(0, 0), (1, 0), (2, 1), (10, 42), (33, 13), (554, 0), (4096, 100), (9, 2**32 - 1)]
)
def test_permutation_is_that_of_numpys_legacy_generator(n, seed):
    numpy = pytest.importorskip("numpy")
    assert permutation(n, seed) == numpy.random.RandomState(seed).permutation(n).tolist()


def test_permutation_is_the_published_one():
    """Without numpy: the first numbers of ``numpy.random.seed(0); numpy.random.permutation(10)``."""
    assert permutation(10, 0) == [2, 8, 4, 9, 1, 6, 7, 3, 0, 5]
    state = random.getstate()
    permutation(10, 0)
    assert random.getstate() == state, "the global generator is left alone"


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_outside_the_generator(seed):
    with pytest.raises(DataError, match=f"from 0 to 4294967295, not {seed}"):
        permutation(3, seed)


def test_draw():
    rows = list("abcdefghij")
    assert draw(rows, 3, 0) == ["c", "i", "e"]
    assert draw(rows, None, 0) == draw(rows, 10, 0) == draw(rows, 99, 0) == rows


def test_the_last_rows_evaluate():
    train, evaluating = divide(range(10), seed=0, num_train=4, num_eval=3)
    assert (train, evaluating) == ([2, 8, 4, 9], [1, 6, 7])
    assert (train, evaluating) == divide(range(10), seed=0, num_train=4, num_eval=3, official=True)


@pytest.mark.parametrize(
    ("rows", "num_train", "num_eval", "official", "sizes"),
    [
        (554, 1000, 500, True, (54, 500)),  # WSC as the reference code has it
        (554, 1000, 500, False, (444, 110)),  # a fifth
        (250, 150, 100, False, (150, 100)),  # CB
        (400, 300, 100, False, (300, 100)),  # COPA
        (2490, 1000, 500, False, (1000, 500)),
        (9000, None, 500, False, (8500, 500)),
        (1000, None, 500, False, (800, 200)),
        (1000, None, None, False, (800, 200)),
        (1000, 100, None, False, (100, 200)),
        (1000, 700, 500, False, (700, 200)),  # a fifth, and no more for training than asked
        (3, 1000, 500, False, (2, 1)),
    ],
)
def test_sizes(rows, num_train, num_eval, official, sizes):
    train, evaluating = divide(range(rows), seed=1, num_train=num_train, num_eval=num_eval, official=official)
    assert (len(train), len(evaluating)) == sizes
    assert len({*train, *evaluating}) == sum(sizes)


@pytest.mark.parametrize(
    ("rows", "num_train", "num_eval", "official", "message"),
    [
        (1, 1000, 500, False, "of 1 rows for training and evaluation, 0 would be trained on and 1 evaluated"),
        (400, 1000, 500, True, "of 400 rows .* 0 would be trained on and 400 evaluated"),
        (9, 5, 0, False, "5 would be trained on and 0 evaluated"),
        (9, 0, 5, False, "0 would be trained on and 5 evaluated"),
    ],
)
def test_empty_splits_are_refused(rows, num_train, num_eval, official, message):
    with pytest.raises(DataError, match=message):
        divide(range(rows), seed=1, num_train=num_train, num_eval=num_eval, official=official)


def test_few_shot_takes_k_of_each_label_and_k_more():
    labels = [0] * 7 + [1] * 20 + [2] * 9
    train, evaluating = few_shot(range(36), labels.__getitem__, seed=13, k=3)
    assert Counter(labels[k] for k in train) == Counter(labels[k] for k in evaluating) == {0: 3, 1: 3, 2: 3}
    assert len({*train, *evaluating}) == 18
    order = [k for k in permutation(36, 13) if labels[k] == 1]
    assert [k for k in train if labels[k] == 1] == order[:3]
    assert [k for k in evaluating if labels[k] == 1] == order[3:6]
    assert few_shot(range(36), labels.__getitem__, seed=13, k=3, official=True) == (train, evaluating)


@pytest.mark.parametrize(("official", "counts"), [(False, (4, 3)), (True, (5, 2))])
def test_few_shot_with_too_few_rows_of_a_label(official, counts, caplog):
    labels = [0] * 7 + [1] * 20
    with caplog.at_level(logging.WARNING):
        train, evaluating = few_shot(range(27), labels.__getitem__, seed=0, k=5, official=official)
    assert [sum(labels[k] == 0 for k in part) for part in (train, evaluating)] == list(counts)
    assert [sum(labels[k] == 1 for k in part) for part in (train, evaluating)] == [5, 5]
    assert "label 0 has 7 rows, fewer than k_shot 5 for each" in caplog.text and len(caplog.records) == 1


def test_few_shot_leaves_something_to_evaluate():
    with pytest.raises(DataError, match="k_shot 4 leaves 4 rows for training and 0 for evaluation"):
        few_shot(range(4), lambda row: 0, seed=0, k=4, official=True)


def test_hash_sees_every_field_and_the_order():
    fields = {"prompt": "p", "options": (" a", " b"), "gold": (0,), "answers": ("x",), "texts": ("t",)}
    first, second = Instance(**fields), Instance("q")
    changes = {"prompt": "p ", "options": (" a b",), "gold": (1,), "answers": ("x", "x"), "texts": ("",)}
    others = [[Instance(**{**fields, name: value}), second] for name, value in changes.items()]
    others += [[second, first], [first], [first, second, second]]
    hashes = [split_hash(instances) for instances in [[first, second], *others]]
    assert len(set(hashes)) == len(hashes)
    assert hashes[0] == split_hash((Instance(**fields), second))
    assert split_hash([Instance("\ud800 ü")]) != split_hash([Instance("ü")]), "half a surrogate pair is no error"


def test_hash_is_the_published_one():
    assert split_hash([Instance("a joy It was", (" terrible", " great"), (1,), (), ("a joy",))]) == "95003d0be16bd479"
