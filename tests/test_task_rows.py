"""What a run trains on, evaluates on and reports, from its sources."""

import json
from pathlib import Path

import pytest

from zoengine.data import DataError, permutation, split_hash
from zoengine.tasks import catalog
from zoengine.tasks.catalog import custom
from zoengine.tasks.instance import TaskError
from zoengine.tasks.rows import load

ROWS = Path(__file__).parent / "rows"


def write(path, count, label=lambda k: k % 2):
    path.write_text("".join(json.dumps({"sentence": f"s{k}", "label": label(k)}) + "\n" for k in range(count)))
    return str(path)


def texts(part):
    return [instance.texts[0] for instance in part]


def test_files_in_place_of_the_hub(tmp_path):
    entry = catalog.get("sst2")
    train, test = write(tmp_path / "a.jsonl", 40), write(tmp_path / "b.jsonl", 10)
    splits = load(entry, train=train, test=test, seed=3, num_train=8, num_eval=4, num_test=5)
    assert [len(part) for part in (splits.train, splits.eval, splits.test)] == [8, 4, 5]
    assert len({*texts(splits.train), *texts(splits.eval)}) == 12
    again = load(entry, train=train, test=test, seed=3, num_train=8, num_eval=4, num_test=5)
    assert split_hash(again.train) == split_hash(splits.train)
    assert split_hash(load(entry, train=train, seed=4, num_train=8, num_eval=4).train) != split_hash(splits.train)
    assert load(entry, train=train).test == [], "no Hub where the user gives files"
    only = load(entry, train=str(tmp_path / "missing.jsonl"), test=test, parts=("test",))
    assert (only.train, only.eval, len(only.test)) == ([], [], 10), "what is not wanted is not read"


def test_evaluation_data_of_its_own(tmp_path):
    train, own = write(tmp_path / "a.jsonl", 40), write(tmp_path / "b.jsonl", 10)
    splits = load(catalog.get("sst2"), train=train, eval=own, num_train=None, num_eval=3)
    assert len(splits.train) == 40 and len(splits.eval) == 3
    assert set(texts(splits.eval)) <= {f"s{k}" for k in range(10)}
    shots = load(catalog.get("sst2"), train=train, eval=own, k_shot=2)
    assert len(shots.train) == 4 and len(shots.eval) == 10


def test_nothing_evaluates_where_none_is_asked_for(tmp_path):
    splits = load(catalog.get("sst2"), train=write(tmp_path / "a.jsonl", 40), num_train=7, num_eval=0)
    assert (len(splits.train), splits.eval) == (7, [])


def test_official_few_shot_runs_share_one_test_set(tmp_path):
    source = write(tmp_path / "a.jsonl", 40)

    def tested(seed, official):
        return load(
            catalog.get("sst2"), train=source, test=source, k_shot=4, num_test=9, seed=seed, official=official
        ).test

    assert texts(tested(13, True)) == texts(tested(21, True)) == [f"s{k}" for k in permutation(40, 42)[:9]]
    assert texts(tested(13, False)) == [f"s{k}" for k in permutation(40, 13)[:9]]


def test_one_file_with_a_split_column(tmp_path):
    path = tmp_path / "all.csv"
    path.write_text("sentence,label,part\na,0,train\nb,1,train\nc,0,validation\nd,1,test\n")
    splits = load(catalog.get("sst2"), train=str(path), eval=str(path), test=str(path), split_column="part")
    # The benchmark's results are reported on its validation split; so says the entry.
    assert (texts(splits.train), texts(splits.eval), texts(splits.test)) == (["a", "b"], ["c"], ["c"])
    own = custom(kind="classification", prompt="{sentence}", options=["bad", "good"])
    assert texts(load(own, train=str(path), eval=str(path), test=str(path), split_column="part").test) == ["d"]


def test_few_shot_is_for_classifications(tmp_path):
    with pytest.raises(TaskError, match="k_shot is for classifications; the task copa is a choice"):
        load(catalog.get("copa"), train=str(ROWS / "copa.jsonl"), k_shot=2)


def test_own_tasks_need_a_source():
    own = custom(kind="classification", prompt="{sentence}", options=["bad", "good"])
    with pytest.raises(TaskError, match="the task custom has no data of its own; give a source for train"):
        load(own)


def test_unreachable_hub_names_the_columns(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"give a local copy.* \(columns of mnli: premise, hypothesis, label\)"):
        load(catalog.get("mnli"), parts=("test",))
    assert asked == [("nyu-mll/glue", "mnli", "validation_matched")]
