"""Every source of rows, and what is said of those that cannot be read."""

import builtins
import json
import socket
import sys

import pytest

from zoengine.data import DataError, Places, Table, read, require

ROWS = [
    {"text": '"No", he said', "label": 0, "tags": ["a", "b"]},
    {"text": "naïve — 映画", "label": 1, "tags": []},
    {"text": "", "label": None, "tags": ["c"]},
]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def saved(folder, splits=None):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(ROWS)
    if splits is None:
        rows.save_to_disk(folder)
    else:
        datasets.DatasetDict({name: rows.select(range(n)) for name, n in splits.items()}).save_to_disk(folder)
    return folder


# --- what can be read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder"])
def test_values_keep_their_types(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write(path, "\ufeff" + "\r\n".join(json.dumps(row) for row in ROWS[:2]) + "\n\n" + json.dumps(ROWS[2]))
    elif kind == "json":
        write(path, json.dumps(ROWS, indent=1, ensure_ascii=False))
    elif kind == "parquet":
        pytest.importorskip("pyarrow")
        from pyarrow import Table as Columns
        from pyarrow import parquet

        parquet.write_table(Columns.from_pylist(ROWS), path)
    else:
        saved(path)
    table = read(str(path), split="train")  # a source without splits of its own is one split, whatever its name
    assert table.rows == ROWS and len(table) == 3
    assert table.places[2] == f"{path}, " + ("line 4" if kind == "jsonl" else "row 3")


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_separated_values_are_texts(tmp_path, kind):
    content = {
        "csv": '\ufefftext,label\n"""No"", he said",0\n\n"two\nlines",1\n',
        "tsv": 'text\tlabel\r\n"No", he said\t0\r\n\r\ntwo\\nlines\t1\r\n',
    }[kind]
    table = read(write(tmp_path / f"rows.{kind}", content))
    lines = "two\nlines" if kind == "csv" else "two\\nlines"
    assert table.rows == [{"text": '"No", he said', "label": "0"}, {"text": lines, "label": "1"}]
    assert list(table.places) == [f"{tmp_path}/rows.{kind}, line {line}" for line in (2, 5 if kind == "csv" else 4)]


def test_the_embedded_rows():
    table = read("movie-reviews", split="dev")
    assert len(table) == 300 and {row["split"] for row in table.rows} == {"dev"}
    assert set(table.rows[0]) == {"id", "split", "label", "mean_rating", "text"}
    with pytest.raises(DataError, match="no row of split 'validation'; splits there: dev, test, train"):
        read("movie-reviews", split="validation")
    with pytest.raises(DataError, match="a split has to be asked for; splits there: dev, test, train"):
        read("movie-reviews")


def test_the_first_split_there_is_taken(tmp_path):
    path = write(tmp_path / "all.csv", "text,part\na,train\nd,dev\nc,train\nb,validation\n")
    table = read(path, split=("test", "validation", "dev"), split_column="part")
    assert [row["text"] for row in table.rows] == ["b"] and list(table.places) == [f"{path}, line 5"]
    table = read(path, split="train", split_column="part")
    assert [row["text"] for row in table.rows] == ["a", "c"] and table.places[1:] == [f"{path}, line 4"]


def test_splits_of_a_saved_folder(tmp_path):
    folder = saved(tmp_path / "both", {"train": 2, "validation": 1})
    assert read(folder, split="train").rows == ROWS[:2]
    table = read(folder, split=("dev", "validation"))
    assert table.rows == ROWS[:1] and table.places[0] == f"{folder} (validation), row 1"
    with pytest.raises(DataError, match="both: no split 'test'; splits there: train, validation"):
        read(folder, split="test")
    with pytest.raises(DataError, match="both: several splits, and none is asked for; splits there: train, validation"):
        read(folder)
    with pytest.raises(DataError, match="has splits of its own; leave out split_column, here 'part'"):
        read(folder, split="train", split_column="part")
    assert read(saved(tmp_path / "one", {"all": 2})).rows == ROWS[:2]


def test_require():
    table = Table([{"a": 1}, {"a": None, "b": 2}], Places("x.jsonl", "line", [1, 7]), "x.jsonl")
    require(table, ["a"])
    with pytest.raises(DataError, match=r"x.jsonl, line 1: no column 'b'; the columns there are 'a'"):
        require(table, ["a", "b"])


# --- what cannot ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", None, "no data file at .*a.tsv; give one that is .jsonl, .json, .csv, .tsv, .parquet, or a folder"),
        ("org/name", None, r"no data file at .*name; .*the Hugging Face Hub is named hub:PATH or hub:PATH:CONFIG"),
        ("a.txt", "x", "a.txt: unknown kind '.txt'; expected .jsonl"),
        ("a", "x", "a: unknown kind 'without a suffix'"),
        ("a.csv", "", "a.csv: no rows"),
        ("a.csv", "text,label\n", "a.csv: no rows"),
        ("a.json", "", "a.json: no rows"),
        ("a.json", "[]", "a.json: no rows"),
        ("a.jsonl", "\n \n", "a.jsonl: no rows"),
        ("a.csv", "text,label\nx,1\n\ny,1,z\n", "a.csv, line 4: more fields than the header has"),
        ("a.csv", "text,label\nx,1\ny\n", r"a.csv, line 3: fewer fields than the header has \(text, label\)"),
        ("a.tsv", "text\tlabel\nx\n", "a.tsv, line 2: fewer fields"),
        ("a.csv", 'text,label\nx,1\n"x"y,1\n', "a.csv, line 3: not valid CSV"),
        ("a.csv", 'text,label\nx,1\n"x,1\n', "a.csv, line 3: not valid CSV: unexpected end of data"),
        ("a.csv", b"text,label\n\xff,1\n", "a.csv: not UTF-8 text .invalid start byte at byte 11."),
        ("a.jsonl", '{"text": 1}\n\n{"text"\n', "a.jsonl, line 3: not valid JSON: Expecting ':' delimiter at column 8"),
        ("a.jsonl", "[1]\n", "a.jsonl, line 1: expected a JSON object, found list"),
        ("a.jsonl", b'{"text": 1}\n\x80', "a.jsonl: not UTF-8 text"),
        ("a.json", '[\n {"text": 1},\n {"text" 2}\n]', "a.json, line 3: not valid JSON: .* at column 10"),
        ("a.json", '{"text": 1}', "a.json: expected a JSON list of objects, found dict"),
        ("a.json", '[{"text": 1}, 2]', "a.json, row 2: expected a JSON object, found int"),
        ("a.json", "[" * 100000, "a.json: not valid JSON: nested too deeply"),
        ("a.parquet", "x", "a.parquet: not a Parquet file that can be read: .*"),
        ("a.parquet", "", "a.parquet: not a Parquet file that can be read: .*"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_a_split_column_that_is_not_there(tmp_path):
    path = write(tmp_path / "a.csv", "text,part\nx,train\n")
    with pytest.raises(DataError, match=r"a.csv, line 2: no column 'split'; the columns there are 'text', 'part'"):
        read(path, split="train", split_column="split")
    with pytest.raises(DataError, match=r"a.csv: no row of split 'test' or 'dev'; splits there: train"):
        read(path, split=("test", "dev"), split_column="part")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.csv", "text\nx\n")
    original = builtins.open

    def refusing(file, *args, **kwargs):
        if file == path:
            raise PermissionError(13, "Permission denied")
        return original(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", refusing)
    with pytest.raises(DataError, match=r"a.csv: cannot be read: Permission denied"):
        read(path)


def test_a_damaged_parquet_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS * 50), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + whole[260:])
    with pytest.raises(DataError, match=r"a.parquet: not a Parquet file that can be read: "):
        read(path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("dataset_dict.json", "{"), ("train/state.json", "["), ("train/state.json", None),
        ("train/dataset_info.json", "{"), ("validation/data-00000-of-00001.arrow", b"not arrow at all"),
        ("train/data-00000-of-00001.arrow", None), ("train/data-00000-of-00001.arrow", b""),
    ],
)  # fmt: skip
def test_the_damaged_file_of_a_folder_is_named(tmp_path, file, content):
    folder = saved(tmp_path / "both", {"train": 2, "validation": 1})
    if content is None:
        (folder / file).unlink()
    else:
        write(folder / file, content)
    with pytest.raises(DataError, match=f"both/{file}: cannot be read: "):
        read(folder, split="train")


def test_a_cut_arrow_file_is_named(tmp_path):
    folder = saved(tmp_path / "one")
    path = folder / "data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"one/data-00000-of-00001.arrow: cannot be read: "):
        read(folder)


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(DataError, match="not a folder written by datasets' save_to_disk"):
        read(tmp_path)


@pytest.mark.parametrize("source", ["a.parquet", "hub:org/name"])
def test_missing_libraries_are_named(tmp_path, monkeypatch, source):
    for name in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    if source == "a.parquet":
        source = str(write(tmp_path / source, "x"))
    with pytest.raises(DataError, match=r"reading it needs .* not installed: pip install 'zoengine\[data\]'"):
        read(source, split="train")


def test_text_files_need_no_library(tmp_path, monkeypatch):
    for name in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    assert read(write(tmp_path / "a.csv", "text\nx\n")).rows == [{"text": "x"}]


# --- the Hub ----------------------------------------------------------------------------------------------------------


def test_what_is_asked_of_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []
    rows = datasets.Dataset.from_list(ROWS)

    def load_dataset(path, name, *, split):
        asked.append((path, name, split))
        return rows if split else datasets.DatasetDict(train=rows, validation=rows.select([1]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    table = read("hub:org/name:config", split="train")
    assert table.rows == ROWS and table.places[0] == "hub:org/name:config (train), row 1"
    assert read("hub:name", split=("dev", "validation")).rows == ROWS[1:2]
    assert asked == [("org/name", "config", "train"), ("name", None, None)]
    with pytest.raises(DataError, match="hub:org/name: no split 'test' or 'dev'; splits there: train, validation"):
        read("hub:org/name", split=("test", "dev"))
    with pytest.raises(DataError, match="hub:org/name: has splits of its own; leave out split_column"):
        read("hub:org/name", split="train", split_column="part")


def test_an_unreachable_hub_fails_at_once(monkeypatch):
    """By the real libraries, with a host that has no address: they would try again for 40 seconds."""
    pytest.importorskip("datasets")
    constants = pytest.importorskip("huggingface_hub").constants
    before = constants.HF_HUB_OFFLINE

    def nowhere(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    monkeypatch.setattr("zoengine.data.arrow.getproxies", dict)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"a second attempt after {seconds} s"))
    with pytest.raises(DataError) as failure:
        read("hub:org/no-such-data:config", split="train")
    message = str(failure.value)
    assert message.startswith("hub:org/no-such-data:config (split 'train'): cannot be loaded from the Hub: ")
    assert "a local copy with the same columns instead: .jsonl, .json, .csv, .tsv, .parquet, or a folder" in message
    assert before == constants.HF_HUB_OFFLINE
