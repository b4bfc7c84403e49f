"""The embedded sentences: what was promised of them, and how they were chosen."""

import csv
from collections import Counter
from importlib import resources

import pytest

from zoengine.data import DataError, read, split_hash
from zoengine.data import select as selection
from zoengine.tasks import catalog
from zoengine.tasks.rows import instances

SPLITS = {"train": 1500, "dev": 300, "test": 500}


def test_they_keep_their_rule():
    seen = set()
    for split, count in SPLITS.items():
        rows = read("movie-reviews", split=split).rows
        assert Counter(row["label"] for row in rows) == {"0": count // 2, "1": count // 2}
        assert all(4 <= len(row["text"].split()) <= 12 and row["text"].isascii() for row in rows)
        seen.update(selection.normalised(row["text"]) for row in rows)
    assert len(seen) == sum(SPLITS.values()), "a sentence stands twice"


def test_a_label_is_the_ratings_sign():
    path = resources.files("zoengine.data") / "movie_reviews.tsv"
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            rating = float(row["mean_rating"])
            assert abs(rating) > 0.5 and int(row["label"]) == (rating > 0), row


def test_the_hashes_are_the_published_ones():
    notice = (resources.files("zoengine.data") / "NOTICE.md").read_text(encoding="utf-8")
    for split in SPLITS:
        row = next(line for line in notice.splitlines() if line.startswith(f"| {split} |"))
        assert split_hash(instances(catalog.get("movie-reviews"), read("movie-reviews", split=split))) in row


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


def test_another_split():
    with pytest.raises(DataError, match="'validation'; splits there: dev, test, train"):
        read("movie-reviews", split="validation")
