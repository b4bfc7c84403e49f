"""Comparisons: what is run with how many passes, what is kept and refused, and what the table says."""

import copy
import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers
from typer.testing import CliRunner

import zoengine
from zoengine import config, methods
from zoengine.cli.app import app
from zoengine.compare import table
from zoengine.compare.cells import Cell, Job
from zoengine.compare.config import check, load
from zoengine.compare.memory import extra_bytes
from zoengine.compare.run import compare
from zoengine.config import ConfigError
from zoengine.trainer import run as runs
from zoengine.trainer.run import RunError

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = [
    {"name": "mezo", "lrs": [1e-3, 3e-3, 1e-2]},
    {"name": "mezo", "label": "mezo-4", "lrs": [1e-3], "n_queries": 4},
    {"name": "ft-adamw", "lrs": [1e-2]},
]


def values(tiny_run, folder, **run):
    result = {key: copy.deepcopy(tiny_run[key]) for key in ("model", "data", "task")}
    result["methods"] = copy.deepcopy(METHODS)
    result["run"] = {
        "output_dir": str(folder), "budget": 18, "seeds": [3, 4], "evaluations": 3, "batch_size": 4, **run
    }  # fmt: skip
    return result


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory):
    """(folder, what was written to the stream) of a finished comparison."""
    folder, stream = tmp_path_factory.mktemp("compare") / "out", io.StringIO()
    compare(check(values(tiny_run, folder)), stream=stream)
    return folder, stream.getvalue()


def records(folder):
    return {path.name: json.loads(path.read_text()) for path in sorted((folder / "cells").iterdir())}


def test_every_method_gets_the_same_forward_passes(finished):
    folder, lines = finished
    found = records(folder)
    best = next(r["lr"] for r in json.loads((folder / "comparison.json").read_text())["rows"] if r["label"] == "mezo")
    assert set(found) == {
        "mezo_lr0.001_seed3.json", "mezo_lr0.003_seed3.json", "mezo_lr0.01_seed3.json", f"mezo_lr{best:g}_seed4.json",
        "mezo-4_lr0.001_seed3.json", "mezo-4_lr0.001_seed4.json",
        "ft-adamw_lr0.01_seed3.json", "ft-adamw_lr0.01_seed4.json",
    }  # fmt: skip
    steps = {name: (r["steps"], r["forward_passes"], r["backward_passes"]) for name, r in found.items()}
    assert steps["mezo_lr0.001_seed3.json"] == (9, 18, 0)
    assert steps["mezo-4_lr0.001_seed3.json"] == (2, 16, 0), "a third step would exceed the budget"
    assert steps["ft-adamw_lr0.01_seed4.json"] == (18, 18, 18)
    points = [point["forward_passes"] for point in found["mezo_lr0.001_seed3.json"]["curve"]]
    assert points == [0, 6, 12, 18]
    assert [point["forward_passes"] for point in found["mezo-4_lr0.001_seed3.json"]["curve"]] == [0, 8, 16]
    assert all(r["final"]["n"] == 22 and r["split"] == "test" and r["seconds_per_step"] > 0 for r in found.values())
    printed = lines.strip().splitlines()
    assert len(printed) == 8 and printed[0].startswith("1/8  mezo  lr 0.001  seed 3  accuracy")
    assert printed[-1].endswith("00:00 left")


def test_a_cell_is_the_run_of_its_configuration(finished, tiny_run, tmp_path):
    """Whatever ran before it in the same process: the scores are those of a plain run."""
    folder, _ = finished
    for name, passes, seed in (("mezo_lr0.01_seed3.json", 9, 3), ("ft-adamw_lr0.01_seed4.json", 18, 4)):
        record = records(folder)[name]
        settings = copy.deepcopy(tiny_run)
        settings["method"] = {"name": record["method"], "lr": record["lr"]}
        settings["run"] = {"output_dir": str(tmp_path / name), "steps": passes, "batch_size": 4, "seed": seed}
        outcome = runs.train(config.check(settings))
        assert record["final"] == outcome.after and record["before"]["test"] == outcome.before


def test_the_table_and_the_plot(finished):
    folder, _ = finished
    text = (folder / "comparison.md").read_text()
    result = json.loads((folder / "comparison.json").read_text())
    rows = {row["label"]: row for row in result["rows"]}
    assert list(rows) == ["mezo", "mezo-4", "ft-adamw"]
    assert rows["mezo"]["seeds"] == 2 and len(rows["mezo"]["accuracy"]["values"]) == 2
    assert rows["mezo"]["at_edge"] == (rows["mezo"]["lr"] != 3e-3) == ("†" in text)
    assert not rows["mezo-4"]["at_edge"] and not rows["ft-adamw"]["at_edge"]
    grid = {cell["lr"]: cell["loss"] for cell in rows["mezo"]["grid"]}
    assert grid[rows["mezo"]["lr"]] == min(grid.values())
    for words in ("18 forward passes", "test data (22 examples)", "seeds 4", "| (untrained) |", "| ft-adamw | 0.01 |"):
        assert words in text
    weights = rows["mezo"]["weight_bytes"]
    assert rows["mezo"]["extra_bytes"] < 1000, "a few numbers"
    assert rows["ft-adamw"]["extra_bytes"] == pytest.approx(3 * weights, rel=0.01), "gradient and two averages"
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "gpu" not in str(folder) and result["facts"]["noise_version"] == 1


def test_finished_cells_are_not_run_again(finished, tiny_run, monkeypatch):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    lost = folder / "cells" / "mezo-4_lr0.001_seed4.json"
    expected = json.loads(lost.read_text())
    lost.unlink()
    (folder / "cells" / "mezo_lr0.001_seed3.json.incomplete").write_text("{")
    ran, run = [], Job.run
    monkeypatch.setattr(Job, "run", lambda self, cell: ran.append(cell.file) or run(self, cell))
    settings = values(tiny_run, folder)
    settings["methods"].append({"name": "ft-sgd", "lrs": [1e-2]})  # more methods may follow
    compare(check(settings), stream=io.StringIO())
    assert ran == ["ft-sgd_lr0.01_seed3.json", lost.name, "ft-sgd_lr0.01_seed4.json"]
    again = json.loads(lost.read_text())
    assert again["final"] == expected["final"] and again["curve"] == expected["curve"]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path != lost)
    assert not list((folder / "cells").glob("*.incomplete"))
    for path in (folder / "cells").glob("ft-sgd*"):
        path.unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v["run"].update(budget=20), r"budget"),
        (lambda v: v["run"].update(batch_size=2), r"run\.batch_size"),
        (lambda v: v["methods"][0].update(zo_eps=1e-2), r"method\.zo_eps"),
        (lambda v: v["data"].update(num_eval=5), r"data\.num_eval.*splits\.eval"),
    ],
)
def test_cells_of_another_configuration_are_refused(finished, tiny_run, change, words):
    settings = values(tiny_run, finished[0])
    change(settings)
    with pytest.raises(RunError, match=f"run with other values of .*{words}.*--overwrite"):
        compare(check(settings), stream=io.StringIO())


def test_starting_over_removes_only_what_a_comparison_left(tiny_run, tmp_path):
    settings = values(tiny_run, tmp_path, budget=2, seeds=[0], evaluations=1)
    settings["methods"] = [{"name": "ft-sgd", "lrs": [1e-2]}]
    compare(check(settings), stream=io.StringIO())
    (tmp_path / "notes.txt").write_text("mine")
    settings["run"]["budget"] = 1
    compare(check(settings), overwrite=True, stream=io.StringIO())
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert records(tmp_path)["ft-sgd_lr0.01_seed0.json"]["forward_passes"] == 1


def test_a_diverged_cell_is_recorded_and_not_chosen(tiny_run, tmp_path, monkeypatch):
    class Exploding(methods.MeZO):
        name = "exploding"

        def step(self, closure):
            loss = super().step(closure)
            if self.fields.lr > 1 and self.step_number == 2:
                self.arena.buffers[0].fill_(float("nan"))
            return loss

    monkeypatch.setitem(methods._METHODS, "exploding", Exploding)
    settings = values(tiny_run, tmp_path, seeds=[3], evaluations=1, budget=8)
    settings["methods"] = [
        {"name": "exploding", "lrs": [2, 1e-3]},
        {"name": "mezo", "label": "hopeless", "lrs": [1e-3], "zo_eps": 3e38},
    ]
    path = compare(check(settings), stream=io.StringIO())
    rows = {row["label"]: row for row in json.loads((tmp_path / "comparison.json").read_text())["rows"]}
    assert rows["exploding"]["lr"] == 1e-3
    assert [bool(cell["diverged"]) for cell in rows["exploding"]["grid"]] == [True, False]
    assert "loss nan in step 2" in rows["exploding"]["grid"][0]["diverged"]
    assert rows["hopeless"]["lr"] is None
    assert "every learning rate diverged" in path.read_text()
    kept = records(tmp_path)
    assert (kept["exploding_lr2_seed3.json"]["steps"], kept["exploding_lr2_seed3.json"]["final"]) == (2, None)
    plain = copy.deepcopy(tiny_run)
    plain["method"] = {"lr": 1e-3}
    plain["run"] = {"output_dir": str(tmp_path / "x"), "steps": 4, "batch_size": 4, "seed": 3}
    expected = runs.train(config.check(plain)).after
    assert kept["exploding_lr0.001_seed3.json"]["final"] == expected, "weights that had become NaN are set back"


def test_nothing_runs_before_every_method_has_been_built(tiny_run, tmp_path, monkeypatch):
    class Fussy(methods.MeZO):
        name = "fussy"

        def __init__(self, *args, **fields):
            raise methods.FieldError("this model does not suit fussy")

    monkeypatch.setitem(methods._METHODS, "fussy", Fussy)
    forwards = []
    monkeypatch.setattr(
        transformers.LlamaForCausalLM, "forward", lambda *args, **kwargs: forwards.append(1), raising=True
    )
    settings = values(tiny_run, tmp_path)
    settings["methods"].append({"name": "fussy", "lrs": [1.0]})
    with pytest.raises(methods.FieldError, match="does not suit"):
        compare(check(settings), stream=io.StringIO())
    assert not forwards and not records(tmp_path)


def test_a_method_that_replaces_parameters_gets_a_fresh_model(tiny_run, tmp_path, monkeypatch):
    class Replacing(methods.MeZO):
        name = "replacing"

        def __init__(self, model, **fields):
            model.register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
            super().__init__(model, **fields)

    monkeypatch.setitem(methods._METHODS, "replacing", Replacing)
    settings = values(tiny_run, tmp_path, seeds=[3], budget=4, evaluations=1)
    settings["methods"] = [{"name": "replacing", "lrs": [1e-3]}, {"name": "mezo", "lrs": [1e-3]}]
    job = Job(check(settings), lambda passes: None)
    first, second = (Cell(entry, 1e-3, 3) for entry in job.plan.entries)
    job.run(first)
    assert "extra" in dict(job._model.named_parameters())
    job.run(second)
    assert "extra" not in dict(job._model.named_parameters())


def test_every_method_goes_through_a_comparison(tiny_run, tmp_path):
    """And leaves the model as it was for the next: the same method gives the same scores at the end as at first."""
    settings = values(tiny_run, tmp_path, seeds=[3], budget=8, evaluations=1)
    names = [name for name in methods.available() if not name.startswith("rozo")]  # those train adapters alone
    settings["methods"] = [{"name": name, "lrs": [1e-3]} for name in names]
    settings["methods"] += [{"name": "mezo", "label": "again", "lrs": [1e-3]}]
    for entry in settings["methods"]:
        entry |= {"lr_full": 1e-3} if entry["name"] == "mezo-svrg" else {}
        entry |= {"rank": 4} if entry["name"].startswith("subzero") else {}
    compare(check(settings), stream=io.StringIO())
    rows = {row["label"]: row for row in json.loads((tmp_path / "comparison.json").read_text())["rows"]}
    assert list(rows) == [*names, "again"]
    assert all(row["lr"] is not None and row["split"] == "test" for row in rows.values())
    over = {label for label, row in rows.items() if row["forward_passes"] > 8}
    assert over <= {"mezo-svrg"}, "by a pass over all data"
    finetuner = rows["zo-finetuner"]
    assert (finetuner["steps"], finetuner["forward_passes"]) == (3, 7), "its first step takes one more, so no fourth"
    assert rows["again"]["loss"] == rows["mezo"]["loss"] and rows["again"]["curve"] == rows["mezo"]["curve"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v["run"].update(seeds=[1, 1]), "seed is given twice"),
        (lambda v: v["run"].update(seeds=[]), "run.seeds"),
        (lambda v: v["run"].update(bugdet=1), "did you mean 'budget'"),
        (lambda v: v["run"].pop("budget"), "run.budget is missing"),
        (lambda v: v["data"].update(eval=None, num_eval=0), "data.num_eval"),
        (lambda v: v.update(methods=[]), "methods"),
        (lambda v: v["methods"].append({"name": "mezo", "lrs": [1.0]}), "'mezo' stands there twice"),
        (lambda v: v["methods"][1].update(name="mzo"), r"methods\[1\] \(mzo\).*'mezo'"),
        (lambda v: v["methods"][1].pop("name"), r"methods\[1\].name"),
        (lambda v: v["methods"][1].update(label="a/b"), "label names files"),
        (lambda v: v["methods"][2].update(zo_eps=1e-3), r"methods\[2\] \(ft-adamw\).*no field 'zo_eps'"),
        (lambda v: v["methods"][0].update(lrs=[]), r"methods\[0\] \(mezo\): lrs"),
        (lambda v: v["methods"][0].update(lrs=[-1.0]), r"methods\[0\] \(mezo\).*lr must be at least 0"),
        (lambda v: v["methods"][0].update(lr=1e-3), "lr and seed are not given there"),
        (lambda v: v["methods"][1].update(n_queries=10), "one step takes 20 forward passes"),
    ],
)
def test_mistakes_are_found_before_anything_runs(tiny_run, tmp_path, change, words):
    settings = values(tiny_run, tmp_path)
    change(settings)
    with pytest.raises(ConfigError, match=words):
        check(settings)


def test_a_method_with_a_schedule_of_its_own_knows_the_steps(tiny_run, tmp_path, monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Scheduled(methods.Fields):
        steps: int = 0

    class Warming(methods.MeZO):
        name, Fields = "warming", Scheduled

    monkeypatch.setitem(methods._METHODS, "warming", Warming)
    settings = values(tiny_run, tmp_path)
    settings["methods"] = [
        {"name": "warming", "lrs": [1.0]},
        {"name": "warming", "label": "own", "lrs": [1.0], "steps": 4},
    ]
    plan = check(settings)
    assert [entry.configs[1.0].method["steps"] for entry in plan.entries] == [9, 4]
    assert [entry.configs[1.0].run.steps for entry in plan.entries] == [9, 9]


def test_the_comparison_that_comes_along_has_every_method():
    plan = load(Path(__file__).parent.parent / "configs" / "compare.yaml")
    elsewhere = {"zo-finetuner", *(name for name in methods.available() if name.startswith("rozo"))}
    assert {entry.name for entry in plan.entries} == set(methods.available()) - elsewhere
    assert len(plan.config.run.seeds) == 3 and all(len(entry.configs) > 1 for entry in plan.entries)


def test_choosing_a_learning_rate():
    def record(lr, accuracy, loss, diverged=None):
        return {
            "lr": lr,
            "metric": "accuracy",
            "diverged": diverged,
            "curve": [{}, {"accuracy": accuracy, "loss": loss}],
        }

    found = [record(1, 0.7, 0.6), record(2, 0.8, 0.7), record(3, 0.8, 0.65), record(4, 0.9, 0.1, "loss nan")]
    assert table.best(found, "loss") == 1
    assert table.best(found, "metric") == 3
    assert table.best(found[3:], "loss") is None


def test_what_an_optimizer_holds():
    def model(dtype=torch.float32):
        return torch.nn.Linear(1024, 8, bias=False).to(dtype)

    size = 8 * 1024 * 4
    for optimizer, expected in (
        (lambda m: zoengine.MeZO(m, lr=0.1), 0),
        (lambda m: zoengine.MeZO(m, lr=0.1, mode="shadow"), size),
        (lambda m: zoengine.MeZOMomentum(m, lr=0.1), size),
        (lambda m: zoengine.MeZOMomentum(m, lr=0.1, mode="shadow"), 2 * size),
        (lambda m: zoengine.FTSGD(m, lr=0.1), size),
        (lambda m: zoengine.FTAdamW(m, lr=0.1), 3 * size),
    ):
        m = model()
        built = optimizer(m)
        built.step(lambda m=m: m(torch.ones(1, 1024)).sum())
        assert expected <= extra_bytes(built, m) < expected + 1000


def test_the_command_line(tiny_run, tmp_path):
    settings = values(tiny_run, tmp_path / "out", budget=4, seeds=[1], evaluations=1)
    (tmp_path / "compare.yaml").write_text(json.dumps(settings))
    call = ["compare", str(tmp_path / "compare.yaml")]
    result = CliRunner().invoke(app, [*call, "run.budget=3"])
    assert result.exit_code == 2 and "one step takes 8 forward passes" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    result = CliRunner().invoke(app, [*call, "methods=[{name: ft-sgd, lrs: [0.1]}]"])
    assert result.exit_code == 0, result.output
    assert "| ft-sgd | 0.1 |" in result.stdout and "comparison.png" in result.stdout
    result = CliRunner().invoke(app, [*call, "methods=[{name: ft-sgd, lrs: [0.1]}]", "run.batch_size=1"])
    assert result.exit_code == 2 and "run.batch_size" in result.stderr
