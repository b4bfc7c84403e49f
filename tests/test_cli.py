"""The command line as a user meets it: what it prints, its exit codes, and one clear line for every mistake."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers
from safetensors import SafetensorError
from typer.testing import CliRunner

import zoengine
from zoengine import ops
from zoengine.cli import doctor, errors
from zoengine.cli.app import app
from zoengine.tasks import catalog

pytestmark = pytest.mark.usefixtures("one_thread")


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def path(tiny_run, tmp_path):
    """A config file whose run goes to tmp_path/run."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**tiny_run, "run": {**tiny_run["run"], "output_dir": str(tmp_path / "run")}}))
    return path


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory):
    """(folder, what was printed) of a finished LoRA run."""
    folder = tmp_path_factory.mktemp("cli")
    values = {**tiny_run, "tuning": {"kind": "lora"}, "run": {**tiny_run["run"], "output_dir": str(folder / "run")}}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    result = call("train", folder / "config.yaml", "run.eval_every=4", "run.save_every=4", "run.save_total_limit=1")
    assert result.exit_code == 0, result.output
    return folder / "run", result.output


def test_train_leaves_a_whole_run(finished):
    folder, output = finished
    last = output.strip().splitlines()[-1]
    assert last.startswith("accuracy ") and last.endswith(f"report {folder / 'report.html'}")
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.yaml", "metrics.jsonl", "checkpoint-9", "model", "curve.png", "report.html", "result.json"
    }  # fmt: skip
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= {
        path.name for path in (folder / "model").iterdir()
    }
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    report = (folder / "report.html").read_text()
    assert "data:image/png;base64," in report and "zo_eps: 0.001" in report and "film" in report
    assert "http" not in report, "self-contained"


def test_metrics_tell_the_whole_story(finished):
    folder, _ = finished
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["kind"] == "run"
    assert rows[0]["noise_version"] == 1 and rows[0]["backend"] in ops.backends() and rows[0]["config"]["method"]
    assert rows[0]["splits"]["train"]["n"] == 22
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == list(range(1, 10))
    assert [row["forward_passes"] for row in steps] == list(range(2, 20, 2))
    assert all(row["lr"] == 1e-2 and row["loss"] > 0 and row["seconds"] > 0 for row in steps)
    evals = [(row["split"], row["step"]) for row in rows if row["kind"] == "eval"]
    assert evals == [("eval", 0), ("test", 0), ("eval", 4), ("eval", 8), ("eval", 9), ("test", 9)]


def test_eval_of_a_run_gives_the_runs_own_result(finished):
    folder, _ = finished
    result = call("eval", folder, "--split", "test", "--json")
    assert result.exit_code == 0, result.output
    found, expected = json.loads(result.stdout), json.loads((folder / "result.json").read_text())["after"]
    assert {name: found[name] for name in expected} == expected


def test_eval_of_an_untouched_model(path, tiny_run, finished):
    expected = json.loads((finished[0] / "result.json").read_text())["before"]
    found = json.loads(call("eval", path, "--split", "test", "--json").stdout)
    assert {name: found[name] for name in expected} == expected
    data = tiny_run["data"]["test"]
    words = [f"task={json.dumps(tiny_run['task'])}", "model.dtype=float32"]
    result = call("eval", tiny_run["model"]["path"], f"data.eval={data}", *words)
    assert result.exit_code == 0, result.output
    assert f"accuracy {expected['accuracy']:.1%}, loss {expected['loss']:.4f} on 22 eval examples" in result.output


def test_eval_with_more_in_the_prompt(path):
    shown = call("eval", path, "--split", "test", "--shots", "2", "--json")
    plain = call("eval", path, "--split", "test", "--json")
    found, zero = json.loads(shown.stdout), json.loads(plain.stdout)
    assert (found["shots"], found["split_hash"], found["n"]) == (2, zero["split_hash"], 22)
    assert found["loss"] != zero["loss"]
    calibrated = call("eval", path, "--split", "test", "--null-prompt", "it was", "--json")
    assert json.loads(calibrated.stdout)["null_prompt"] == "it was"
    assert "loss" not in json.loads(calibrated.stdout)
    mistake(call("eval", path, "--shots", "2", "task.form=head"), "--shots", "form prompt")


def test_the_adapter_loads_with_plain_peft(finished, tiny_run):
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_run["model"]["path"])
    model = peft.PeftModel.from_pretrained(base, finished[0] / "model")
    assert any(p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name), "it was trained"
    assert transformers.AutoTokenizer.from_pretrained(finished[0] / "model")("film")["input_ids"] == [6]


def mistake(result, *words):
    """One line on stderr that holds ``words``, exit code 2, no traceback."""
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("zoengine: ")
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.stps=3", ["run.stps", "did you mean 'steps'"]),
        ("run.steps=many", ["run.steps", "integer", "'many'"]),
        ("method.lr=fast", ["lr", "float", "'fast'"]),
        ("method.name=mezzo", ["mezzo", "'mezo'"]),
        ("data.train=none.tsv", ["none.tsv"]),
        ("model.path=./none", ["none"]),
        ("model.path=/none/at/all", ["/none/at/all"]),
        ("task.prompt=text", ["{text}"]),
        ("task.options=[good]", ["two different options"]),
        ("task={name: sst3}", ["sst3", "'sst5'"]),
        ("task.name=sst2", ["custom task"]),
        ("task.answers=text", ["answers", "kind classification", "leave it out"]),
        ("tuning={kind: lora, lora_target_modules: [no_proj]}", ["no_proj", "q_proj"]),
        ("run.backend=cuda", ["cuda"]),
        ("run.report_to=[nowhere]", ["run.report_to", "'nowhere'", "none"]),
        ("run.output_dir=/proc/none", ["/proc/none", "cannot write"]),
    ],
)
def test_a_mistake_is_one_clear_line(path, override, words):
    if override == "run.backend=cuda" and ops.backends()["cuda"].available:
        pytest.skip("the cuda backend works here")
    mistake(call("train", path, override), *words)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"name": "squad", "form": "head"}, ["squad is a generation", "form to prompt"]),
        ({"name": "boolq", "form": "masked"}, ["no masked prompt", "boolq"]),
        ({"name": "sst2", "form": "similarity", "descriptions": ["bad"]}, ["1 texts", "negative, positive"]),
        ({"name": "sst2", "form": "similarity", "descriptions": ["bad", "bad"]}, ["two different texts"]),
        ({"name": "squad", "max_length": 40}, ["max_new_tokens is 50"]),
        ({"name": "sst2", "objective": "reward"}, ["'reward'", "package.module:function"]),
        ({"name": "custom", "kind": "chat", "objective": "metric"}, ["token_accuracy", "take cross-entropy"]),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval", "sweep", "compare", "meta-train"])
def test_a_task_that_cannot_be_is_reported_before_anything_is_read(tmp_path, command, task, words):
    """Neither model nor data are there: whoever touched one of them first would say so instead."""
    if command == "meta-train" and "objective" in task:
        words = ["task.objective", "meta-training"]
    values = {"model": {"path": "/no/such/model"}, "data": {"train": "none.tsv", "eval": "none.tsv"}, "task": task}
    values |= {
        "compare": {"methods": [{"name": "mezo", "lrs": [1e-3]}], "run": {"budget": 10}},
        "meta-train": {"meta": {"fo_lr": 0.3, "zo_lr": 1e-2}, "run": {"steps": 3}},
    }.get(command, {"method": {"name": "mezo", "lr": 1e-3}, "run": {"steps": 3}})
    if command == "sweep":
        values |= {"sweep": {"run.seed": [0, 1]}}
    values["run"]["output_dir"] = str(tmp_path / "out")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    mistake(call(command, path), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("objective", ["metric", "rewards:length"])
def test_a_method_with_gradients_has_an_objective_with_one(path, objective):
    overrides = ("method.name=ft-sgd", f"task.objective={objective}", "model.path=/no/such/model")
    mistake(call("train", path, *overrides), "method 'ft-sgd'", repr(objective), "cross-entropy")


def test_no_config_file(tmp_path):
    mistake(call("train", tmp_path / "none.yaml"), "none.yaml")


def test_an_output_folder_in_use(path, tmp_path):
    keep = tmp_path / "run" / "notes.txt"
    keep.parent.mkdir()
    keep.write_text("mine")
    mistake(call("train", path), "not empty", "--resume", "--overwrite")
    mistake(call("train", path, "--resume"), "no complete checkpoint")
    (keep.parent / "checkpoint-5").mkdir()
    result = call("train", path, "run.steps=2", "--overwrite")
    assert result.exit_code == 0, result.output
    assert keep.read_text() == "mine", "only what a run writes is removed"
    assert not (keep.parent / "checkpoint-5").exists()
    mistake(call("train", path, f"run.output_dir={keep}"), "is a file")


def test_an_output_folder_that_cannot_be_written(path, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    (tmp_path / "run").mkdir(mode=0o500)
    mistake(call("train", path), "cannot write")


def test_eval_of_what_is_not_there(finished, path, tmp_path):
    mistake(call("eval", "./none"), "none")
    mistake(call("eval", path, "--split", "train"), "eval or test")
    mistake(call("eval", path, "data.test=null", "--split", "test"), "no test data")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text((finished[0] / "config.yaml").read_text())
    mistake(call("eval", tmp_path / "run"), "no weights yet")


def test_debug_shows_the_error_itself(path):
    result = call("train", path, "run.stps=3", "--debug")
    assert type(result.exception).__name__ == "ConfigError"


def test_a_non_finite_loss_stops_the_run(path):
    result = call("train", path, "method.zo_eps=3e38")
    assert result.exit_code == errors.STOPPED
    assert "zoengine: loss nan in step 0" in result.stderr


def test_ctrl_c_saves_and_says_how_to_go_on(path, tmp_path, monkeypatch):
    from zoengine.trainer import ZOTrainer
    from zoengine.trainer import run as runs

    class Press(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    class Trainer(ZOTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs, callbacks=[Press()])

    with monkeypatch.context() as patch:
        patch.setattr(runs, "ZOTrainer", Trainer)
        result = call("train", path, "run.steps=6")
    assert result.exit_code == 130
    again = f"zoengine train {tmp_path / 'run'} --resume"
    assert f"stopped after step 4, saved; go on with: {again}" in result.stderr
    (tmp_path / "run").rename(tmp_path / "moved")
    assert call("train", tmp_path / "moved", "--resume").exit_code == 0
    assert json.loads((tmp_path / "moved" / "result.json").read_text())["step"] == 6


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_stops_the_run(path, monkeypatch, error):
    from zoengine.trainer import checkpoint

    def full(*args):
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    result = call("train", path, "run.save_every=2", "method.name=mezo-momentum")
    assert result.exit_code == errors.STOPPED
    assert "No space left on device" in result.stderr.splitlines()[-1]
    assert not [p for p in (path.parent / "run").iterdir() if p.name.startswith(("checkpoint", "_incomplete"))]


def test_tasks():
    listed = call("tasks").output
    assert all(name in listed for name in catalog.names())
    one = call("tasks", "sst2").output
    assert "sentence, label" in one and "hub:nyu-mll/glue:sst2" in one
    mistake(call("tasks", "sst3"), "'sst5'")


def test_methods():
    result = call("methods", "mezo-momentum")
    assert result.exit_code == 0
    for word in ("beta1", "0.9", "zo_eps", "required", "gaussian | rademacher"):
        assert word in result.output
    result = call("methods")
    assert result.exit_code == 0 and "mezo-momentum" in result.output and "momentum" in result.output
    mistake(call("methods", "mezzo"), "'mezo'")


def test_version():
    assert call("--version").output.strip() == f"zoengine {zoengine.__version__}"


def test_doctor_finds_a_working_machine(monkeypatch):
    monkeypatch.setattr(doctor, "_BUDGET", 0.001)
    result = call("doctor")
    assert result.exit_code == 0, result.output
    assert "same bits as the reference" in " ".join(result.output.split())
    assert torch.__version__ in result.output and "reference" in result.output


def test_doctor_finds_an_extension_that_does_not_load(monkeypatch):
    from zoengine.ops import extension

    monkeypatch.setattr(doctor, "_BUDGET", 0.001)
    monkeypatch.setattr(extension, "build_info", lambda: {"built": False, "reason": "undefined symbol"})
    for present, code in ((None, 0), (object(), 1)):
        monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name, present=present: present)
        result = call("doctor")
        assert result.exit_code == code and "undefined symbol" in result.output


def test_doctor_finds_a_wrong_bit(monkeypatch):
    from zoengine.ops import reference

    backend = next((name for name, b in ops.backends().items() if b.available and name != "reference"), None)
    if backend is None:
        pytest.skip("no backend but the reference is available")
    original = reference.noise_fill_

    def wrong(out, *args):
        original(out, *args)
        out[0] += 0.25

    monkeypatch.setattr(doctor, "_BUDGET", 0.001)
    monkeypatch.setattr(reference, "noise_fill_", wrong)
    result = call("doctor")
    assert result.exit_code == 1
    assert "noise_fill_ differs" in " ".join(result.output.split())


def without(*modules):
    """A Python process in which ``modules`` cannot be found, running the command line with the given words."""
    code = (
        f"import importlib.util as u, sys; find = u.find_spec; blocked = {modules!r}\n"
        "u.find_spec = lambda name, *a: None if name in blocked else find(name, *a)\n"
        "for name in blocked: sys.modules[name] = None\n"
        "from zoengine.cli import main; main()"
    )
    return lambda *words: subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=120, cwd=os.getcwd()
    )


def test_without_the_extra(path):
    run = without("transformers", "accelerate", "peft", "safetensors", "matplotlib", "jinja2")
    found = run("train", path)
    assert found.returncode == 2
    assert found.stderr.strip().endswith("pip install 'zoengine[hf]'") and "transformers" in found.stderr
    assert run("methods").returncode == 0


def test_without_the_command_lines_own_packages():
    found = without("typer", "rich")("methods")
    assert found.returncode == 1
    assert found.stderr.strip() == "zoengine: the command line needs typer, rich: pip install 'zoengine[hf]'"
