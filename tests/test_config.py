"""The configuration: what is read is what was meant, and every mistake names its key."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

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
    found = config.load(
        path, ["data.train=é.tsv", "task.descriptions=[é, o]", "task.form=similarity", "method.lr=3e-7"]
    )
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
        ("run.report_to=[a, 1]", ["run.report_to", "string", "1"]),
        ("method.zo_epss=1", ["zo_epss", "'zo_eps'"]),
        ("method.lr='1e-6'", ["lr", "float", "'1e-6'"]),
        ("method.lr=-1", ["lr", "at least 0"]),
        ("method.name=meso", ["meso", "'mezo'"]),
        ("method.name=3", ["method.name", "3"]),
        ("run.steps.more=1", ["run.steps", "section"]),
        ("run.steps", ["key=value", "run.steps"]),
        ("run.steps=[1", ["run.steps=[1", "YAML"]),
        ("data={num_eval: 0, num_test: 0}", ["num_eval is 0", "nothing to measure"]),
        ("task.prompt='{text} So'", ["prompt describes a custom task"]),
        ("task.name=custom", ["needs kind"]),
        ("task={name: custom, kind: choice, form: head}", ["kind choice needs form prompt"]),
        ("task.descriptions=[a, b]", ["descriptions belongs to form similarity"]),
        ("task.form=similarity", ["needs descriptions"]),
        ("tuning.layers=[1]", ["tuning.layers", "2 items"]),
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


@pytest.fixture
def family(tmp_path):
    """A file, what it inherits, and a third with another scheme of tuning."""
    bases = tmp_path / "bases"
    bases.mkdir()
    (bases / "deep.yaml").write_text(
        "model: {path: deep}\ntuning: {lora_target_modules: [a, b, c]}\nrun: {seed: 3, steps: 5}"
    )
    (bases / "base.yaml").write_text("inherit: deep.yaml\nmodel: {dtype: bfloat16}\nrun: {output_dir: out}")
    (bases / "lora.yaml").write_text("tuning: {kind: lora, lora_r: 4}\nmethod: {zo_eps: 0.01}")
    (tmp_path / "run.yaml").write_text("""
inherit: bases/base.yaml
tuning: {lora_target_modules: [x, y]}
method: {lr: 1e-7}
sweep: {method.lr: [1e-6, 1e-7]}
rows:
  plain: {}
  lora: {inherit: bases/lora.yaml, tuning: {lora_alpha: 8.0}}
  momentum: {method: {name: mezo-momentum}, run: {output_dir: "runs/{row}/{model.path}-{run.seed}"}}
""")
    return tmp_path


def test_a_file_is_laid_over_what_it_inherits(family):
    found = config.load(family / "run.yaml", row="plain")
    assert (found.model.path, found.model.dtype) == ("deep", "bfloat16")
    assert (found.run.seed, found.run.steps, found.run.output_dir) == (3, 5, "out")
    assert found.tuning.lora_target_modules == ["x", "y"], "a list is replaced, not merged"
    later = family / "later.yaml"
    later.write_text("inherit: [bases/base.yaml, bases/other.yaml]\nmethod: {lr: 1.0}")
    (family / "bases" / "other.yaml").write_text("run: {seed: 4}")
    assert config.load(later).run.seed == 4, "of two files the later wins"


def test_a_row_is_laid_over_its_file_and_overrides_over_the_row(family):
    found = config.load(family / "run.yaml", row="lora")
    assert (found.tuning.kind, found.tuning.lora_r, found.tuning.lora_alpha) == ("lora", 4, 8.0)
    assert (found.method["zo_eps"], found.method["lr"]) == (0.01, 1e-7)
    assert config.load(family / "run.yaml", ["tuning.lora_r=2"], row="lora").tuning.lora_r == 2


def test_the_folder_may_name_the_row_and_keys(family):
    found = config.load(family / "run.yaml", ["model.path=some/name", "run.seed=8"], row="momentum")
    assert found.run.output_dir == "runs/momentum/name-8"
    with pytest.raises(ConfigError, match=r"a value for model\.paht"):
        config.load(family / "run.yaml", ["run.output_dir='{model.paht}'"], row="momentum")


def test_the_folder_of_a_run_is_taken_as_it_is(path, tmp_path):
    folder = tmp_path / "{row}"
    folder.mkdir()
    (folder / "config.yaml").write_text(config.dump(config.load(path)), encoding="utf-8")
    assert config.load(folder).run.output_dir == str(folder)


def test_what_can_be_wrong_with_rows_and_inheriting(family):
    def caught(text, row=None):
        (family / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError) as error:
            config.load(family / "bad.yaml", row=row)
        assert "\n" not in str(error.value)
        return str(error.value)

    rows = "rows: {one: {}, two: {}}"
    assert "--row NAME: one, two" in caught(rows)
    assert "no row 'three'" in caught(rows, "three") and "one, two" in caught(rows, "three")
    assert "no row 'one'" in caught("run: {steps: 1}", "one") and "none" in caught("run: {steps: 1}", "one")
    assert "rows must map names" in caught("rows: [one]")
    assert "rows must map names" in caught("rows: {one: 1}")
    assert "inherit takes a file" in caught("inherit: {a: b}")
    missing = caught("inherit: bases/none.yaml")
    assert "no config file" in missing and "none.yaml" in missing and "bad.yaml inherits" in missing
    (family / "back.yaml").write_text("inherit: bad.yaml")
    cycle = caught("inherit: back.yaml")
    assert "inherits itself" in cycle and cycle.count("bad.yaml") == 2 and "back.yaml" in cycle
    assert "inherits itself" in caught("rows: {one: {inherit: bad.yaml}}", "one")
    (family / "bases" / "broken.yaml").write_text("run: {\n steps: [1}")
    assert "broken.yaml, line 2" in caught("inherit: bases/broken.yaml")


CONFIGS = sorted(path.stem for path in (Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", [n for n in CONFIGS if not n.startswith(("compare", "meta-train"))])
def test_the_configurations_that_come_along(name):
    assert config.load(Path(__file__).parent.parent / "configs" / f"{name}.yaml").run.steps > 0


@pytest.mark.parametrize("name", [n for n in CONFIGS if n.startswith("compare")])
def test_the_comparisons_that_come_along(name):
    compare = pytest.importorskip("zoengine.compare.config")
    assert compare.load(Path(__file__).parent.parent / "configs" / f"{name}.yaml").cells > 0


def test_the_readmes_own_data():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    made = config.check(yaml.safe_load(block.replace("1e-6", "1.0e-6")))
    assert made.task.options == ["terrible", "great"]


@pytest.mark.parametrize(
    ("overrides", "limit"),
    [([], 40), (["task.max_length=20"], 20), (["task.max_length=99"], 40), (["task.form=masked"], 40)],
)
def test_no_text_is_longer_than_the_model_reads(path, overrides, limit):
    build = pytest.importorskip("zoengine.trainer.build")
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=40))
    assert build.max_length(config.load(path, overrides), model) == limit
    assert build.max_length(config.load(path, ["task.form=head"]), SimpleNamespace()) == 128
