"""The scripts that repeat figures of papers: each runs quickly, and what it finds agrees with exact mathematics."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench/ is not installed

from bench import conmezo_search, conmezo_synthetic, loren_figure, quadratic


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _run(module, out, *arguments):
    pytest.importorskip("matplotlib")
    assert module.main(["--quick", "--out", str(out), *arguments]) == 0
    assert out.with_suffix(".png").stat().st_size > 10_000
    result = json.loads(out.read_text())
    assert result["command"].startswith(f"python -m {module.__name__} --quick")
    assert result["environment"]["torch"] == torch.__version__ and "commit" in result["environment"]
    return result


def test_conmezo_on_the_quadratic(tmp_path):
    result = _run(conmezo_synthetic, tmp_path / "conmezo.json")
    assert [row["setting"] for row in result["summary"]] == list(conmezo_synthetic.SETTINGS)
    powers, tuned, _ = result["summary"]
    assert powers["mezo_lr"] in (1e-3, 1e-4) and powers["mezo_tuned_lr"] == tuned["mezo_lr"]  # 1e-2 diverges
    assert powers["mezo_tuning_alone"] > tuned["mezo_tuning_alone"] == pytest.approx(1)
    for run in result["runs"]:
        records = result["steps"] // run["every"]
        assert len(run["conmezo"]) == records + 1 <= len(run["mezo"])
        assert run["conmezo"][0] == run["mezo"][0]  # one start for both
        assert run["conmezo_final"] < run["conmezo"][0] and run["mezo_final"] < run["mezo"][0]
        assert run["mezo_final"] == pytest.approx(run["mezo_expected_final"], rel=0.15)
        if run["speedup"] is not None:  # what it says, from the curves
            reached = run["speedup"] * result["steps"] / run["every"]
            assert run["mezo"][math.ceil(reached)] <= run["conmezo_final"] <= run["mezo"][math.ceil(reached) - 1]


def test_errors_of_estimates_reach_their_limits(tmp_path):
    result = _run(loren_figure, tmp_path / "loren.json")
    limits = loren_figure.limits()
    assert len(result["rows"]) == len(loren_figure.FUNCTIONS) * len(loren_figure.ESTIMATORS)
    assert all(0 < row["cosine"] < 0.1 for row in result["rows"])
    for estimator in loren_figure.ESTIMATORS:  # with a small zo_eps the limits hold whatever the function
        rows = [row for row in result["rows"] if row["estimator"] == estimator]
        error = sum(row["error"] for row in rows) / len(rows)
        deviation = math.sqrt(sum(row["standard_error"] ** 2 for row in rows)) / len(rows)
        # LOREN's covariance takes most of one direction in forty away: (39/40)^2.
        expected = limits.get(estimator, 0.95 * limits["leave-one-out, 4 directions"])
        assert deviation < 0.06 * expected and abs(error - expected) < 3 * deviation, (estimator, error, expected)


def test_expectation_is_the_mean_over_many_runs():
    problem, x = quadratic.Quadratic(1.0, 1e3), quadratic.start(5)
    weights, generator = problem.weights(), torch.Generator().manual_seed(1)
    points = x.expand(400, -1).clone()
    for _ in range(20):
        u = torch.randn(points.shape, generator=generator, dtype=torch.float64)
        points -= 3e-3 * (2 * weights * points * u).sum(1, keepdim=True) * u
    sampled = points.square() @ weights
    expected = quadratic.mezo_expectation(problem, x, [3e-3, 1.0], 20, 10)
    assert expected.shape == (2, 3) and expected[0, 0] == pytest.approx(float(x.square() @ weights))
    assert float(sampled.mean()) == pytest.approx(float(expected[0, -1]), abs=4 * float(sampled.std()) / 20)
    assert expected[1, -1] > 1e10


def test_crossing():
    losses = [8.0, 4.0, 1.0]
    assert quadratic.crossing(losses, 10, 9.0) == 0 and quadratic.crossing(losses, 10, 0.5) is None
    assert quadratic.crossing(losses, 10, 4.0) == 10 and quadratic.crossing(losses, 10, 2.0) == pytest.approx(15)


def test_a_run_that_diverges_ends():
    run = quadratic.Run(quadratic.Quadratic(1.0, 1e3), 1, {"lr": 1.0, "cone_theta": 1.2, "cone_beta": 0.9}, 2)
    assert run.until(1000) == math.inf and run.steps < 100


@pytest.mark.parametrize("function", list(loren_figure.FUNCTIONS))
def test_functions_by_hand(function):
    x = torch.tensor([1.0, 3.0, -2.0], dtype=torch.float64)
    by_hand = {"Sphere": 14.0, "Rastrigin": 14.0, "Rosenbrock": 100 * 4 + 0 + 100 * 121 + 4.0}
    assert float(loren_figure.FUNCTIONS[function](x)) == pytest.approx(by_hand[function])


def test_settings_come_from_the_grids():
    assert {tuple(c) for c in conmezo_search.candidates("decade")} == {("lr", "cone_beta", "cone_theta")}
    assert conmezo_synthetic.SETTINGS["paper, powers of ten"].conmezo in conmezo_search.candidates("decade")
    assert conmezo_synthetic.SETTINGS["paper, tuned"].conmezo in conmezo_search.candidates("fine")
