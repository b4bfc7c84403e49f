"""What of ``make gpu-check`` runs without a GPU: arguments, the time budget, processes, results, tables and plots.

The checks themselves run here on the CPU's backends where the hardware does not matter to them. The stored example is
made up; it has the form of a real result.
"""

import copy
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench/ is not installed

from bench import cases, gpu_check, kernels, large, workload
from bench.environment import describe
from bench.gpu import calls, check, device, parts, predictions, report, safety, sync
from zoengine import ops

CPU = torch.device("cpu")
EXAMPLE = json.loads((Path(__file__).parent / "examples" / "gpu_check.json").read_text())


@pytest.fixture
def example():
    return copy.deepcopy(EXAMPLE)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A GPU for the parent process alone: parts are looked up in the dict returned, {name: (status, found)}."""
    monkeypatch.setattr(gpu_check, "BUILT", tmp_path / "built")
    monkeypatch.setattr(gpu_check, "find_device", lambda: (EXAMPLE["device"], ""))
    answers = {name: ("passed", {}) for name in gpu_check.PARTS}
    asked = []

    def answer(name, seconds, *rest):
        asked.append(name)
        return answers[name]

    monkeypatch.setattr(gpu_check, "RUN", {name: answer for name in gpu_check.PARTS})
    return answers, asked


def run_check(folder, *arguments):
    return gpu_check.main(["--out", str(folder), *arguments])


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run_check(tmp_path) == gpu_check.NO_GPU == 4
    said = capfd.readouterr()
    assert said.err.count("\n") == 1 and "no NVIDIA GPU" in said.err and said.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--part", "nonsense"], ["--minutes", "0"], ["--minutes", "x"]])
def test_bad_arguments(arguments):
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(arguments)
    assert stopped.value.code == 2


def test_parts_run_in_their_order_and_the_build_first_where_nothing_is_built():
    assert gpu_check.chosen(["all"], built=True) == list(gpu_check.PARTS)
    assert gpu_check.chosen(["updates", "sync"], built=True) == ["sync", "updates"]
    assert gpu_check.chosen(["sync"], built=False) == ["build", "sync"]
    assert set(gpu_check.PARTS) - {"build", "tests"} | {"probe"} == set(parts.PARTS)


def test_time_that_a_part_leaves_over_goes_to_those_after_it():
    now = [0.0]
    budget = gpu_check.Budget(540, lambda: now[0])
    names, left = list(gpu_check.PARTS), 540 - gpu_check._FINISHING
    first = budget.share(names[0], names[1:])
    assert first == pytest.approx(left * gpu_check.PARTS["build"] / sum(gpu_check.PARTS.values()))
    now[0] = first  # it took all of its time: the next gets what it would have got at the start
    share = budget.share(names[1], names[2:])
    assert share == pytest.approx(left * gpu_check.PARTS[names[1]] / sum(gpu_check.PARTS.values()))
    now[0] = 1.0
    assert budget.share(names[1], names[2:]) > share
    assert budget.share("updates", []) == pytest.approx(left - 1)
    now[0] = 600
    assert budget.share("updates", []) == 0


def test_a_whole_check(card, tmp_path, example, capsys):
    answers, asked = card
    answers["step"] = ("partly", {"rows": example["rows"][-3:], "left_out": ["llama-3.1-8b: no time left"]})
    failed = [one for one in example["checks"] if not one["passed"]]
    answers["sync"] = ("failed", {"checks": failed})
    assert run_check(tmp_path) == 1
    assert asked == list(gpu_check.PARTS)
    result = report.validate(json.loads((tmp_path / "example-gpu-80gb.json").read_text()))
    assert {name: part["status"] for name, part in result["parts"].items()} == dict.fromkeys(
        gpu_check.PARTS, "passed"
    ) | {"step": "partly", "sync": "failed"}
    text = (tmp_path / "example-gpu-80gb.md").read_text()
    assert "llama-3.1-8b: no time left" in text and failed[0]["detail"] in text
    assert "step: partly" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    assert (tmp_path / "example-gpu-80gb-step.png").stat().st_size > 5000


def test_calls_add_to_the_same_files(card, tmp_path, example):
    answers, _ = card
    kernels_found = [row for row in example["rows"] if row["part"] == "kernel"]
    steps_found = [row for row in example["rows"] if row["part"] == "step"]
    (tmp_path / "built" / "lib" / "zoengine").mkdir(parents=True)
    answers["kernels"], answers["step"] = ("passed", {"rows": kernels_found}), ("passed", {"rows": steps_found})
    assert run_check(tmp_path, "--part", "kernels") == 0 and run_check(tmp_path, "--part", "step") == 0
    answers["step"] = ("passed", {"rows": steps_found[:2]})
    assert run_check(tmp_path, "--part", "step") == 0
    stored = json.loads((tmp_path / "example-gpu-80gb.json").read_text())
    assert stored["rows"] == kernels_found + steps_found[:2] and list(stored["parts"]) == ["kernels", "step"]


def test_without_time_parts_are_left_out_not_failed(card, tmp_path):
    assert run_check(tmp_path, "--minutes", "0.5") == 0
    stored = json.loads((tmp_path / "example-gpu-80gb.json").read_text())
    assert {part["status"] for part in stored["parts"].values()} >= {"left out"}
    assert stored["parts"]["sync"]["left_out"] == ["no time left"]


def test_nothing_runs_after_a_build_that_failed(card, tmp_path, capsys):
    answers, asked = card
    answers["build"] = ("failed", {"facts": {"error": "nvcc: not found"}})
    assert run_check(tmp_path) == 1 and asked == ["build"]
    assert "nvcc: not found" in capsys.readouterr().err


def test_another_file_in_the_way_is_not_overwritten(card, tmp_path):
    (tmp_path / "example-gpu-80gb.json").write_text("[1, 2]")
    assert run_check(tmp_path) == 2
    assert (tmp_path / "example-gpu-80gb.json").read_text() == "[1, 2]"


def test_a_command_that_takes_too_long_is_ended_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "BUILT", tmp_path)
    log = tmp_path / "log"
    inner = "import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {!r}])"
    late = tmp_path / "late"
    command = [sys.executable, "-c", inner.format(f"import time; time.sleep(3); open({str(late)!r}, 'w')")]
    start = time.monotonic()
    assert gpu_check.run(command, 1.5, log, cwd=tmp_path) == gpu_check.TIMEOUT
    assert time.monotonic() - start < 3 and "begun" in gpu_check.why(gpu_check.TIMEOUT, log)
    time.sleep(max(0, 3.5 - (time.monotonic() - start)))
    assert not late.exists()
    assert gpu_check.run([sys.executable, "-c", "raise SystemExit('no such thing')"], 30, log, cwd=tmp_path) == 1
    assert gpu_check.why(1, log) == "exit status 1: no such thing"


def test_processes_find_what_was_built_before_the_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "BUILT", tmp_path)
    for name in ("zoengine", "other"):
        (tmp_path / "lib" / name).mkdir(parents=True)
        (tmp_path / "lib" / name / "__init__.py").write_text("")
    log = tmp_path / "log"
    words = "import bench, zoengine; print(zoengine.__file__)"
    assert gpu_check.run([sys.executable, "-c", words], 60, log, cwd=tmp_path) == 0
    assert log.read_text().strip() == str(tmp_path / "lib" / "zoengine" / "__init__.py")


def test_a_part_that_breaks_keeps_what_it_had(tmp_path, monkeypatch, example):
    monkeypatch.setattr(gpu_check, "BUILT", tmp_path)
    found = {"rows": example["rows"][:1], "checks": [], "left_out": [], "facts": {}}

    def stopped(command, seconds, log, **rest):
        Path(command[command.index("--out") + 1]).write_text(json.dumps(found))
        log.write_text("RuntimeError: illegal memory access")
        return statuses.pop()

    monkeypatch.setattr(gpu_check, "run", stopped)
    statuses = [gpu_check.TIMEOUT, 1, 0]
    assert gpu_check.measured("kernels", 9, {}, None) == ("passed", found)
    status, kept = gpu_check.measured("kernels", 9, {}, None)
    assert status == "failed" and kept["rows"] == found["rows"] and "illegal memory" in kept["facts"]["error"]
    status, kept = gpu_check.measured("kernels", 9, {}, None)
    assert status == "partly" and kept["rows"] == found["rows"] and "9 s" in kept["left_out"][0]


def test_pytest_is_counted_as_far_as_it_came():
    log = """
../../tests/test_cuda_kernels.py::test_noise_fill[a b-c] PASSED           [ 10%]
../../tests/test_cuda_kernels.py::test_segments FAILED                    [ 20%]
[gw1] [ 30%] PASSED tests/test_x.py::test_a
[gw0] [ 40%] SKIPPED tests/test_x.py::test_b
[gw0] [ 50%] ERROR tests/test_x.py::test_c
FAILED ../../tests/test_cuda_kernels.py::test_segments - AssertionError
"""
    assert gpu_check.counted(log) == {
        "passed": 2, "failed": 2, "skipped": 1,
        "names": ["tests/test_cuda_kernels.py::test_segments", "tests/test_x.py::test_c"],
    }  # fmt: skip


def test_tests_without_pytest_and_with_one_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "BUILT", tmp_path)
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None)
    status, found = gpu_check.tests("tests", 60, {}, None)
    assert status == "left out" and "pytest is not installed" in found["left_out"][0]
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: True if name == "pytest" else None)
    (tmp_path / "tests").mkdir()
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['gpu']\n")
    body = "import pytest\n@pytest.mark.gpu\ndef test_it(): assert {}\ndef test_of_no_gpu(): assert False\n"
    for good in (True, False):
        (tmp_path / "tests" / "test_it.py").write_text(body.format(good))
        status, found = gpu_check.tests("tests", 60, {}, None)
        assert (status, found["facts"]["passed"]) == (("passed", 1) if good else ("failed", 0)), found
    assert "tests/test_it.py::test_it" in found["facts"]["error"]


def test_results_are_checked(example):
    report.validate(example)
    for spoil in (
        lambda r: r.pop("rows"),
        lambda r: r["parts"]["build"].pop("date"),
        lambda r: r["parts"]["build"].update(status="fine"),
        lambda r: r["checks"][0].update(passed=1),
        lambda r: r["rows"][0].pop("case"),
    ):
        broken = copy.deepcopy(example)
        spoil(broken)
        with pytest.raises(ValueError):
            report.validate(broken)


def test_the_report_of_the_example(example, tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "FOLDER", tmp_path)
    one = {"case": "add_noise/bf16/k1/gaussian/nearest", "backend": "cuda", "pipes": {"issue": 33.0}, "bytes": 4.0}
    floors = {"H100": ("bytes", 1.3, 100.0), "H200": ("issue", 1.1, 85.0)}
    one["cards"] = {
        card: {"bound": bound, "floor_ps": floor, "percent_of_copy": percent}
        for card, (bound, floor, percent) in floors.items()
    }
    (tmp_path / "predicted-sm90.json").write_text(json.dumps({"cards": {"H100": {}, "H200": {}}, "kernels": [one]}))
    cuda = next(row for row in example["rows"] if row["case"] == one["case"] and row["options"]["backend"] == "cuda")[
        "measures"
    ]
    for name, card in (("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"), ("NVIDIA GH200 480GB", "H100")):
        example["device"]["name"] = name
        bound, floor, percent = floors[card]
        reached = 1e-12 * floor * cuda["elements"] / cuda["seconds"]
        text = report.render(example)
        assert f"Predicted for {card};" in text
        assert f"| 33.0 | 4 | {bound} | {percent:.0f} | {cuda['percent_of_copy']:.0f} | {reached:.2f} |" in text
    example["device"] = copy.deepcopy(EXAMPLE["device"])
    text = report.render(example)
    assert "| opt-1.3b | 2,048 | hizoo, shadow | 3 | 90.0 | 1.200 | 68,267 | 2.00 | 1.00 |" in text
    assert "| loop of today, tensor by tensor |" in text and "1,073,741,824 elements" in text
    reached = {(name, verdict) for name, _, _, verdict in report.goals(example)}
    assert ("MeZO shadow, opt-1.3b, 2,048 tokens", "**missed**") in reached
    assert ("MeZO inplace, opt-1.3b, 2,048 tokens", "reached") in reached
    assert ("MeZO inplace, opt-1.3b, 256 tokens", "reached") in reached
    assert ("`add_noise_` bf16, K=1, in place, rademacher, cuda", "**missed**") in reached
    best = {(case, elements): name for case, elements, _, _, name in report.faster(example["rows"])}
    assert best["`noise_fill/bf16/gaussian`", "268,435,456"] == "cuda"
    assert best["`add_noise/bf16/k1/gaussian/nearest`", "268,435,456"] == "neither"
    assert best["`adam/bf16`", "134,217,728"] == "triton"


def test_an_h200_has_goals_of_its_own(example):
    wanted = {row[1] for row in report.goals(example)}
    example["device"]["name"] = "NVIDIA H200"
    assert {row[1] for row in report.goals(example)} - wanted == {">= 75 % of the copy"}


def test_plots_of_the_example(example, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = report.draw(example, tmp_path / "card")
    assert [path.name for path in drawn] == ["card-kernels.png", "card-step.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert report.draw({**example, "rows": []}, tmp_path / "none") == []


def test_names_of_devices():
    assert device.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


@pytest.mark.skipif(not ops.backends()["cpp"].available, reason="the extension is not built")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_calls_cover_every_op_and_read_their_numbers_from_tensors(dtype):
    with ops.use("cpp"):
        for call in calls.calls(dtype, CPU):
            first = [tensor.clone() for tensor in call.run()]
            again = call.run()
            assert first and all(bool(check.same(a, b)) for a, b in zip(first, again, strict=True)), call.name
            call.renew()
            other = call.run()
            reads = bool(call.seeds or call.numbers)
            assert reads != all(bool(check.same(a, b)) for a, b in zip(first, other, strict=True)), call.name


@pytest.mark.skipif(not ops.backends()["cpp"].available, reason="the extension is not built")
def test_launches_that_differ_are_found(monkeypatch):
    found = list(safety.launches(CPU, ["cpp"], 2))
    assert found and all(one["passed"] for one in found)
    x = torch.zeros(5)
    unsteady = calls.Call("op", "op", lambda: x.add_(torch.rand(5)), [x], [], [])
    passed, detail = safety.stable(unsteady, 4)
    assert not passed and detail == "3 of 4 differ"


@pytest.mark.skipif(not ops.backends()["cpp"].available, reason="the extension is not built")
def test_large_arenas_are_compared_with_parts_of_them(monkeypatch):
    found = list(safety.large(CPU, ["cpp"], 200_000))
    assert len(found) == len(safety.LARGE) and all(one["passed"] for one in found), found
    add_noise_ = ops.add_noise_

    def far(x, *args, **kwargs):  # as if the offset were cut to 16 bits
        kwargs["offset"] = kwargs.get("offset", 0) & 0xFFFF
        return add_noise_(x, *args, **kwargs)

    monkeypatch.setattr(safety.ops, "add_noise_", far)
    passed, detail = safety._add_noise(CPU, 200_000)
    assert not passed and "129,024" in detail
    starts = [at.start for at in safety.windows(2**32 + 2**20)]
    assert starts[0] == 0 and all(start % 1024 == 0 for start in starts)
    for border in (2**31, 2**32):
        assert any(start < border < start + safety.WINDOW for start in starts)
    assert safety.arena_sizes(30 << 30) == ([2**31 + 2**20], [2**32 + 2**20])


def test_the_sanitizer_is_judged_by_what_it_says():
    clean = "output\n========= ERROR SUMMARY: 0 errors"
    assert safety.judged("memcheck", "cuda", 0, clean)["passed"]
    bad = safety.judged("racecheck", "cuda", 9, "========= RACECHECK SUMMARY: 2 hazards displayed")
    assert not bad["passed"] and "2 hazards" in bad["detail"]
    assert "does not support" in safety.judged("memcheck", "cuda", 9, "Error: Device not supported")
    assert not safety.judged("memcheck", "cuda", 1, "Traceback\nImportError: x")["passed"]


def test_reads_of_a_step_are_counted_by_name():
    names = ["aten::add", "Memcpy DtoH (Device -> Pageable)", "Memcpy HtoD (Pageable -> Device)", "Memcpy DtoH"]
    assert sync.count_reads(names) == 2
    for method, mode in sync.METHODS:
        optimizer, model, x = sync.optimizer(method, mode, CPU)
        optimizer.step(lambda model=model, x=x: model(x).float().square().mean())
        assert len(set(optimizer.last_losses)) > 1, method


def test_what_triton_compiles_is_noted():
    knobs = pytest.importorskip("triton").knobs
    with sync.compiling() as names:
        knobs.runtime.jit_post_compile_hook(key="", fn=SimpleNamespace(name="add_noise_kernel"), is_manual_warmup=False)
    assert names == ["add_noise_kernel"] and knobs.runtime.jit_post_compile_hook is None


def test_a_command_is_ended_after_its_time():
    assert safety._run([sys.executable, "-c", "import sys; print('said'); sys.exit(9)"], 30) == (9, "said\n")
    assert safety._run([sys.executable, "-c", "import time; time.sleep(60)"], 0.5) is None


@pytest.mark.skipif(not ops.backends()["cpp"].available, reason="the extension is not built")
def test_a_part_that_breaks_keeps_the_rows_under_way(tmp_path, example):
    def breaks(error):
        part.write(example["rows"][:1])
        raise error

    part = parts.Part(CPU, tmp_path / "found.json", 60)
    part.measure("one", lambda: breaks(torch.OutOfMemoryError("no memory")))
    assert part.rows == example["rows"][:1] and part.left_out == ["one: not enough memory"]
    with pytest.raises(RuntimeError, match="illegal"):
        part.measure("two", lambda: breaks(RuntimeError("illegal access")))
    part.write()
    assert json.loads((tmp_path / "found.json").read_text())["rows"] == example["rows"][:1] * 2
    part.until = 0
    part.measure("three", list)
    assert part.left_out[1:] == ["three: no time left"]


@pytest.mark.skipif(not ops.backends()["cpp"].available, reason="the extension is not built")
def test_no_kernel_is_measured_twice(tmp_path, monkeypatch):
    for name, value in (("SIZE", 4096), ("MAIN_SIZES", (4096, 8192)), ("ROUNDS", 1), ("free_bytes", lambda d: 1 << 40)):
        monkeypatch.setattr(parts, name, value)
    part = parts.Part(CPU, tmp_path / "found.json", 60)
    parts.kernel_rows(part)
    names = [row["case"] for row in part.rows]
    wanted = {case.name for case in cases.cases(cases.DTYPES)}
    assert len(names) == len(set(names)) and {name for name in names if "@" not in name} == wanted
    assert names[-1].startswith(("segment", "add_noise")) and "add_noise/bf16/k1/gaussian/nearest@8192" in names
    assert not part.left_out


def test_a_check_that_raises_has_not_passed():
    def broken():
        raise RuntimeError("operation not permitted when stream is capturing")

    found = check.attempt("sync", "captured", "op", broken)
    assert not found["passed"] and found["detail"].startswith("RuntimeError: operation not permitted")


def test_large_models_take_turns_on_one_model():
    pytest.importorskip("transformers")
    model = workload.load_model("tiny", "fp32", CPU, real=False)
    left, saved = [], []
    arguments = {"rounds": 2, "left_out": left.append, "save": lambda rows: saved.append(len(rows))}
    found = large.measure(model, "tiny", describe(CPU), shapes=[(2, 6), (2, 9)], **arguments)
    names = [(row["options"]["method"], row["options"]["mode"]) for row in found if row["options"]["tokens"] == 6]
    assert names == [("forwards", None), ("today", None), *large.CONTESTANTS]
    assert len({row["case"] for row in found}) == len(found) == 2 * len(names) and saved[-1] == len(found)
    hizoo = next(row["measures"] for row in found if row["options"]["method"] == "hizoo")
    assert hizoo["forwards"] == 3 and hizoo["times_faster"] > 0 and not left
    assert large.measure(model, "tiny", describe(CPU), shapes=[(2, 6)], until=0.0, **arguments) == []
    assert len(left) == len(large.CONTESTANTS) and left[0] == "tiny: mezo, inplace: no time left"


def test_a_contestant_that_fails_does_not_end_the_others(monkeypatch):
    pytest.importorskip("transformers")
    model = workload.load_model("tiny", "fp32", CPU, real=False)
    step = large._step

    def failing(optimizer, closure):
        if optimizer.name == "lozo":
            raise RuntimeError("all losses were equal")
        step(optimizer, closure)

    monkeypatch.setattr(large, "_step", failing)
    broken, contestants = [], (("lozo", "shadow"), ("mezo", "shadow"))
    arguments = {"shapes": [(2, 6)], "contestants": contestants, "rounds": 1}
    found = large.measure(model, "tiny", describe(CPU), broken=broken.append, **arguments)
    assert [row["options"]["method"] for row in found] == ["forwards", "today", "mezo"]
    assert len(broken) == 1 and "RuntimeError: all losses were equal" in broken[0]
    with pytest.raises(RuntimeError):
        large.measure(model, "tiny", describe(CPU), **arguments)


def test_models_have_the_sizes_of_their_names():
    transformers = pytest.importorskip("transformers")
    sizes = {"opt-1.3b": 1_315_758_080, "llama-3.2-1b": 1_235_814_400, "llama-3.1-8b": 8_030_261_248}
    assert set(sizes) == set(parts.MODELS)
    for name, size in sizes.items():
        with torch.device("meta"):
            config = transformers.AutoConfig.for_model(**workload.MODELS[name])
            model = transformers.AutoModelForCausalLM.from_config(config)
        assert sum(parameter.numel() for parameter in model.parameters()) == size


@pytest.mark.skipif(not ops.backends()["cpp"].available, reason="the extension is not built")
def test_the_main_kernels_alone():
    found = kernels.measure(
        CPU, describe(CPU), dtypes=["bf16"], elements=4096, rounds=1, backends=["cpp"], only=cases.is_main
    )
    names = [row["case"] for row in found if row["options"]["op"] not in ("copy", "normal_add")]
    assert names == [case.name for case in cases.cases(["bf16"]) if cases.is_main(case)]
    assert "add_noise/bf16/k1/gaussian/nearest" in names and len(names) == 6
