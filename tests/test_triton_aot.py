"""What the Triton kernels compile to, read from SASS; no GPU is needed.

Instructions an element: SASS instructions from the entry of the kernel to its exit on the path that whole groups take
(see sass.py for how a path is counted: each predicated instruction counts, padding does not, and paths through
accesses of single 16-bit values, the masked ends, are left out where there is another path), divided by the elements a
thread handles. For a loop over K seeds it is the loop's body instead.

Measured numbers stand in budgets/triton_sm90.json for each version of Triton they were taken with, and may only get
better: ``python tests/triton_aot.py`` writes them anew. On a version without numbers the limits and the properties
below are checked, not the numbers.
"""

import json
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
import sass
import triton
import triton_aot as aot
from triton.compiler import make_backend
from triton.runtime import jit

from zoengine import kernels
from zoengine.noise import table
from zoengine.ops.schema import RULES, TRANSFORMS

if sass.tool("nvdisasm") is None:
    pytest.skip("no nvdisasm in Triton's package or on PATH", allow_module_level=True)
MEASURED = json.loads(aot.BUDGETS.read_text()).get(triton.__version__, {})


@pytest.mark.parametrize("name", aot.VARIANTS)
def test_budget_on_sm90(name):
    variant = aot.VARIANTS[name]
    now = aot.measure(variant)
    assert now["stack"] == 0, f"{name} keeps {now['stack']} bytes a thread in local memory"
    if variant.registers_only:
        assert now["shared_accesses"] == 0, f"{name} goes through shared memory"
    if variant.limit is not None:
        assert now["instructions"] <= variant.limit
    for what, most in MEASURED.get(name, {}).items():
        assert now[what] <= most, (
            f"{name}: {now[what]} {what}, {most} in {aot.BUDGETS.name} (Triton {triton.__version__})"
        )


@pytest.mark.parametrize("name", [name for name in aot.VARIANTS if "wide" in name])
def test_wide_rows_do_not_take_minutes_to_compile(name):
    """Which has no time in it: keeping all of a wide row makes ten times this much of it."""
    assert aot.effort(aot.VARIANTS[name].compile(aot.SM90)) < 1e9


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_whole_groups_move_16_bytes_at_a_time(dtype):
    kernel = aot.read(aot.add_noise(dtype).compile(aot.SM90))
    vectors = 32 * (4 if dtype == "fp32" else 2) // 16
    assert kernel.widths("STG") == {128: vectors}
    assert kernel.widths("LDG") == {128: vectors, 64: 1, 32: 2}  # and one seed, the half of a stream, one coefficient


def test_segments_move_16_bytes_at_a_time():
    kernel = aot.read(aot.VARIANTS["segment_dot bf16 blocks"].compile(aot.SM90))
    assert kernel.widths("LDG")[128] == 8  # 2 x 32 elements of 2 bytes


@pytest.mark.parametrize("target", [aot.SM80, aot.SM100], ids=["sm_80", "sm_100"])
def test_other_nvidia_gpus(target):
    for name in aot.KERNELS:
        variant = aot.VARIANTS[name]
        kernel = aot.read(variant.compile(target))
        assert kernel.stack == 0 and kernel.local_accesses == 0, name
        if variant.limit is not None:
            assert kernel.path() / variant.elements <= variant.limit, name
            assert kernel.shared_accesses == 0 and min(kernel.widths("STG")) == 128, name


@pytest.mark.parametrize("name", [*aot.KERNELS, "add_noise fp16 stochastic"])
def test_amd_gpus(name):
    facts = aot.amd_facts(aot.VARIANTS[name].compile(aot.GFX942))
    assert facts["vgpr_spill_count"] == 0 and facts["sgpr_spill_count"] == 0
    assert facts["vgpr_count"] <= 256


def test_new_values_do_not_recompile(monkeypatch):
    """Seeds, coefficients, offset, stream, sizes and K above 1 leave every kernel's specialisation alone."""
    backend, seen = make_backend(aot.SM90), {}

    def record(kernel):
        bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)

        def run(*args, grid, warmup, **kwargs):
            _, specialization, options = bind(*args, **kwargs)
            seen.setdefault(kernel.fn.__name__, set()).add(f"{specialization} {options}")

        monkeypatch.setattr(kernel, "run", run)

    for kernel in {variant.kernel for variant in aot.VARIANTS.values()}:
        record(kernel)
    rules = {number: states for number, states, _ in RULES.values()}
    for n, offset, stream, count in ((2**14, 0, 0, 2), (2**15, 2**40, 1, 16), (2**13, 2**33 + 2**13, 2**32 - 1, 17)):
        x, state, one = torch.zeros(n, dtype=torch.bfloat16), torch.zeros(n), torch.zeros(1)
        seeds, segments, coeffs = torch.arange(count), torch.arange(count) * 16, torch.zeros(2 * count)
        tiles, valid = torch.zeros(n // 1024), torch.zeros(n // 1024, dtype=torch.int32)
        for noise in table.NOISES.values():
            kernels.add_noise_(x, seeds, seeds, coeffs, [], None, None, offset, noise, TRANSFORMS["scale"], tiles)
            kernels.noise_fill_(x, seeds[:1], offset, stream, noise)
            kernels.state_fold_(state, x, seeds, seeds, coeffs, one, coeffs, one, None, valid, offset, noise)
        for rule, states in rules.items():
            k = 2 if rule == RULES["adamu"][0] else count
            kernels.rule_step_(
                x, [state] * states, seeds[:k], seeds, coeffs, coeffs, None, None, offset, table.GAUSSIAN, rule
            )
        kernels.segment_stats(x, segments, segments)
        kernels.segment_dot(x, x, segments, segments)
        kernels.segment_dot_noise(x, seeds[:1], segments, segments, offset, stream, table.GAUSSIAN)
        kernels.segment_noise_fill_(x, seeds[:1], segments, segments, segments, stream, table.GAUSSIAN)
        kernels.segment_histogram(x, segments, segments, segments, 1)
        kernels.mask_below_(x.view(torch.uint8), x, tiles)
        matrices = segments.repeat(6, 1).t().contiguous()
        extents = (count, 300 + count)  # blocks and the most columns
        arguments = (matrices, seeds, coeffs, one, None, state, offset, table.GAUSSIAN, *extents)
        kernels.kron_rows_(x, state, state, *arguments)
        kernels.lowrank_add_(x, state, state, matrices, one, one, None, offset, count, *extents)
    variants = {
        "add_noise_kernel": 2, "noise_fill_kernel": 2, "state_fold_kernel": 2, "tile_total_kernel": 1,
        "rule_step_kernel": len(RULES), "segment_blocks_kernel": 3, "segment_totals_kernel": 3,
        "segment_noise_fill_kernel": 1, "segment_histogram_kernel": 1, "mask_below_kernel": 1, "kron_rows_kernel": 1,
        "kron_score_kernel": 1, "lowrank_add_kernel": 1,
    }  # fmt: skip
    assert {name: len(keys) for name, keys in seen.items()} == variants
