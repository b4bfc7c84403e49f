"""Sweeps: which points there are, what is run, resumed, shared and refused, and what the table says."""

import copy
import gc
import io
import json
import math
import signal
import threading
from pathlib import Path

import pytest
import yaml

pytest.importorskip("transformers")
pytest.importorskip("peft")

from typer.testing import CliRunner

from zoengine import config
from zoengine.cli.app import app
from zoengine.config import ConfigError
from zoengine.evaluation import NonFiniteLossError
from zoengine.sweep import points, run, table
from zoengine.sweep.grid import load
from zoengine.sweep.run import sweep
from zoengine.trainer import run as runs
from zoengine.trainer.run import RunError

pytestmark = pytest.mark.usefixtures("one_thread")

SWEEP = {"method.lr": [1e-3, 1e-2], "run.seed": [3, 4]}
NAMES = ["lr0.001_seed3", "lr0.01_seed3", "lr0.001_seed4", "lr0.01_seed4"]


def written(folder, tiny_run, **sections):
    """A file with a sweep, for the output folder ``folder``/out."""
    values = copy.deepcopy(tiny_run)
    values["run"] |= {"output_dir": str(folder / "out"), "steps": 4, **sections.pop("run", {})}
    del values["method"]["lr"], values["run"]["seed"]
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**values, "sweep": SWEEP, **sections}))
    return path


@pytest.fixture(scope="module", autouse=True)
def imported_for_good():
    """accelerate collects garbage before every run: let it not go through all that has been imported each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def no_pages():
    """The runs' own plots and pages take longer than the training here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.report, "plot", lambda *args, **kwargs: None)
        patch.setattr(runs.report, "write_html", lambda *args, **kwargs: None)
        yield


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory):
    """(the file, what the sweep returned, what it wrote to the stream)."""
    path, stream = written(tmp_path_factory.mktemp("sweep"), tiny_run), io.StringIO()
    return path, sweep(load(path), stream=stream), stream.getvalue()


def test_the_points_are_the_grid_one_seed_after_the_other(finished):
    plan = load(finished[0])
    assert [point.name for point in plan.points] == NAMES
    assert [(p.config.method["lr"], p.config.run.seed, p.config.method["seed"]) for p in plan.points] == [
        (1e-3, 3, 3), (1e-2, 3, 3), (1e-3, 4, 4), (1e-2, 4, 4)
    ]  # fmt: skip
    assert plan.points[0].config.run.output_dir == str(plan.folder / NAMES[0])


def test_a_key_on_the_command_line_is_held_and_its_folders_are_those_of_the_whole_grid(finished):
    plan = load(finished[0], ["run.seed=4"])
    assert [point.name for point in plan.points] == NAMES[2:]
    assert [p.name for p in load(finished[0], ["sweep.run.seed=[4]"]).points] == NAMES[2:]
    assert [p.name for p in load(finished[0], ["sweep.run.seed=null"]).points] == ["lr0.001", "lr0.01"]


def test_a_point_is_an_ordinary_run(finished, tmp_path):
    path, found, _ = finished
    assert (found.finished, found.failed, found.left, found.signal) == (4, 0, 0, None)
    values = yaml.safe_load(path.read_text())
    del values["sweep"]
    values["method"]["lr"], values["run"]["seed"], values["run"]["output_dir"] = 1e-2, 4, str(tmp_path / "alone")
    alone = runs.train(config.check(values))
    result = json.loads((found.folder / NAMES[3] / "result.json").read_text())
    assert result["after"] == alone.after and result["before"] == alone.before
    assert alone.after != alone.before
    same = "model/model.safetensors"
    assert (found.folder / NAMES[3] / same).read_bytes() == (tmp_path / "alone" / same).read_bytes()


def test_progress_estimates_the_whole_sweep(finished):
    lines = [line for line in finished[2].splitlines() if "lr0" in line]
    assert len(lines) == 8
    assert lines[0] == f"point 1 of 4: {NAMES[0]}", "nothing to estimate by"
    assert lines[1].startswith(f"1/4  {NAMES[0]}  accuracy ") and lines[1].endswith(" left")
    assert lines[-1].startswith(f"4/4  {NAMES[3]}") and lines[-1].endswith("00:00 left")


def test_the_estimate_goes_by_what_was_finished_since_the_start(finished, monkeypatch):
    plan, done, clock = load(finished[0]), set(NAMES[:2]), [100.0]
    monkeypatch.setattr(points, "done", lambda point: point.name in done)
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    progress = run._Progress(plan, stream)
    done.add(NAMES[2])  # by this process or another
    clock[0] += 10
    progress.begin(plan.points[3])
    assert stream.getvalue() == f"point 4 of 4: {NAMES[3]}  00:10 left\n"


def test_the_table_and_the_plot(finished):
    _, found, _ = finished
    text, result = found.table.read_text(), json.loads((found.folder / "sweep.json").read_text())
    assert [row["setting"] for row in result["rows"]] == [{"method.lr": 1e-3}, {"method.lr": 1e-2}]
    assert [record["point"] for record in result["records"]] == NAMES
    for row, lr in zip(result["rows"], (1e-3, 1e-2), strict=True):
        records = [r for r in result["records"] if r["values"]["method.lr"] == lr]
        assert row["score"]["values"] == [r["after"]["accuracy"] for r in records]
        assert row["score"]["std"] == pytest.approx(abs(records[0]["score"] - records[1]["score"]) / math.sqrt(2))
        assert (row["seeds"], row["failed"], row["forward_passes"], row["steps"]) == (2, 0, 8, 4)
    best = [row for row in result["rows"] if row["best"]]
    assert len(best) == 1
    keys = [(-row["evaluation"]["mean"], row["evaluation_loss"]["mean"]) for row in result["rows"]]
    assert result["rows"].index(best[0]) == keys.index(min(keys))
    digest = result["records"][0]["facts"]["splits"]["test"]["hash"]
    for words in ("| method.lr | untrained | accuracy (test) | accuracy (eval) | loss |", "± ", digest[:12], "**"):
        assert words in text
    assert (found.folder / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_finished_points_are_not_run_again_and_lost_ones_are(finished, monkeypatch):
    path, found, _ = finished
    before = json.loads((found.folder / "sweep.json").read_text())["records"]
    (found.folder / NAMES[1] / "result.json").unlink()
    ran, train = [], runs.train
    monkeypatch.setattr(run, "train", lambda c, **how: ran.append((c.run.output_dir, how)) or train(c, **how))
    again = sweep(load(path), stream=io.StringIO())
    assert [Path(folder).name for folder, _ in ran] == [NAMES[1]]
    assert ran[0][1]["overwrite"] and not ran[0][1]["resume"], "there was no checkpoint"
    assert again.finished == 4
    for old, new in zip(before, json.loads((found.folder / "sweep.json").read_text())["records"], strict=True):
        assert (old["after"], old["curve"]) == (new["after"], new["curve"])


def test_a_sweep_of_another_configuration_is_refused_and_names_the_keys(finished):
    path, found, _ = finished
    with pytest.raises(RunError, match=r"method\.zo_eps, run\.steps"):
        sweep(load(path, ["method.zo_eps=1e-2", "run.steps=5"]), stream=io.StringIO())
    assert sweep(load(path, ["run.log_every=3"]), stream=io.StringIO()).finished == 4, "no result depends on it"
    assert found.finished == 4


def test_an_interrupted_point_goes_on_from_its_checkpoint(tiny_run, tmp_path, monkeypatch, finished):
    path = written(tmp_path, tiny_run, run={"save_every": 2})
    step, evaluate = runs.ZOTrainer.training_step, []

    def interrupted(self, *args, **kwargs):
        evaluate.append(1)
        if len(evaluate) == 7:  # the third step of the second point
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(runs.ZOTrainer, "training_step", interrupted)
    found = sweep(load(path, ["run.seed=3"]), stream=io.StringIO())
    assert (found.signal, found.finished, found.left) == (signal.SIGINT, 1, 1)
    assert "1 of 2 runs are done" in found.table.read_text()
    assert not (found.folder / NAMES[1] / "result.json").exists()
    resumed, train = [], runs.train
    monkeypatch.setattr(run, "train", lambda c, **how: resumed.append(how["resume"]) or train(c, **how))
    found = sweep(load(path, ["run.seed=3"]), stream=io.StringIO())
    assert resumed == [True] and len(evaluate) == 8, "no step was taken twice"
    assert found.finished == 2
    for name in NAMES[:2]:
        one, other = (json.loads((f / name / "result.json").read_text()) for f in (found.folder, finished[1].folder))
        assert one["after"] == other["after"]


def test_a_second_signal_stops_at_once_and_keeps_what_is_done(tiny_run, tmp_path, monkeypatch):
    path, train, calls = written(tmp_path, tiny_run), runs.train, []

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr(run, "train", stopped)
    result = CliRunner().invoke(app, ["sweep", str(path)])
    assert result.exit_code == 130 and "the same command goes on" in result.output
    assert len(json.loads((tmp_path / "out" / "sweep.json").read_text())["records"]) == 1


def test_a_point_that_fails_is_recorded_and_the_sweep_goes_on(tiny_run, tmp_path, monkeypatch):
    path, train, tried = written(tmp_path, tiny_run), runs.train, []

    def failing(settings, **how):
        tried.append(settings.method["lr"])
        if settings.method["lr"] == 1e-3:
            raise NonFiniteLossError("step 2: the loss is nan")
        return train(settings, **how)

    monkeypatch.setattr(run, "train", failing)
    plan = load(path, ["run.seed=3"])
    found = sweep(plan, stream=io.StringIO())
    assert (found.finished, found.failed, found.left) == (1, 1, 0) and tried == [1e-3, 1e-2]
    text = found.table.read_text()
    assert f"- {NAMES[0]}: step 2: the loss is nan" in text and "1 failed" in text
    assert sweep(plan, stream=io.StringIO()).failed == 1 and len(tried) == 2, "nor is it tried again"
    sweep(plan, overwrite=True, stream=io.StringIO())
    assert len(tried) == 4


def test_a_setting_that_failed_once_is_behind(tiny_run, tmp_path):
    plan = load(written(tmp_path, tiny_run))
    better = [record(p, 0.5, 0.9 if p.values["method.lr"] == 1e-3 else 0.8) for p in plan.points]
    assert [row["best"] for row in table.rows(plan, better)] == [True, False]
    better[0]["error"] = "the loss is nan"
    assert [row["best"] for row in table.rows(plan, better)] == [False, True]


def record(point, score, evaluation):
    values = {"before": 0.5, "score": score, "loss": 1.0, "evaluation": evaluation, "evaluation_loss": 1.0}
    passes = {"steps": 4, "forward_passes": 8, "backward_passes": 0, "seconds": 1.0}
    about = {"error": None, "metric": "f1", "split": "test", "curve": []}
    return {"point": point.name, "values": point.values, **values, **passes, **about}


def test_the_test_data_chooses_nothing(tiny_run, tmp_path):
    plan = load(written(tmp_path, tiny_run))
    better_in_test = [record(p, *((0.9, 0.6) if p.values["method.lr"] == 1e-3 else (0.7, 0.8))) for p in plan.points]
    rows = table.rows(plan, better_in_test)
    assert [row["best"] for row in rows] == [False, True]
    about = {"splits": {}, "trainable_parameters": 1, "dtype": "float32", "device": "cpu", "backend": "cpp"}
    for one in better_in_test:
        one["facts"] = about
    assert "the test data chose nothing" in table.markdown(plan, rows, better_in_test)
    for one in better_in_test:
        one["split"] = "eval"
    text = table.markdown(plan, table.rows(plan, better_in_test), better_in_test)
    assert "optimistic" in text and "test data" not in text


def test_each_method_has_its_own_best(tiny_run, tmp_path):
    grid = {"method.name": ["mezo", "mezo-momentum"], "method.lr": [1e-3, 2e-3, 3e-3]}
    plan = load(written(tmp_path, tiny_run, sweep=grid))
    middle = {1e-3: 0.5, 2e-3: 0.7, 3e-3: 0.6}
    last = {1e-3: 0.8, 2e-3: 0.9, 3e-3: 0.95}
    of = {"mezo": middle, "mezo-momentum": last}
    rows = table.rows(plan, [record(p, 0.5, of[p.values["method.name"]][p.values["method.lr"]]) for p in plan.points])
    best = {(row["setting"]["method.name"], row["setting"]["method.lr"]) for row in rows if row["best"]}
    assert best == {("mezo", 2e-3), ("mezo-momentum", 3e-3)}
    assert [row["at_edge"] for row in rows if row["best"]] == [[], ["method.lr"]]


def test_two_processes_share_a_folder(tiny_run, tmp_path, monkeypatch, finished):
    """As two processes do, since each open lock file has its own lock: no point is run twice, and none is left."""
    path, train, ran = written(tmp_path, tiny_run), runs.train, []
    barrier = threading.Barrier(2, timeout=60)
    first_of = threading.local()

    def counted(settings, **how):
        ran.append(Path(settings.run.output_dir).name)
        if not getattr(first_of, "passed", False):
            first_of.passed = True
            barrier.wait()  # both hold a point now
        with training:
            return train(settings, **how)

    training = threading.Lock()  # torch's global state is one process's
    monkeypatch.setattr(run, "train", counted)
    monkeypatch.setattr(runs.StopOnSignal, "listening", lambda self: training_only())
    found, threads = [], []
    for _ in range(2):
        threads.append(threading.Thread(target=lambda: found.append(sweep(load(path), stream=io.StringIO()))))
        threads[-1].start()
    for thread in threads:
        thread.join(120)
    assert sorted(ran) == sorted(NAMES)
    assert max(f.finished for f in found) == 4
    for name in NAMES:
        one, other = (
            json.loads((f / name / "result.json").read_text()) for f in (tmp_path / "out", finished[1].folder)
        )
        assert one["after"] == other["after"]


def training_only():
    """No signals outside of the main thread."""
    from contextlib import nullcontext

    return nullcontext()


def test_a_point_that_another_process_holds_is_left_to_it(tiny_run, tmp_path):
    plan = load(written(tmp_path, tiny_run), ["run.seed=3"])
    with points.claimed(plan.points[0]) as mine:
        assert mine
        found = sweep(plan, stream=io.StringIO())
        assert (found.finished, found.left) == (1, 1) and not plan.points[0].folder.exists()
        with pytest.raises(RunError, match="another process"):
            sweep(plan, overwrite=True, stream=io.StringIO())
    assert sweep(plan, stream=io.StringIO()).finished == 2


@pytest.mark.parametrize(
    ("section", "overrides", "words"),
    [
        (None, [], "has no sweep"),
        ({}, [], "has no sweep"),
        ([1], [], "lists of values"),
        ({"method.lr": 1e-3}, [], "method.lr"),
        ({"method.lr": []}, [], "list of values"),
        ({"lr": [1]}, [], "'lr'"),
        ({"method.lr": [1e-3, 1e-3]}, [], "twice"),
        ({"method.lrr": [1e-3]}, ["method.lr=1"], "lrr"),
        ({"method.lr": [1e-3, "x"]}, [], "lrx: method"),
        ({"method.lr": [1.0000001, 1.0000002]}, [], "folder"),
        ({"run.output_dir": ["a", "b"]}, ["method.lr=1"], "run.output_dir"),
        ({"method.lr": [1e-3, 1e-2]}, ["data.eval=null", "data.num_eval=0"], "never by the test"),
        ({"method.lr": [1e-3]}, ["run.push_to_hub=me/it"], "run.push_to_hub"),
    ],
)
def test_what_cannot_be_swept(tiny_run, tmp_path, section, overrides, words):
    path = written(tmp_path, tiny_run, sweep=section)
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert words in str(caught.value)


def test_the_command(finished):
    path, found, _ = finished
    result = CliRunner().invoke(app, ["sweep", str(path), "run.seed=3"])
    assert result.exit_code == 0, result.output
    assert str(found.table) in result.output and "| 0.001 |" in result.output.replace("**", "").replace(" †", "")
    wrong = CliRunner().invoke(app, ["sweep", str(path), "--row", "x"])
    assert wrong.exit_code == 2 and "no row 'x'" in wrong.output
    sweep(load(path), stream=io.StringIO())
