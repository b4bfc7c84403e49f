"""Embedded data and data files."""

import csv
import json
from collections import Counter
from importlib import resources

import pytest

from zoengine.data import DataError, Example, movie_reviews, read_examples, split_hash
from zoengine.data import select as selection

SPLITS = {"train": 1500, "dev": 300, "test": 500}


# --- data ---------------------------------------------------------------------------------------------------------


def test_movie_reviews_keep_their_rule():
    seen = set()
    for split, count in SPLITS.items():
        examples = movie_reviews(split)
        assert Counter(e.label for e in examples) == {0: count // 2, 1: count // 2}
        assert all(4 <= len(e.text.split()) <= 12 and e.text.isascii() for e in examples)
        seen.update(selection.normalised(e.text) for e in examples)
    assert len(seen) == sum(SPLITS.values()), "a sentence stands twice"


def test_movie_reviews_label_is_the_ratings_sign():
    path = resources.files("zoengine.data") / "movie_reviews.tsv"
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            rating = float(row["mean_rating"])
            assert abs(rating) > 0.5 and int(row["label"]) == (rating > 0), row


def test_movie_reviews_hashes_are_the_published_ones():
    notice = (resources.files("zoengine.data") / "NOTICE.md").read_text(encoding="utf-8")
    for split in SPLITS:
        row = next(line for line in notice.splitlines() if line.startswith(f"| {split} |"))
        assert split_hash(movie_reviews(split)) in row


def test_split_hash_sees_text_label_and_order():
    examples = [Example("a b", 0), Example("c", 1)]
    changed = [[Example("a b", 1), Example("c", 1)], [Example("a  b", 0), Example("c", 1)], examples[::-1]]
    assert len({split_hash(e) for e in [examples, *changed]}) == 4


def test_select_drops_repeats_neutral_long_and_broken_sentences(monkeypatch):
    monkeypatch.setattr(selection, "PER_LABEL", {"test": 1})
    rows = [
        "id\tmean\ttext",
        "1\t2.0\tA Very good film.",
        "2\t3.0\ta very good FILM",
        "3\t0.5\tIt is a film",
        "4\t1\tToo short",
    ]
    rows += ["5\t-1.0\tIt is quite bad", "6\t-2.0\tBad " + "word " * 12, "7\t-2.0\tA na\u00efve bad film"]
    assert selection.select(rows) == [
        ("5", "test", 0, "-1.0", "It is quite bad"), ("1", "test", 1, "2.0", "A Very good film.")
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl"])
def test_own_file_in_every_format(tmp_path, kind):
    path = tmp_path / f"own.{kind}"
    if kind == "jsonl":
        rows = [{"text": '"No", he said', "label": "bad"}, {"text": "fine", "label": "good"}]
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    elif kind == "csv":
        path.write_text('\ufefflabel,text\nbad,"""No"", he said"\ngood,fine\n', encoding="utf-8")
    else:
        path.write_text('text\tlabel\n"No", he said\tbad\nfine\tgood\n', encoding="utf-8")
    assert read_examples(path, options=("bad", "good")) == [Example('"No", he said', 0), Example("fine", 1)]


@pytest.mark.parametrize(
    ("name", "content", "split", "message"),
    [
        ("a.tsv", None, None, "no data file at .*a.tsv"),
        ("a.txt", "text\tlabel\nx\t1\n", None, "unknown kind '.txt'"),
        ("a.tsv", "text\tsentiment\nx\t1\n", None, "a.tsv, line 2: no column 'label'; .*'text', 'sentiment'"),
        ("a.tsv", "text\tlabel\nx\t1\ny\t2\n", None, "a.tsv, line 3: label '2' is not one of the options 0, 1"),
        ("a.tsv", "text\tlabel\nx\t1\ty\n", None, "line 2: more fields than the header"),
        ("a.csv", "text,label\n  ,1\n", None, "a.csv, line 2: the column 'text' is empty"),
        ("a.csv", 'text,label\n"x"y,1\n', None, "a.csv, line 2: not valid CSV"),
        ("a.csv", "text,label\n", None, "a.csv: no rows"),
        ("a.csv", "text,label\nx,1\n", "dev", "no column 'split'"),
        ("a.csv", "text,label,split\nx,1,train\n", "dev", "no row of split 'dev'; splits there: train"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text"\n', None, "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", "[1]\n", None, "line 1: expected a JSON object, found list"),
        ("a.csv", b"text,label\n\xff,1\n", None, "not UTF-8 text"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, name, content, split, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_examples(tmp_path / name, split=split)


def test_movie_reviews_unknown_split():
    with pytest.raises(DataError, match="'validation'; splits there: dev, test, train"):
        movie_reviews("validation")
