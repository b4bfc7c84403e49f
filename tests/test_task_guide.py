"""docs/tasks.md: its configurations are trained, its code is run, its table is compared with the catalogue."""

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import yaml
from tiny_models import byte_tokenizer, make_model

from zoengine import config
from zoengine.tasks import catalog
from zoengine.trainer.evaluate import evaluate
from zoengine.trainer.run import train

pytestmark = pytest.mark.usefixtures("one_thread")

GUIDE = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text(encoding="utf-8")
FILES = {name: text for name, _, text in re.findall(r"^`([\w.]+)`:\n```(\w+)\n(.*?)^```$", GUIDE, re.M | re.S)}
CODE = re.findall(r"(?<!`:\n)^```python\n(.*?)^```$", GUIDE, re.M | re.S)
CONFIGS = [name for name in FILES if name.endswith(".yaml")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The guide's files, and a tiny model with its tokenizer."""
    place = tmp_path_factory.mktemp("guide")
    for name, text in FILES.items():
        (place / name).write_text(text, encoding="utf-8")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(place / "model")
    make_model("llama").save_pretrained(place / "model")
    return place


def settings(folder):
    return [
        f"model.path={folder / 'model'}", "model.dtype=float32", "model.device=cpu", "run.steps=2", "run.batch_size=2",
    ]  # fmt: skip


def test_the_guide_has_what_is_tested_here():
    assert CONFIGS == ["reviews.yaml", "riddles.yaml", "questions.yaml", "talks.yaml"] and len(CODE) == 2
    assert set(FILES) - set(CONFIGS) == {
        "reviews.jsonl",
        "riddles.jsonl",
        "questions.jsonl",
        "talks.jsonl",
        "rewards.py",
    }
    for name in CONFIGS:
        assert FILES[name].count("\n") <= 12 and name.replace("yaml", "jsonl") in FILES[name]
        assert yaml.safe_load(FILES[name])["model"] == {"path": "smollm2-135m"}
    for name in FILES:
        if name.endswith(".jsonl"):
            assert all(json.loads(line) for line in FILES[name].splitlines())


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_train(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    outcome = train(config.load(name, settings(folder)))
    assert outcome.step == 2 and outcome.after["n"] == 1, "a fifth of three rows, one at least, evaluates"
    metric = {"questions.yaml": "f1", "talks.yaml": "token_accuracy"}.get(name, "accuracy")
    assert outcome.metric == metric in outcome.after
    assert (folder / "runs" / Path(name).stem / "model").is_dir()


def test_the_reward_trains(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    extra = ["task.objective=rewards:grounded", "run.output_dir=runs/rewarded"]
    outcome = train(config.load("questions.yaml", [*settings(folder), *extra]))
    assert outcome.step == 2 and outcome.metric == "reward" and outcome.after["loss"] == -outcome.after["reward"]
    space = {}
    exec(FILES["rewards.py"], space)
    prompts = ["It opened in 1932.\nQuestion: when\nAnswer:", "x", "x"]
    assert space["grounded"](prompts, ["in May", "", "X"]) == [0.5, 0, 1]


def test_zero_shot_and_in_context(folder, monkeypatch):
    monkeypatch.chdir(folder)
    overrides = settings(folder)
    zero, one = (evaluate("reviews.yaml", overrides, "eval", shots=shots) for shots in (0, 1))
    assert zero["n"] == one["n"] == 1 and zero["split_hash"] == one["split_hash"] and zero["loss"] != one["loss"]
    assert one["shots"] == 1


@pytest.mark.parametrize("number", range(len(CODE)))
def test_code_runs(number):
    torch.manual_seed(0)
    space = {"model": make_model("llama"), "tokenizer": byte_tokenizer(), "print": lambda *_: None}
    exec(CODE[number], space)
    if "calibrated" in space:
        for scores in (space["calibrated"], space["in_context"]):
            assert scores["n"] == 100 and 0 <= scores["accuracy"] <= 1
    else:
        assert space["optimizer"].step_number == 10


FILLED = {
    "boolq": {"answer": True},
    "trec": {"label_coarse_original": "ABBR"},
    "copa": {"premise": "{premise}.", "question": "effect"},
    "record": {"entities": ["{entity}"], "answers": ["{entity}"]},
    "squad": {"answers": {"text": ["{answer}"]}},
    "drop": {"answers_spans": {"spans": ["{answer}"]}},
}


def test_the_table_is_the_catalogue():
    """Every prompt is what a row gives whose columns hold their own names."""
    table = re.findall(r"^\| `([\w-]+)` \| `(.*?)` \| (.*?) \| (\w+) \| (\S+) \| (\S+) \|(.*?)\|$", GUIDE, re.M)
    assert [row[0] for row in table] == list(catalog.names())
    for name, prompt, options, metric, sizes, place, masked in table:
        entry = catalog.get(name)
        row = {**{column: f"{{{column}}}" for column in entry.columns}, "label": 0, **FILLED.get(name, {})}
        found = entry.read(row)
        assert (prompt.replace("⏎", "\n"), metric) == (found.prompt, entry.metric), name
        assert options == " ".join(f"`{option}`" for option in found.options).replace("\n", "⏎"), name
        numbers = (entry.num_train, entry.num_eval, entry.num_test)
        assert sizes == "/".join("all" if n is None else str(n) for n in numbers), name
        hub = entry.hub
        assert place == ("embedded" if hub is None else ":".join(filter(None, (hub.path, hub.config)))), name
        assert masked.strip(" `") == (entry.masked.template if entry.masked else ""), name
