"""The configuration: what is read is what was meant, and every mistake names its key."""

from pathlib import Path

import pytest

pytest.importorskip("pydantic")

from zoengine import config
from zoengine.config import ConfigError

MINIMAL = """
model: {path: some/model}
method: {lr: 1e-6}
run: {output_dir: out, steps: 10}
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_floats_as_people_write_them(path):
    assert config.load(path).method["lr"] == 1e-6
    found = config.load(path, ["method.lr=2E-5", "method.zo_eps=.5e-2", "tuning.lora_alpha=4"])
    assert (found.method["lr"], found.method["zo_eps"], found.tuning.lora_alpha) == (2e-5, 0.005, 4.0)


def test_the_methods_fields_are_filled_in(path):
    found = config.load(path, ["method.name=mezo-momentum", "run.seed=7"])
    assert found.method["beta1"] == 0.9
    assert found.method["seed"] == 7, "the run's seed unless the method has its own"
    assert config.load(path, ["run.seed=7", "method.seed=8"]).method["seed"] == 8


def test_what_is_dumped_is_read_back(path, tmp_path):
    found = config.load(path, ["data.train=é.tsv", "task.template='{text} So'", "method.lr=3e-7"])
    (tmp_path / "again.yaml").write_text(config.dump(found), encoding="utf-8")
    assert config.load(tmp_path / "again.yaml") == found


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.stps=3", ["run.stps", "'steps'"]),
        ("runn.steps=3", ["runn", "'run'"]),
        ("run.steps=ten", ["run.steps", "integer", "'ten'"]),
        ("run.steps=true", ["run.steps", "integer", "True"]),
        ("run.steps=0", ["run.steps", "greater than 0", "0"]),
        ("run.seed=1.5", ["run.seed", "integer", "1.5"]),
        ("run.lr_scheduler=lin", ["run.lr_scheduler", "'linear'", "'lin'"]),
        ("model.path=3", ["model.path", "string", "3"]),
        ("model.device=gpu", ["model.device", "'cuda'", "'gpu'"]),
        ("data.options=[a, 1]", ["data.options", "string", "1"]),
        ("method.zo_epss=1", ["zo_epss", "'zo_eps'"]),
        ("method.lr='1e-6'", ["lr", "float", "'1e-6'"]),
        ("method.lr=-1", ["lr", "at least 0"]),
        ("method.name=meso", ["meso", "'mezo'"]),
        ("method.name=3", ["method.name", "3"]),
        ("run.steps.more=1", ["run.steps", "section"]),
        ("run.steps", ["key=value", "run.steps"]),
        ("run.steps=[1", ["run.steps=[1", "YAML"]),
        ("data.eval=null", ["data", "eval or test"]),
    ],
)
def test_a_mistake_names_its_key(path, override, words):
    with pytest.raises(ConfigError) as caught:
        config.load(path, [override])
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("run: {steps: 1, steps: 2}", "'steps' is given twice"),
        ("run: [1", "line 1"),
        ("just words", "mapping"),
        ("model: {path: x}\nmethod: {lr: 1}", "run is missing"),
        ("model: {path: x}\nmethod: {}\nrun: {output_dir: o, steps: 1}", "needs a value for lr"),
    ],
)
def test_a_bad_file(path, text, word):
    path.write_text(text)
    with pytest.raises(ConfigError, match=word):
        config.load(path)


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match="there is no config file"):
        config.load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot read"):
        config.load(tmp_path)


CONFIGS = sorted(path.stem for path in (Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", [n for n in CONFIGS if not n.startswith(("compare", "meta-train"))])
def test_the_configurations_that_come_along(name):
    assert config.load(Path(__file__).parent.parent / "configs" / f"{name}.yaml").run.steps > 0


@pytest.mark.parametrize("name", [n for n in CONFIGS if n.startswith("compare")])
def test_the_comparisons_that_come_along(name):
    compare = pytest.importorskip("zoengine.compare.config")
    assert compare.load(Path(__file__).parent.parent / "configs" / f"{name}.yaml").cells > 0
