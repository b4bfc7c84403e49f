"""``zoengine meta-train`` as a user meets it: a folder with networks, and one clear line for every mistake."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from zoengine import pertnn
from zoengine.cli.app import app
from zoengine.config import ConfigError
from zoengine.meta import config, plot, run
from zoengine.meta.training import MetaTrainer
from zoengine.tasks import Task

pytestmark = pytest.mark.usefixtures("one_thread")


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def values(tiny_run):
    return {
        **{name: tiny_run[name] for name in ("model", "data", "task")},
        "meta": {"fo_lr": 0.3, "zo_lr": 1e-2, "hidden": 8, "cycle_epochs": 1},
        "run": {"output_dir": "", "steps": 9, "batch_size": 4, "seed": 3},
    }


@pytest.fixture
def path(values, tmp_path):
    path = tmp_path / "meta.yaml"
    path.write_text(yaml.safe_dump({**values, "run": {**values["run"], "output_dir": str(tmp_path / "out")}}))
    return path


@pytest.fixture(scope="module")
def finished(values, tmp_path_factory):
    """(folder, what was printed) of a finished meta-training."""
    folder = tmp_path_factory.mktemp("meta")
    path = folder / "meta.yaml"
    path.write_text(yaml.safe_dump({**values, "run": {**values["run"], "output_dir": str(folder / "out")}}))
    result = call("meta-train", path)
    assert result.exit_code == 0, result.output
    return folder / "out", result.output


def model_of(values):
    return transformers.AutoModelForCausalLM.from_pretrained(values["model"]["path"])


def test_meta_training_leaves_networks_for_the_model(finished, values):
    folder, output = finished
    assert {p.name for p in folder.iterdir()} == {"config.yaml", "networks.safetensors", "metrics.jsonl", "scales.png"}
    assert (folder / "scales.png").read_bytes().startswith(b"\x89PNG")
    trainer = MetaTrainer(model_of(values), fo_lr=1.0)
    networks = pertnn.load(folder / "networks.safetensors", pertnn.blocks_of(trainer.arena.segments))
    assert networks.hidden == 8 and all(p.abs().sum() > 0 for p in networks.parameters())
    with safe_open(folder / "networks.safetensors", framework="pt") as file:
        about = file.metadata()
    assert about["steps"] == "9" and json.loads(about["meta"])["fo_lr"] == 0.3
    assert f"networks of {len(networks.blocks)} blocks, " in output
    assert output.strip().endswith(f"method.name=zo-finetuner method.zoft_file={folder / 'networks.safetensors'}")


def test_the_metrics_tell_every_step(finished, values):
    rows = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["run", *["step"] * 9, "scales"]
    assert rows[0]["cycle_steps"] == 6 and rows[0]["config"]["meta"]["zo_lr"] == 1e-2
    assert [row["reset"] for row in rows[1:-1]] == [k == 5 for k in range(9)]
    assert abs(rows[7]["loss"] - rows[1]["loss"]) < 0.1 * abs(rows[5]["loss"] - rows[1]["loss"]), "weights anew"
    assert len(rows[-1]["scales"]) == rows[0]["blocks"]
    scales = rows[-1]["scales"]
    assert "model.norm.weight" in scales and min(scales.values()) < 0.999 < 1.001 < max(scales.values())


def test_the_config_written_repeats_the_networks_bit_for_bit(finished, tmp_path):
    out = f"run.output_dir={tmp_path / 'again'}"
    assert call("meta-train", finished[0] / "config.yaml", out).exit_code == 0
    found, expected = load_file(tmp_path / "again" / run.NETWORKS), load_file(finished[0] / run.NETWORKS)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.fixture
def training(tiny_run, finished, tmp_path):
    """A run's configuration that uses the networks, on other sentences than they were learnt on."""
    (tmp_path / "other.tsv").write_text("text\tlabel\n" + "it was a long film\t0\na fine film\t1\n" * 5)
    path = tmp_path / "run.yaml"
    data = {name: str(tmp_path / "other.tsv") for name in ("train", "eval", "test")}
    method = {"name": "zo-finetuner", "lr": 1e-2, "zoft_file": str(finished[0] / "networks.safetensors")}
    run = {**tiny_run["run"], "output_dir": str(tmp_path / "run"), "steps": 4, "save_every": 2}
    path.write_text(yaml.safe_dump({**tiny_run, "data": data, "method": method, "run": run}))
    return path


def test_the_networks_serve_another_task_and_a_derived_checkpoint(training, tmp_path, values):
    result = call("train", training)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["forward_passes"] for row in rows if row["kind"] == "step"] == [3, 5, 7, 9]
    plain = call("train", training, "method.zoft_file=''", f"run.output_dir={tmp_path / 'plain'}")
    assert plain.exit_code == 0, plain.output
    learned, mezo = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "plain"))
    assert any(not torch.equal(learned[name], mezo[name]) for name in learned), "the networks had a say"
    derived = tmp_path / "run" / "model"
    result = call("train", training, f"model.path={derived}", f"run.output_dir={tmp_path / 'derived'}")
    assert result.exit_code == 0, result.output


def test_a_run_with_networks_resumes_bit_for_bit(training, tmp_path):
    assert call("train", training).exit_code == 0
    halves = f"run.output_dir={tmp_path / 'halves'}"
    assert call("train", training, halves, "run.steps=2").exit_code == 0
    (tmp_path / "halves" / "result.json").unlink()
    result = call("train", training, halves, "--resume")
    assert result.exit_code == 0, result.output
    whole, resumed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "halves"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tuning.kind=lora", ["for a model or tuning with other blocks", "lora_A", "meta-train"]),
        ("method.zoft_file=none.safetensors", ["there is no file none.safetensors"]),
    ],
)
def test_networks_that_do_not_fit_are_one_clear_line(training, override, words):
    result = call("train", training, override)
    assert result.exit_code == 2, result.output
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("zoengine: ") and all(word in line for word in words), line


def test_lora_is_meta_trained_too(path, tmp_path):
    result = call("meta-train", path, "tuning.kind=lora", "tuning.lora_r=2", "run.steps=2")
    assert result.exit_code == 0, result.output
    assert "networks of 8 blocks" in result.output


def interrupting(monkeypatch, number, at=3):
    """Send ``number`` to this process within step ``at``."""
    original = MetaTrainer.step

    def step(self, closure):
        if self.step_number == at - 1:
            os.kill(os.getpid(), number)
        return original(self, closure)

    monkeypatch.setattr(MetaTrainer, "step", step)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_keeps_what_was_learnt(path, tmp_path, monkeypatch, number, code):
    interrupting(monkeypatch, number)
    result = call("meta-train", path)
    assert result.exit_code == code and "stopped after step 3" in result.output
    with safe_open(tmp_path / "out" / "networks.safetensors", framework="pt") as file:
        assert file.metadata()["steps"] == "3"
    assert (tmp_path / "out" / "scales.png").is_file()


def test_a_loss_that_is_not_finite_ends_it_and_keeps_what_was_learnt(path, tmp_path, monkeypatch):
    original, calls = Task.loss, []

    def loss(*args):
        calls.append(1)
        return original(*args) * (float("nan") if len(calls) == 12 else 1.0)

    monkeypatch.setattr(Task, "loss", loss)
    result = call("meta-train", path)
    assert result.exit_code == 3 and "loss nan" in result.stderr
    with safe_open(tmp_path / "out" / "networks.safetensors", framework="pt") as file:
        assert file.metadata()["steps"] == "2"


def test_an_output_folder_in_use_is_left_alone_unless_told(path, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    result = call("meta-train", path, "run.steps=1")
    assert result.exit_code == 2 and "not empty" in result.stderr
    assert call("meta-train", path, "run.steps=1", "--overwrite").exit_code == 0
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    result = call("meta-train", path, f"run.output_dir={path}")
    assert result.exit_code == 2 and "is a file" in result.stderr


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("meta.folr=1", ["meta", "'folr'", "'fo_lr'"]),
        ("meta.fo_lr=-1", ["fo_lr", "greater than 0"]),
        ("meta.zo_lr='1'", ["zo_lr", "float"]),
        ("run.stps=1", ["run.stps", "'steps'"]),
        ("run.eval_every=1", ["run.eval_every"]),
        ("method.lr=1", ["'method'"]),
        ("run.steps=0", ["run.steps", "greater than 0"]),
        ("data.train=none.tsv", ["none.tsv"]),
        ("model.path=./none", ["none"]),
    ],
)
def test_every_mistake_is_one_clear_line(path, override, words):
    result = call("meta-train", path, override)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("zoengine: ") and all(word in line for word in words), line


def test_a_missing_fo_lr_is_asked_for(values, tmp_path):
    path = tmp_path / "meta.yaml"
    path.write_text(yaml.safe_dump({**values, "meta": {}}))
    with pytest.raises(ConfigError, match="fo_lr"):
        config.load(path)


def test_the_configuration_that_comes_along():
    found = config.load(Path(__file__).parent.parent / "configs" / "meta-train.yaml")
    assert found.meta["hidden"] == 64 and found.run.steps > 0


def test_batches_cover_every_epoch_in_an_order_of_its_own():
    drawn = run.batches([5] * 10, 4, seed=1)
    epochs = [[k for _ in range(3) for k in next(drawn)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1]
    again = run.batches([5] * 10, 4, seed=1)
    assert [k for _ in range(3) for k in next(again)] == epochs[0]


def test_blocks_of_a_kind_stand_together_in_the_plot():
    scales = {f"model.layers.{k}.self_attn.q_proj.weight": 1.0 + k for k in (1, 0, 10)}
    assert plot.by_kind({**scales, "model.norm.weight": 3.0}) == {
        "self_attn.q_proj.weight": [(0, 1.0), (1, 2.0), (10, 11.0)], "model.norm.weight": [(0, 3.0)]
    }  # fmt: skip
