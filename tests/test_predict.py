"""Predictions from SASS: pipes, floors, ways through kernels, and that what is stored and shown follows from them."""

import json
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import sass
import sass_pipes

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench/ is not installed

from bench import cases, predict, update_cases
from bench.gpu import predictions


def test_a_prediction_is_the_longest_of_bytes_and_pipes():
    light = predict.prediction("H100", {"issue": 34.0, "alu": 14.0}, 4)  # 4 bytes at 0.9 x 3.35 TB/s
    assert light["bound"] == "bytes" and light["percent_of_copy"] == 100
    assert light["floor_ps"] == pytest.approx(1.3267, rel=1e-4)
    issued = predict.prediction("H200", {"issue": 34.0, "alu": 14.0}, 4)  # 34 / (132 x 128 x 1.98 GHz), 0.926 ps
    assert issued["bound"] == "issue" and issued["floor_ps"] == pytest.approx(1.0163, rel=1e-4)
    assert issued["percent_of_copy"] == pytest.approx(91.1, rel=1e-3)
    busy = predict.prediction("H200", {"issue": 34.0, "alu": 18.0}, 4)  # 18 / (132 x 64 x 1.98 GHz)
    assert busy["bound"] == "alu" and busy["floor_ps"] == pytest.approx(1.0761, rel=1e-4)
    assert predict.prediction("A100", {"issue": 34.0, "fma": 34.0}, 4)["bound"] == "fma"  # half as wide there
    nothing = predict.prediction("H100", {"issue": 34.0}, 0)
    assert nothing["bound"] == "issue" and nothing["percent_of_copy"] == 0


def test_pipes_of_instructions():
    def passes(mnemonic, capability="9.0"):
        return sass_pipes.slots(sass.Instruction("", mnemonic, ""), capability)

    assert passes("IADD3.X") == {"issue": 1, "alu": 1} and passes("USHF.L.U32") == {"issue": 1}
    assert passes("IMAD.WIDE.U32") == {"issue": 1, "fma": 2, "fmaheavy": 2}
    assert passes("IMAD.MOV.U32", "8.0") == {"issue": 1, "fma": 1}
    assert passes("FFMA") == {"issue": 1, "fma": 1} and passes("FFMA2", "10.0") == {"issue": 1, "fma": 2, "fmaheavy": 1}
    assert passes("LDG.E.128") == {"issue": 1, "lsu": 4} and passes("STS.U16") == {"issue": 1, "lsu": 1}
    assert passes("HFMA2.MMA") == {"issue": 1, "fp64": 1} and passes("HFMA2.MMA", "8.0") == {"issue": 1, "half": 1}
    with pytest.raises(KeyError, match=r"QFOO\.X: no pipe is known"):
        passes("QFOO.X")


def instruction(mnemonic, predicate="", target=None):
    return sass.Instruction(predicate, mnemonic, "", target)


def test_ways_through_a_kernel():
    lines = (
        instruction("LDG"),  # 0
        instruction("BRA", "P0", 4),  # past the loop inside
        instruction("FMUL"),
        instruction("BRA", "P1", 2),
        instruction("FADD"),
        instruction("BRA", "P2", 1),
        instruction("EXIT"),
    )
    kernel = sass.Kernel("k", lines, 8, 0, 0)
    assert kernel.way() == (0, 1, 2, 3, 4, 5, 6) and kernel.path() == 7
    assert kernel.way(avoid=lambda one: one.op == "FMUL") == (0, 1, 4, 5, 6)
    assert kernel.loops() == [range(1, 6), range(2, 4)]
    assert [one.op for one in kernel.at(kernel.around(range(1, 6)))] == ["BRA", "FADD", "BRA"]
    assert kernel.around(range(2, 4)) == (2, 3)


def test_predictions_of_cuda_kernels_are_those_of_the_stored_budgets():
    stored = json.loads((predict.BUDGETS / "cuda_sm90.json").read_text())
    found = {case: (moved, use) for case, moved, use in predict.cuda_kernels("9.0")}
    one = stored["BFloat16-gaussian-1"]["pipes"]
    assert found["add_noise/bf16/k1/gaussian/nearest"] == found["add_noise/bf16/k1/gaussian/nearest/out"] == (4, one)
    assert found["adam/bf16"][0] == 20 and found["noise_fill/bf16/gaussian"][0] == 2
    assert "adam/bf16" not in {case for case, _, _ in predict.cuda_kernels("8.0")}

    label = "BFloat16-gaussian-stochastic-any"
    base, term, state = (stored[name]["pipes"]["alu"] for name in (label, f"{label}-term", f"{label}-state"))
    moved, use = found["add_noise/bf16/k4/gaussian/stochastic"]
    assert moved == 4 and use["alu"] == pytest.approx(base + 4 * term)
    moved, use = found["add_noise/bf16/k1/gaussian/stochastic/states2"]
    assert moved == 12 and use["alu"] == pytest.approx(base + term + 2 * state)
    fma = found["add_noise/bf16/k1/gaussian/stochastic/decay"][1]["fma"]
    assert fma == pytest.approx(stored[label]["pipes"]["fma"] + stored[f"{label}-term"]["pipes"]["fma"] + 1)


def test_loops_of_triton_kernels_run_as_often_as_their_case_says():
    variant = types.SimpleNamespace(elements=2, compile=lambda target: None)
    lines = [instruction("FADD"), instruction("FFMA"), instruction("FFMA"), instruction("BRA", "P0", 1)]
    lines += [instruction("IADD3"), instruction("BRA", "P0", 4), instruction("EXIT")]
    kernel = sass.Kernel("k", tuple(lines), 8, 0, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_aot", types.SimpleNamespace(read=lambda _: kernel))
        pytest.importorskip("triton")
        thrice = predict.triton_use(predict.Compiled("c", 4, variant, predict._terms(3)), "9.0")
        assert thrice == {"issue": 8.5, "alu": 1.5, "fma": 3.5}
        rank = predict._rank(6, 1)  # 1 element of 2 multiplies: unrolled loops have 4 and 1
        assert [rank(0, Counter(FFMA=n)) for n in (4, 1, 0)] == [1, 2, 1] and rank(0, Counter(FFMA2=2)) == 1
        assert predict._rank(8, 2)(0, Counter(FFMA2=4)) == 2
        elsewhere = predict.Compiled("c", 4, variant, lambda number, ops: 1)  # as where no loop is on the way
        assert predict.triton_use(elsewhere, "9.0") is None
        half = predict.triton_use(predict.Compiled("c", 4, variant, passes=0.5), "9.0")
        assert half == {"issue": 1.75, "alu": 0.25, "fma": 0.75}


@pytest.mark.parametrize("capability", predict.CAPABILITIES)
def test_stored_predictions_follow_from_their_counts(capability):
    stored = json.loads(predictions.path(capability).read_text())
    assert stored["lanes_per_clock"] == sass_pipes.RATES[capability] and stored["copy"] == predict.COPY
    assert stored["cards"] == {name: c for name, c in predict.CARDS.items() if c["capability"] == capability}
    for one in stored["kernels"]:
        for card, found in one["cards"].items():
            wanted = predict.prediction(card, one["pipes"], one["bytes"])
            assert found.pop("bound") == wanted.pop("bound"), one["case"]
            assert found == pytest.approx(wanted, rel=1e-5), one["case"]
    found = {one["case"] for one in stored["kernels"] if one["backend"] == "triton"}
    measured = {case.name for case in cases.cases(cases.DTYPES) if case.op not in ("copy", "normal_add")}
    measured |= {f"{name}/{dtype}" for name in update_cases.UPDATES for dtype in ("fp32", "bf16")}
    assert found | set(stored["left_out"]) == measured and not found & set(stored["left_out"])
    assert capability == "8.0" or not stored["left_out"]
    kept = {one["case"]: one["pipes"] for one in stored["kernels"] if one["backend"] == "cuda"}
    assert kept == {case: use for case, _, use in predict.cuda_kernels(capability)}


def test_the_readme_shows_the_stored_predictions():
    _, h100 = predictions.load({"name": "NVIDIA H100 80GB HBM3", "capability": "9.0"})
    _, h200 = predictions.load({"name": "NVIDIA H200", "capability": "9.0"})
    text = (predict.ROOT / "bench" / "README.md").read_text().partition("## Predicted")[2]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    assert len(lines) > 10
    for case, moved, *cells in lines:
        for backend, (sass_count, *reached) in zip(("triton", "cuda"), (cells[:3], cells[3:]), strict=True):
            key = (case.strip("`"), backend)
            if not sass_count:
                assert key not in h100
                continue
            assert sass_count == f"{h100[key]['pipes']['issue']:.1f}" and moved == f"{h100[key]['bytes']:g}"
            for cell, card in zip(reached, (h100, h200), strict=True):
                assert cell == f"{card[key]['percent_of_copy']:.0f} {card[key]['bound']}", key
