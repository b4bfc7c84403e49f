"""Demonstrations before a prompt, spelled out; their draw against its rule."""

import random

import pytest

pytest.importorskip("transformers")

from zoengine.tasks.chat import Exchange
from zoengine.tasks.in_context import with_demonstrations
from zoengine.tasks.instance import Instance, TaskError

SENTIMENT = (" terrible", " great")


def review(text, label):
    return Instance(prompt=f"{text} It was", options=SENTIMENT, gold=(label,), texts=(text,))


REVIEWS = [review("A joy to watch.", 1), review("Two hours of nothing.", 0), review("Dull, dull, dull.", 0)]


def test_prompts_are_the_solved_examples_with_blank_lines_between():
    asked = review("An instant classic.", 1)
    (found,) = with_demonstrations([asked], REVIEWS[:2], shots=2)
    one, two = "A joy to watch. It was great", "Two hours of nothing. It was terrible"
    assert found.prompt in (f"{a}\n\n{b}\n\nAn instant classic. It was" for a, b in ((one, two), (two, one)))
    assert (found.options, found.gold, found.texts) == (asked.options, asked.gold, asked.texts)


@pytest.mark.parametrize(
    ("example", "asked", "expected"),
    [
        (  # the option brings its own newline; the prompt's outer newline is significant, outer spaces are not
            Instance(' It rains.\nDoes this mean that "It is wet" is true? Yes or No?\n', ("Yes", "No"), (0,)),
            Instance(' It snows.\nDoes this mean that "It is hot" is true? Yes or No?\n ', ("Yes", "No"), (1,)),
            'It rains.\nDoes this mean that "It is wet" is true? Yes or No?\nYes\n\n'
            'It snows.\nDoes this mean that "It is hot" is true? Yes or No?\n',
        ),
        (  # a generation's option ends with a newline that the blank line does not add to
            Instance("Question: Who?\nAnswer:", (" Ada\n",), (0,), ("Ada", "Lovelace")),
            Instance("Question: When?\nAnswer:", (" 1843\n",), (0,), ("1843",)),
            "Question: Who?\nAnswer: Ada\n\nQuestion: When?\nAnswer:",
        ),
        (  # of several right options, the first
            Instance("x\n-", (" Ann left", " Bob left", " Bo left"), (1, 2)),
            Instance("y\n-", (" Cy won",), (0,)),
            "x\n- Bob left\n\ny\n-",
        ),
        (
            Instance("Grün war’s, 好。 so", (" naïve 🙂",), (0,)),
            Instance("", (" a", " b"), (0,)),
            "Grün war’s, 好。 so naïve 🙂\n\n",
        ),
    ],
)
def test_prompts_of_every_kind(example, asked, expected):
    assert with_demonstrations([asked], [example], shots=1)[0].prompt == expected


def test_each_instance_has_its_own_draw_which_the_seed_decides():
    pool = [review(f"Film {k}.", k % 2) for k in range(50)]
    asked = [review(f"Book {k}.", 0) for k in range(40)]
    found = [i.prompt for i in with_demonstrations(asked, pool, shots=3)]
    assert found == [i.prompt for i in with_demonstrations(asked, pool, shots=3, seed=0)]
    assert found[:7] == [i.prompt for i in with_demonstrations(asked[:7], pool, shots=3)]
    drawn = [tuple(text.split("\n\n")[:-1]) for text in found]
    assert len(set(drawn)) == len(asked) and all(len(set(three)) == 3 for three in drawn)
    others = [i.prompt for i in with_demonstrations(asked, pool, shots=3, seed=1)]
    assert sum(a == b for a, b in zip(found, others, strict=True)) == 0


def test_the_draw_is_the_published_one():
    """Selection from the front of a shuffle by random(), whose numbers Python promises to keep."""
    pool = [review(f"Film {k}.", 1) for k in range(9)]
    generator, expected = random.Random(5), []
    for _ in range(4):
        left = list(range(9))
        for k in range(3):
            j = k + int(generator.random() * (9 - k))
            left[k], left[j] = left[j], left[k]
        expected.append([f"Film {k}. It was great" for k in left[:3]])
    found = with_demonstrations([review(f"Book {k}.", 0) for k in range(4)], pool, shots=3, seed=5)
    assert [i.prompt.split("\n\n")[:-1] for i in found] == expected


def test_every_example_is_drawn_equally_often():
    pool = [review(f"Film {k}.", 1) for k in range(8)]
    found = with_demonstrations([review("Book.", 0)] * 4000, pool, shots=4, seed=2)
    counts = [[0] * 4 for _ in pool]
    for instance in found:
        for place, text in enumerate(instance.prompt.split("\n\n")[:-1]):
            counts[int(text[5])][place] += 1
    # Each place holds each example with probability 1/8: 500 times of 4000, standard deviation 21.
    assert all(abs(count - 500) < 5 * 21 for row in counts for count in row)


def test_none_demonstrates_itself():
    for seed in range(20):
        for asked, found in zip(REVIEWS, with_demonstrations(REVIEWS, REVIEWS, shots=2, seed=seed), strict=True):
            assert found.prompt.count(asked.texts[0]) == 1 and found.prompt.endswith(asked.prompt)


def test_no_shots_change_nothing():
    assert with_demonstrations(REVIEWS, [], shots=0) == REVIEWS


def test_conversations_take_none():
    talk = [Exchange("Sky?", " Blue.")]
    with pytest.raises(TaskError, match="conversations, which hold their own, take none"):
        with_demonstrations(talk, talk, shots=1)


@pytest.mark.parametrize(
    ("pool", "shots", "message"),
    [
        (REVIEWS, 4, "4 demonstrations are asked for, and the training data has 3 examples"),
        ([*REVIEWS, review("Asked.", 1)], 4, "has 3 examples"),
        (REVIEWS, -1, "shots is -1"),
        ([Instance("A film. It was", SENTIMENT)], 1, "without a right answer .*'A film. It was'"),
    ],
)
def test_bad_pools(pool, shots, message):
    with pytest.raises(TaskError, match=message):
        with_demonstrations([review("Asked.", 1)], pool, shots=shots)
