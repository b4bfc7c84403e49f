"""The CUDA files compile, and what they compile to stays within stored budgets. Needs nvcc, no GPU.

tests/budgets/cuda_*.json holds, for each counted kernel, the registers of a thread and what an element may cost in
the main loop: instructions ("issue") and passes through each pipe (sass_pipes.py). Kernels for any number of terms and
states ("any") have more entries: what every term and every state adds. To store what the compiler gives now, after
looking at it:
ZOENGINE_WRITE_BUDGETS=1 pytest tests/test_cuda_build.py
"""

import itertools
import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sass
import sass_pipes
import torch

from zoengine.noise import table
from zoengine.ops.schema import RULES, TRANSFORMS

ROOT = Path(__file__).resolve().parent.parent
CUDA_HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=CUDA_HOME / "bin")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
UPDATES = ("transform", "state_fold", "rule_step", "kron", "lowrank", "mask_below", "segment_fill", "segment_histogram")

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
needs_disassembler = pytest.mark.skipif(sass.tool("nvdisasm") is None, reason="nvdisasm is not installed")


def compile_cubin(source, architecture, folder):
    """``source`` compiled with the flags of setup.py, host code too; returns the path of its device code."""
    flags = ["-O3", "-std=c++17", "--fmad=false", "--expt-relaxed-constexpr", f"-arch={architecture}"]
    keep = folder / f"{source.stem}_{architecture}"
    keep.mkdir()
    output = ["-c", str(source), "-o", str(keep / "object.o"), "--keep", "--keep-dir", str(keep)]
    include = [f"-I{folder}", f"-I{ROOT}/csrc/cuda"]
    done = subprocess.run([NVCC, *flags, *include, *output], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return next(keep.glob("*.cubin"))


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    """All kernels for sm_90 and sm_80, the counted ones for sm_100: {(file, architecture): kernels by name}."""
    folder = tmp_path_factory.mktemp("cubins")
    (folder / "noise_table.h").write_text(table.cpp_header())
    files = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    jobs = [(file, arch) for file in files for arch in ("sm_90", "sm_80")]
    jobs += [(ROOT / "tests" / "cuda_budget_updates.cu", "sm_90")]
    jobs += [(ROOT / "tests" / "cuda_budget.cu", arch) for arch in ARCHITECTURES if arch != "sm_90"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        paths = pool.map(lambda job: compile_cubin(*job, folder), jobs)
        return {(job[0].stem, job[1]): sass.read(path) for job, path in zip(jobs, paths, strict=True)}


def config(name):
    """The template arguments of an elementwise kernel from its mangled name: type, noise, stochastic, terms, fill."""
    found = re.search(r"Config\w*?(Float32|BFloat16|Float16)E?LNS\w*?NoiseE(\d)ELb(\d)ELi(\d)ELb(\d)E", name)
    kind, noise, stochastic, terms, fill = found.groups()
    label = f"{kind}-{('gaussian', 'rademacher')[int(noise)]}"
    label += "-stochastic" * int(stochastic) + ("-fill" if int(fill) else f"-{terms}" if int(terms) else "-any")
    return label


def main_loop(kernel, label, capability):
    """Entries of the budget for the loop over units, each inner loop times its trips: {label: pipes an element}."""
    lanes, gaussian = 4 if label.startswith("Float32") else 8, "gaussian" in label
    rows = 8 if lanes == 4 or "stochastic" in label else 4

    def cost(places, elements):
        return sass_pipes.total(kernel.at(places), capability, 1 / elements)

    loops = kernel.loops()
    if not gaussian:  # 4 times 8 rows for each word of signs; the inner loop is part of the outer
        outer, inner = (loop for loop in loops if stores_vectors(kernel.at(loop)))
        found = {label: cost(outer, 32 * lanes) + cost(inner, 32 * lanes / 3)}
    elif label.endswith("any"):  # the loops inside are those over terms and over states, for each chunk of lanes
        inside = [loop for loop in loops[1:] if loop.start in loops[0]]
        terms = {place for loop in inside if count(kernel.at(loop), "MUFU") for place in loop}
        states = {place for loop in inside for place in loop} - terms
        found = {
            label: cost(set(kernel.around(loops[0])) - terms - states, rows * lanes),
            f"{label}-term": cost(terms, rows * lanes),
            f"{label}-state": cost(states, rows * lanes),
        }
    else:
        found = {label: cost(loops[0], rows * lanes)}
    return {name: sass_pipes.rounded(use) for name, use in found.items()}


def stores_vectors(loop):
    """Whether it does: the loops that do not are those of cut units."""
    return count(loop, "STG", 128) > 0


def counted(cubins, architecture):
    """The kernels that tests/cuda_budget.cu lists, by label; for sm_90 they are taken from the real files."""
    if architecture != "sm_90":
        return {config(name): kernel for name, kernel in cubins["cuda_budget", architecture].items()}
    labels = {config(name) for name in cubins["cuda_budget", "sm_80"]}
    kernels = {**cubins["add_noise", "sm_90"], **cubins["noise_fill", "sm_90"]}
    return {config(name): kernel for name, kernel in kernels.items() if config(name) in labels}


@needs_nvcc
@needs_disassembler
def test_no_kernel_spills(cubins):
    kernels = {**cubins["add_noise", "sm_90"], **cubins["noise_fill", "sm_90"], **cubins["segments", "sm_90"]}
    assert len(kernels) == 25 + 6 + 21
    for arch, name in itertools.product(("sm_80", "sm_90"), UPDATES):
        kernels |= {f"{arch} {name}": kernel for name, kernel in cubins[name, arch].items()}
    assert [name for name, kernel in kernels.items() if kernel.local_accesses or kernel.stack] == []


@needs_nvcc
@needs_disassembler
def test_elementwise_kernels_use_vectors_and_no_shared_memory(cubins):
    for file in ("add_noise", "noise_fill"):
        for name, kernel in cubins[file, "sm_90"].items():
            label = config(name)
            assert kernel.shared == 0 and kernel.shared_accesses == 0, label
            rows = 4 if "Float32" not in label and "gaussian" in label and "stochastic" not in label else 8
            assert kernel.widths("STG")[128] == rows, label
            loads = kernel.widths("LDG")[128]
            if "any" in label:  # states are loaded too
                assert loads > rows, label
            else:
                assert loads == (0 if "fill" in label else rows), label


@needs_nvcc
@needs_disassembler
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_budget(cubins, architecture):
    measured, capability = {}, f"{architecture[3:-1]}.{architecture[-1]}"
    for label, kernel in counted(cubins, architecture).items():
        for part, use in main_loop(kernel, label, capability).items():
            measured[part] = {"pipes": use, "registers": kernel.registers}
        assert kernel.local_accesses == 0 and kernel.stack == 0 and kernel.shared == 0, label
    within_budget(measured, f"cuda_{architecture.replace('_', '')}", architecture)


def within_budget(measured, file, architecture):
    path = ROOT / "tests" / "budgets" / f"{file}.json"
    if os.environ.get("ZOENGINE_WRITE_BUDGETS"):
        path.write_text(json.dumps(measured, indent=2, sort_keys=True) + "\n")
    budget = json.loads(path.read_text())
    assert measured.keys() == budget.keys()
    for label, now in measured.items():
        stored = budget[label]
        assert now["registers"] <= stored["registers"], f"{architecture} {label}: {now}, stored {stored}"
        for pipe, number in now["pipes"].items():
            # Another nvcc schedules a little differently; half an instruction an element is worth a look.
            most = stored["pipes"].get(pipe, 0) + 0.5
            assert number <= most, f"{architecture} {label}: {pipe} {number}, stored {stored['pipes']}"


_TYPE = r"INS0_\d(BFloat16|Float16|Float32)E"
_NAMES = {
    "AddTransformed": [*TRANSFORMS],
    "RuleOp": [*RULES],
    "Fold": ["state", "state-and-weights"],
}  # fmt: skip


def update_label(name):
    """scale-BFloat16, adam-Float32, kron_rows-Float16 and the like from a mangled name; None for other kernels."""
    if found := re.search(r"\d(AddTransformed|Fold|RuleOp)" + _TYPE + r"L(?:b|NS0_\d\w+?E)(\d)E", name):
        op, kind, number = found.groups()
        return f"{_NAMES[op][int(number)]}-{kind}"
    found = re.search(r"\d(kron_rows|lowrank_add)" + _TYPE, name)
    return found and "-".join(found.groups())


def count(loop, op, bits=None):
    return sum(op in (one.op, one.mnemonic) and bits in (None, one.bits) for one in loop)


def loop_of(kernel, op, number, bits=None):
    """Of the loops with ``number`` instructions ``op`` the shortest."""
    return next(loop for loop in reversed(kernel.loops()) if count(kernel.at(loop), op, bits) == number)


def updates_measured(cubins):
    """What an element costs in the loops that a launch with one gaussian term runs, and its kernel's registers."""
    real = {update_label(name): kernel for file in UPDATES for name, kernel in cubins[file, "sm_90"].items()}
    measured = {}
    for name, kernel in cubins["cuda_budget_updates", "sm_90"].items():

        def cost(loop, elements, kernel=kernel):
            return sass_pipes.total(kernel.at(kernel.around(loop)), "9.0", 1 / elements)

        if "fused_case" in name:  # the inner loop: the parts of a unit, 16 elements each
            measured[update_label(name)] = cost(kernel.loops()[1], 16)
        elif "kron_case" in name:  # drawing held rows, four elements a tile, and applying them, eight a vector
            drawing, applying = loop_of(kernel, "STS", 16), loop_of(kernel, "STG", 1, 128)
            measured["kron_rows-BFloat16"] = cost(drawing, 4) + cost(applying, 8)
    # For each fused multiply-add: an element has as many as the rank.
    lowrank = real["lowrank_add-BFloat16"]
    measured["lowrank_add-BFloat16"] = sass_pipes.total(lowrank.at(loop_of(lowrank, "FFMA", 128)), "9.0", 1 / 128)
    return {
        label: {"pipes": sass_pipes.rounded(use), "registers": real[label].registers} for label, use in measured.items()
    }


@needs_nvcc
@needs_disassembler
def test_update_budget(cubins):
    within_budget(updates_measured(cubins), "cuda_updates_sm90", "sm_90")


@needs_nvcc
@needs_disassembler
def test_updates_use_vectors_and_warp_wide_counting(cubins):
    for file, op in itertools.product(("transform", "state_fold", "rule_step"), ("LDG", "STG")):
        for name, kernel in cubins[file, "sm_90"].items():
            width = 128 if "Float32" in update_label(name) else 64  # four weights at a time, beside fp32 states
            assert kernel.widths(op)[width] >= 4, update_label(name)
            if file != "transform":
                assert kernel.shared == 0 and kernel.shared_accesses == 0
    for name, kernel in cubins["kron", "sm_90"].items():
        if update_label(name):
            assert kernel.widths("STG")[128] == 1 and kernel.widths("LDG")[128] >= 2 and kernel.widths("LDS")[128] >= 1
    for kernel in cubins["segment_histogram", "sm_90"].values():
        assert kernel.widths("LDG")[128] > 0
        atomics = [one.mnemonic for one in kernel.instructions if one.op == "ATOMS"]
        assert atomics and set(atomics) == {"ATOMS.POPC.INC.32"}  # equal bins of a warp are one addition
    assert all(kernel.widths("LDG")[128] > 0 for kernel in cubins["mask_below", "sm_90"].values())


@pytest.mark.skipif(not (CUDA_HOME / "include" / "cuda_runtime_api.h").exists(), reason="no CUDA headers")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cpp")))
def test_registration_compiles(file):
    """The registrations against the installed torch's stable headers, limited to what torch 2.10 offers."""
    torch_include = Path(torch.__file__).parent / "include"
    command = ["g++", "-std=c++17", "-fsyntax-only", "-fvisibility=hidden", "-Wall", "-Wextra", "-DUSE_CUDA"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(torch_include)]
    command += ["-isystem", str(CUDA_HOME / "include"), str(ROOT / "csrc" / "cuda" / file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
