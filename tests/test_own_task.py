"""Tasks on a user's own rows."""

import pytest

from zoengine.data import DataError, Table
from zoengine.tasks.catalog import custom
from zoengine.tasks.instance import Instance, TaskError
from zoengine.tasks.rows import instances


def table(*rows):
    return Table(list(rows), [f"own, row {k}" for k in range(1, len(rows) + 1)], "own")


def test_own_classification():
    entry = custom(kind="classification", prompt="{title}: {body}\nUrgent?", options=["no", "yes"], label="urgent")
    assert entry.columns == ("title", "body", "urgent") and entry.labels == ("no", "yes")
    assert (entry.num_train, entry.num_eval, entry.num_test, entry.metric) == (None, None, None, "accuracy")
    row = {"title": "Fire", "body": "in {hall}", "urgent": 1}
    expected = Instance("Fire: in {hall}\nUrgent?", (" no", " yes"), (1,), (), ("Fire", "in {hall}"))
    assert entry.read(row) == expected
    assert entry.read({**row, "urgent": "Yes"}) == expected
    assert entry.read({**row, "urgent": None}).gold == ()


def test_own_labels_in_the_options_order():
    entry = custom(kind="classification", prompt="{t} It was", options=["bad", "good"], labels=["neg", "pos"],
                   label="y", text_columns=["head"])  # fmt: skip
    found = entry.read({"t": "x", "head": "h", "y": "pos"})
    assert (found.gold, found.texts, entry.labels, entry.columns) == ((1,), ("h",), ("neg", "pos"), ("t", "head", "y"))
    with pytest.raises(TaskError, match="label 'good' in the column 'y' is not one of neg, pos"):
        entry.read({"t": "x", "head": "h", "y": "good"})
    signed = custom(kind="classification", prompt="{t} It was", options=["bad", "good"], labels=[-1, 1])
    assert signed.read({"t": "x", "label": -1}).gold == (0,), "a label that the user gave is a label"


@pytest.mark.parametrize(
    ("prompt", "option", "expected"),
    [
        ("{t} It was", "great", " great"), ("{t} It was ", "great", " great"), ("{t}", "great", " great"),
        ("{t} It was", " great", " great"), ("{t}\n", "great", "great"), ("{t} (", "A", "A"), ("{t}?", "A", " A"),
        ("{t}。总之很", "好", "好"), ("{t} It was", "好", "好"), ("{{{t}", "A", " A"),
    ],
)  # fmt: skip
def test_a_space_between_words_only(prompt, option, expected):
    entry = custom(kind="classification", prompt=prompt, options=[option, "\nother"])
    assert entry.read({"t": "x", "label": 0}).options == (expected, "\nother")


def test_own_choice():
    two = custom(kind="choice", prompt="{q}", options=["a", "b"], label="right", labels=["A", "B"])
    row = {"q": "Which?", "a": "this one", "b": "that", "right": "B"}
    assert two.read(row) == Instance("Which?", (" this one", " that"), (1,))
    assert two.columns == ("q", "a", "b", "right")
    listed = custom(kind="choice", prompt="{q}\n", options=["candidates"])
    row = {"q": "Which?", "candidates": ["x", "y", "z"], "label": 2}
    assert listed.read(row) == Instance("Which?\n", ("x", "y", "z"), (2,))
    assert listed.read({**row, "label": [2, 0]}).gold == (2, 0)
    with pytest.raises(TaskError, match="label 3 in the column 'label' is not one of 0, 1, 2"):
        listed.read({**row, "label": 3})
    lettered = custom(kind="choice", prompt="{q}", options=["candidates"], labels=list("ABCD"))
    with pytest.raises(TaskError, match="label 'D' in the column 'label' is outside the 3 candidates"):
        lettered.read({**row, "label": "D"})
    with pytest.raises(TaskError, match="1 candidate in the column 'candidates'"):
        listed.read({**row, "candidates": ["x"]})


def test_own_generation():
    entry = custom(kind="generation", prompt="Q: {q}\nA:", answers="a", metric="exact_match", max_new_tokens=7)
    assert entry.read({"q": "6*7", "a": ["42", "forty-two"]}) == Instance(
        "Q: 6*7\nA:", (" 42\n",), (0,), ("42", "forty-two")
    )
    assert entry.read({"q": "6*7", "a": 42}).answers == ("42",)
    assert entry.read({"q": "6*7", "a": None}).gold == ()
    assert (entry.columns, entry.metric, entry.max_new_tokens) == (("q", "a"), "exact_match", 7)
    for prompt, completion in (("{q}\n", "42\n"), ("{q} (", "42\n"), ("{q} is", " 42\n"), ("{q}是", "42\n")):
        assert custom(kind="generation", prompt=prompt).read({"q": "x", "answers": "42"}).options == (completion,)
    braces = custom(kind="generation", prompt="{q} {{x}}", answers="a").read({"q": "{answer}", "a": "{answer}"})
    assert (braces.prompt, braces.options) == ("{answer} {x}", (" {answer}\n",))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "classify"}, r"no kind of task 'classify'; did you mean 'classification'\?"),
        ({"metric": "acuracy"}, r"no metric 'acuracy'; did you mean 'accuracy'\?"),
        ({"metric": "f1"}, "the metric 'f1' does not fit a classification, which has accuracy"),
        (
            {"kind": "generation", "metric": "accuracy", "options": ()},
            "not fit a generation, which has f1 or exact_m",
        ),
        ({"kind": "generation"}, "a generation has answers, no options"),
        ({"prompt": "It was"}, "names no column"),
        ({"prompt": "{t"}, "is not a template"),
        ({"prompt": "{t:3}"}, "nothing but the name of a column between braces"),
        ({"prompt": "{}"}, "nothing but the name of a column"),
        ({"options": ["a"]}, "at least two different options"),
        ({"options": ["a", "a"]}, "at least two different options"),
        ({"options": ["a", " "]}, "is empty"),
        ({"labels": [1]}, "1 labels for 2 options"),
        ({"labels": [1, "1"]}, "the label '1' stands for two options"),
        ({"options": ["1", "0"]}, "the label '1' stands for two options; give each its own label"),
        ({"kind": "choice", "options": []}, "a choice needs options"),
        ({"text_columns": ["a", "b", "c"]}, "one or two"),
    ],
)
def test_own_tasks_that_do_not_fit(fields, message):
    with pytest.raises(TaskError, match=message):
        custom(**{"kind": "classification", "prompt": "{t} It was", "options": ["bad", "good"], **fields})


def test_unknown_placeholder_lists_the_columns():
    entry = custom(kind="classification", prompt="{sentense} It was", options=["bad", "good"])
    with pytest.raises(DataError, match="own, row 1: no column 'sentense'; the columns there are 'sentence', 'label'"):
        instances(entry, table({"sentence": "x", "label": 0}))


def test_an_empty_prompt_of_ones_own_is_refused():
    entry = custom(kind="classification", prompt="{a} {b} It was", options=["bad", "good"])
    assert entry.read({"a": "", "b": "x", "label": 0}).prompt == " x It was"
    with pytest.raises(DataError, match="row 1: every column of the prompt is empty: a, b"):
        instances(entry, table({"a": " ", "b": "", "label": 0}))
