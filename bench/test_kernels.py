"""Kernels under pytest-benchmark, for comparing two commits: ``pytest bench --benchmark-autosave``, then
``pytest bench --benchmark-compare``. Not part of the tests; the tables come from ``python -m bench.run``.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")

from bench import cases
from zoengine import ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ELEMENTS = 1 << 24
SELECTED = (
    cases.Case("copy", "bf16"),
    cases.Case("normal_add", "bf16", 1),
    cases.Case("noise_fill", "fp32"),
    cases.Case("add_noise", "fp32", 1),
    cases.Case("add_noise", "bf16", 1),
    cases.Case("add_noise", "bf16", 1, rounding="stochastic"),
    cases.Case("add_noise", "bf16", 1, noise="rademacher"),
    cases.Case("add_noise", "bf16", 4),
    cases.Case("add_noise", "bf16", 1, states=1),
    cases.Case("segment_dot_noise", "fp32"),
)


@pytest.fixture(scope="module")
def work():
    """One workspace per dtype, made when first asked for."""
    made: dict[str, cases.Workspace] = {}

    def get(dtype: str) -> cases.Workspace:
        if dtype not in made:
            made[dtype] = cases.Workspace(dtype, ELEMENTS, DEVICE)
        return made[dtype]

    return get


@pytest.mark.parametrize("case", SELECTED, ids=lambda case: case.name)
def test_kernel(benchmark, work, case):
    if ops.current(DEVICE) == "reference":
        pytest.skip(f"no kernels for {DEVICE.type} here; the plain torch reference is not worth a benchmark")
    function = cases.ours(case, work(case.dtype))

    def call() -> None:
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    call()
    benchmark.extra_info["bytes"] = case.bytes(ELEMENTS)
    benchmark.pedantic(call, rounds=10, iterations=1)
