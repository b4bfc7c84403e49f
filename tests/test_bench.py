"""The benchmark harness: rows, bytes, baselines and what is compared with what. No timing is asserted."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench/ is not installed

from bench import baselines, cases, drift, kernels, memory, plot, rows, run, step, table, timing, update_cases, updates
from bench.environment import describe
from zoengine import MeZO, MeZOMomentum, ops

CPU = torch.device("cpu")
ENVIRONMENT = describe(CPU)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost more than they bring on a few thousand elements, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Bytes per element by hand: P = 4 or 2, fp32 states 4.
@pytest.mark.parametrize(
    ("case", "per_element"),
    [
        (cases.Case("copy", "fp32"), 8),
        (cases.Case("copy", "fp16"), 4),
        (cases.Case("normal_add", "fp32", 1), 16),
        (cases.Case("normal_add", "bf16", 4), 32),
        (cases.Case("noise_fill", "fp32"), 4),
        (cases.Case("noise_fill", "bf16", noise="rademacher"), 2),
        (cases.Case("add_noise", "fp32", 1), 8),
        (cases.Case("add_noise", "bf16", 1), 4),
        (cases.Case("add_noise", "bf16", 4, "rademacher", "stochastic"), 4),
        (cases.Case("add_noise", "fp16", 1, out=True), 4),
        (cases.Case("add_noise", "fp16", 1, decay=True), 4),
        (cases.Case("add_noise", "bf16", 1, states=1), 8),
        (cases.Case("add_noise", "fp32", 1, states=2), 16),
        (cases.Case("segment_stats", "bf16"), 2),
        (cases.Case("segment_dot", "bf16"), 4),
        (cases.Case("segment_dot_noise", "fp32"), 4),
    ],
    ids=lambda value: value.name if isinstance(value, cases.Case) else "",
)
def test_bytes(case, per_element):
    assert case.bytes(1000) == 1000 * per_element


def test_every_case_has_its_own_name_and_is_measured():
    found = cases.cases(cases.DTYPES)
    assert len({case.name for case in found}) == len(found)
    combinations = {(c.dtype, c.terms, c.noise, c.rounding) for c in found if c.op == "add_noise"}
    for dtype in cases.DTYPES:
        for k in (1, 2, 4):
            for noise in ("gaussian", "rademacher"):
                for rounding in ("nearest",) if dtype == "fp32" else ("nearest", "stochastic"):
                    assert (dtype, k, noise, rounding) in combinations
    assert {c.states for c in found} == {0, 1, 2} and any(c.out for c in found) and any(c.decay for c in found)


def test_cases_do_what_their_names_say():
    work = cases.Workspace("bf16", 5000, CPU)
    before = work.x.clone()
    cases.ours(cases.Case("add_noise", "bf16", 2, "rademacher", "stochastic", out=True), work)()
    wanted = ops.add_noise_(before.clone(), [1, 2], [1e-3, -1e-3], noise="rademacher", rounding="stochastic", sr_seed=1)
    assert torch.equal(work.y, wanted) and torch.equal(work.x, before)
    work = cases.Workspace("fp32", 5000, CPU)
    wanted = ops.add_noise_(work.x.clone(), 1, 1e-3, states=work.states, state_coeffs=[1e-3, -1e-3], decay=1e-6)
    cases.ours(cases.Case("add_noise", "fp32", 1, states=2, decay=True), work)()
    assert torch.equal(work.x, wanted)


def test_today_computes_what_ours_does(monkeypatch):
    monkeypatch.setattr(cases, "SEGMENT", 2000)
    work = cases.Workspace("fp32", 5000, CPU)
    ours = cases.ours(cases.Case("segment_stats", "fp32"), work)()
    total, squares, (low, high) = cases.today(cases.Case("segment_stats", "fp32"), work)()
    assert ours.shape == (3, 4)
    assert math.isclose(float(total), float(ours[:, 0].sum()), rel_tol=1e-4, abs_tol=1e-4)
    assert math.isclose(float(squares), float(ours[:, 1].sum()), rel_tol=1e-5)
    assert (float(low), float(high)) == (float(ours[:, 2].min()), float(ours[:, 3].max()))
    work.y = 2 * work.x
    ours = cases.ours(cases.Case("segment_dot", "fp32"), work)()
    assert math.isclose(float(cases.today(cases.Case("segment_dot", "fp32"), work)()), float(ours.sum()), rel_tol=1e-5)


def test_normal_add_and_the_loop_draw_what_manual_seed_leads_to():
    parameters = [torch.randn(3, 5), torch.randn(70, dtype=torch.bfloat16), torch.randn(2, 2)]
    wanted = [p.clone() for p in parameters]
    torch.manual_seed(11)
    for p in wanted:
        p.add_(torch.normal(0.0, 1.0, size=p.shape, dtype=p.dtype), alpha=-0.25)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    baselines.perturb(parameters, 11, -0.25)
    assert all(torch.equal(a, b) for a, b in zip(parameters, wanted, strict=True))
    generator = torch.Generator().manual_seed(11)
    x = torch.zeros(3, 5)
    baselines.normal_add_(x, 1.0, generator)
    assert torch.equal(x, torch.normal(0.0, 1.0, size=(3, 5), generator=torch.Generator().manual_seed(11)))
    torch.set_rng_state(state)


def test_the_loops_step_is_mezo():
    torch.manual_seed(0)
    start = [torch.randn(4, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)]
    parameters = [p.clone() for p in start]
    seen = []

    def loss():
        seen.append([p.clone() for p in parameters])
        return sum((p * p).sum() for p in parameters)

    gradient = baselines.mezo_step(parameters, loss, 3, lr=0.1, eps=1e-3)
    generator = torch.Generator().manual_seed(3)
    z = [torch.normal(0.0, 1.0, size=p.shape, dtype=p.dtype, generator=generator) for p in start]
    # A quadratic's central difference is exact: 2 theta . z.
    slope = float(sum(2 * (p * n).sum() for p, n in zip(start, z, strict=True)))
    assert math.isclose(gradient, slope, rel_tol=1e-9)
    assert len(seen) == 2
    for k, (p, n) in enumerate(zip(start, z, strict=True)):
        torch.testing.assert_close(seen[0][k], p + 1e-3 * n)
        torch.testing.assert_close(seen[1][k], p - 1e-3 * n)
        torch.testing.assert_close(parameters[k], p - 0.1 * slope * n)


def test_interleaved_takes_turns_and_compares_within_rounds(monkeypatch):
    clock, calls, marks = [0.0], [], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def function(name, seconds):
        durations = iter(seconds)

        def call():
            calls.append(name)
            clock[0] += next(durations)

        return call

    a, b = timing.interleaved(
        [function("a", [9, 1, 2, 4]), function("b", [9, 3, 4, 40])], CPU, 3,
        before=lambda k: marks.append(("before", k)), after=lambda k: marks.append(("after", k)),
    )  # fmt: skip
    assert "".join(calls) == "abababab"
    assert marks == [(side, k) for _ in range(4) for k in (0, 1) for side in ("before", "after")]
    assert a.seconds == (1, 2, 4) and b.seconds == (3, 4, 40)  # the first call of each is not counted
    assert a.median == 2 and b.times(a) == 3  # ratios 3, 2, 10


def test_run_writes_valid_rows_and_a_table(tmp_path, capsys):
    out = tmp_path / "deep" / "rows.json"
    backend = ops.current("cpu")
    arguments = "--part kernels drift --device cpu --rounds 1 --size 2Ki --dtype fp32 bf16 --drift-size 1Ki"
    status = run.main([*arguments.split(), "--drift-steps", "3", "--backends", backend, "--out", str(out)])
    assert status == 0
    found = rows.read([out])
    measured = [row for row in found if row["part"] == "kernel"]
    assert [row["case"] for row in measured] == [case.name for case in cases.cases(["fp32", "bf16"])]
    for row in measured:
        m, o = row["measures"], row["options"]
        assert o["backend"] == ("torch" if o["op"] in ("copy", "normal_add") else backend)
        assert (m["times_faster"] is None) == (o["op"] in ("copy", "normal_add"))
        assert m["elements"] == 2048 and m["seconds_min"] <= m["seconds"] <= m["seconds_max"]
        assert math.isclose(m["gb_per_s"], m["bytes"] / m["seconds"] / 1e9, rel_tol=1e-4)
        assert m["percent_of_copy"] == 100 or o["op"] != "copy"
        assert row["environment"]["torch"] == torch.__version__ and row["environment"]["noise_stream"] == 1
    text = capsys.readouterr()
    assert "GPU" in text.err or torch.cuda.is_available()
    assert text.out == table.render(found)
    body = [line for line in text.out.splitlines() if line.startswith("| ") and "---" not in line]
    checkpoints = [row for row in found if row["part"] == "drift" and row["measures"]["steps"] == 1]
    assert len(body) == len(found) - len(checkpoints) + 2  # each drift's last alone; a header for each part
    assert len({line.count("|") for line in body}) == 2
    assert not ops.backends()[backend].reason and ops.current("cpu") == backend  # nothing stays forced

    moved = {row["options"]["mode"]: row["measures"]["drift_ulps"] for row in found if row["part"] == "drift"}
    assert moved["shadow"] == 0 < moved["inplace"]

    pytest.importorskip("matplotlib")
    plot.draw(found, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", update_cases.UPDATES)
def test_updates_in_plain_torch_do_what_ours_do(monkeypatch, name, dtype):
    monkeypatch.setattr(update_cases, "SMALL", 0.5)

    def noise(data, k, like=None):
        z = ops.noise_fill(data.elements, k + 1)
        return z.to(data.x.dtype if like is None else like.dtype)

    monkeypatch.setattr(update_cases.Data, "normal", noise)
    update, found = update_cases.UPDATES[name], []
    for way in (update.ours, update.today):
        data = update_cases.Data(dtype, 1 << 16, CPU)
        result = way(data)()
        found.append([t.float() for t in (data.x, data.m, data.v, data.largest)])
        if name in ("kron_score", "fold_norm") or (name == "quantile" and isinstance(result, torch.Tensor)):
            found[-1].append(result.flatten().float())
        elif name == "quantile":
            found[-1].append(torch.stack(result).float())
        elif name == "mask_below":
            found[-1].append(result.flatten() if result.dtype == torch.bool else _unpacked(result))
    for ours, today in zip(*found, strict=True):
        tolerance = 1e-4 if dtype == "fp32" else 3e-2
        assert torch.allclose(ours.float(), today.float(), rtol=tolerance, atol=tolerance)
    assert update.bytes("bf16", 1 << 16) <= update.bytes("fp32", 1 << 16)


def _unpacked(mask):
    return (mask.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten().bool()


def test_updates_are_measured(tmp_path):
    found = updates.measure(
        CPU, ENVIRONMENT, dtypes=["fp32"], elements=1 << 16, rounds=1, backends=[ops.current("cpu")]
    )
    assert [row["options"]["op"] for row in found] == list(update_cases.UPDATES)
    assert all(row["measures"]["percent_of_floor"] > 0 for row in found)
    adam = next(row["measures"] for row in found if row["options"]["op"] == "adam")
    assert (adam["bytes"], adam["normals"]) == (24 << 16, 1 << 16)  # x and two states, read and written
    assert "times faster than plain torch" in table.render(found)
    with pytest.raises(ValueError, match="64Ki"):
        updates.measure(CPU, ENVIRONMENT, elements=1000)


def test_kernels_need_a_reason_to_measure_the_reference(monkeypatch):
    monkeypatch.setattr(kernels.ops, "backends", lambda: {"cpp": ops.Backend("cpp", False, (), "not built")})
    with pytest.raises(RuntimeError, match=r"not built.*--backends reference"):
        kernels.measure(CPU, ENVIRONMENT)


@pytest.mark.parametrize(("text", "value"), [("64Mi", 1 << 26), ("3Ki", 3072), ("1Gi", 1 << 30), ("17", 17)])
def test_sizes(text, value):
    assert run.size(text) == value


@pytest.mark.parametrize("text", ["", "Mi", "0", "-3", "1.5Mi", "64M"])
def test_bad_sizes_say_what_is_expected(text):
    with pytest.raises(run.argparse.ArgumentTypeError, match="64Mi"):
        run.size(text)


def _drift_row():
    measures = {name: 1 if int in kinds else 1.0 for name, kinds in rows.MEASURES["drift"].items()}
    return rows.make("drift", "x", {"mode": "inplace"}, measures, ENVIRONMENT)


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda row: row.pop("options"), "keys"),
        (lambda row: row.update(part="speed"), "part must be"),
        (lambda row: row["options"].update(shape=[1, 2]), "option shape"),
        (lambda row: row["measures"].pop("steps"), r"missing \['steps'\]"),
        (lambda row: row["measures"].update(speed=1), r"unknown \['speed'\]"),
        (lambda row: row["measures"].update(drift_rms=float("nan")), "NaN"),
        (lambda row: row["measures"].update(drift_rms=None), "drift_rms must be"),
        (lambda row: row["measures"].update(steps=True), "steps must be"),
        (lambda row: row["environment"].update(commit=3), "commit must be"),
    ],
)
def test_bad_rows_are_refused(breaks, message):
    row = copy.deepcopy(_drift_row())
    rows.check(row)
    breaks(row)
    with pytest.raises(ValueError, match=message):
        rows.check(row)


def test_read_names_the_bad_file(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"part": "kernel"}]')
    with pytest.raises(ValueError, match=r"rows\.json"):
        rows.read([path])


def test_step_rows_compare_with_the_forwards_and_the_loop():
    samples = {
        "forwards": timing.Samples((1.0, 2.0, 4.0)),
        "today": timing.Samples((4.0, 9.0, 15.0)),
        "mezo/shadow": timing.Samples((1.5, 2.2, 5.0)),
    }
    options = {"model": "tiny", "dtype": "fp32", "batch": 1, "tokens": 2}
    forwards, today, ours = (row["measures"] for row in step._rows(samples, ENVIRONMENT, options, 10))
    assert forwards["overhead_percent"] == 0 and forwards["times_faster"] is None and today["times_faster"] is None
    assert ours["seconds"] == 2.2 and ours["forwards_seconds"] == 2.0
    assert ours["overhead_percent"] == 25  # ratios 1.5, 1.1, 1.25
    assert ours["times_faster"] == 3  # ratios 2.67, 4.09, 3


def test_a_step_of_a_tiny_model_is_measured():
    pytest.importorskip("transformers")
    found = step.measure(CPU, ENVIRONMENT, dtypes=["fp32"], model_name="tiny", batch=2, tokens=6, rounds=1)
    assert [(row["options"]["method"], row["options"]["mode"]) for row in found] == [
        ("forwards", None), ("today", None), *step.CONTESTANTS
    ]  # fmt: skip
    assert "mezo, shadow" in table.render(found)


def test_a_step_without_an_update_is_not_timed():
    optimizer = MeZO(nn.Linear(2, 2), lr=1e-3)
    with pytest.raises(RuntimeError, match="update was skipped"):
        step._step(optimizer, lambda: 1.0)


def test_engine_bytes():
    # 2000 weights and 100 biases are padded to 2048 and 1024 elements.
    def model(dtype):
        return nn.Linear(20, 100).to(dtype)

    weights = 4 * 2100
    held = memory.engine_bytes(MeZO(model(torch.float32), lr=0.1, mode="inplace"), weights)
    assert (held["arena_bytes"], held["state_bytes"], held["copy_bytes"]) == (4 * 3072, 0, 0)
    assert held["added_percent"] == pytest.approx(100 * (3072 / 2100 - 1))
    held = memory.engine_bytes(MeZOMomentum(model(torch.bfloat16), lr=0.1, mode="shadow"), weights // 2)
    assert (held["arena_bytes"], held["state_bytes"], held["copy_bytes"]) == (2 * 3072, 4 * 3072, 2 * 3072)


def test_drift_by_hand():
    start = torch.tensor([0.02, -0.02, 0.02, -0.02], dtype=torch.float64).to(torch.bfloat16)
    ulp = 2.0**-6 * 2.0**-7  # 0.02 lies in [2^-6, 2^-5)
    assert drift.ulp_at(0.02, torch.bfloat16) == ulp and drift.ulp_at(0.02, torch.float32) == 2.0**-29
    weights = (start.double() + torch.tensor([4 * ulp, 0, 0, 0], dtype=torch.float64)).to(torch.bfloat16)
    found = drift._compare(weights, start, 100, (10, 1.0))
    assert found["drift_ulps"] == pytest.approx(2) and found["drift_mean_ulps"] == pytest.approx(1)
    assert found["changed_percent"] == 25 and found["ulps_after_10000"] == pytest.approx(20)
    assert found["growth_exponent"] == pytest.approx(math.log(2) / math.log(10))
