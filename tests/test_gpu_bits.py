"""The same bits on the GPU as from the C++ kernels on the CPU: every op, one to sixteen terms, roots, whole steps.

Each test also runs with the reference on the CPU in the GPU's place, on less data, so that it is itself tested.
"""

import sys
from pathlib import Path

import pytest
import torch
from gpu_places import PROCESSORS
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench/ is not installed

from bench.gpu import sync
from bench.gpu.calls import calls
from bench.gpu.check import same
from zoengine import methods, ops
from zoengine.noise import table

BACKENDS = ops.backends()
pytestmark = pytest.mark.skipif(not BACKENDS["cpp"].available, reason="the compiled extension is not installed")


def place(name):
    skip = pytest.mark.skipif("cuda" not in BACKENDS[name].devices, reason=f"{name}: {BACKENDS[name].reason}")
    return pytest.param(("cuda", name), id=name, marks=[pytest.mark.gpu, skip])


EVERYWHERE = pytest.mark.parametrize(
    "where", [pytest.param(("cpu", "reference"), id="reference"), place("triton"), place("cuda")]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def assert_same(actual, expected, what=""):
    assert bool(same(actual.cpu(), expected)), what


@EVERYWHERE
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_op(where, dtype):
    device, backend = where
    for here, there in zip(calls(dtype, torch.device("cpu")), calls(dtype, torch.device(device)), strict=True):
        for _ in range(2):
            with ops.use("cpp"):
                expected = here.run()
            with ops.use(backend):
                actual = there.run()
            for a, b in zip(actual, expected, strict=True):
                assert_same(a, b, here.name)
            here.renew()
            there.renew()


@pytest.mark.parametrize("where", [place("triton"), place("cuda")])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_op_is_captured_and_replayed(where, dtype):
    device, backend = where
    with ops.use(backend):
        for call in calls(dtype, torch.device(device)):
            passed, detail = sync.replays(call)
            assert passed, f"{call.name}: {detail}"


@EVERYWHERE
@DTYPES
@pytest.mark.parametrize("noise", table.NOISES)
def test_one_to_sixteen_terms(where, dtype, noise):
    device, backend = where
    sizes = (min(1_000_003, 8192 * PROCESSORS + 3), 7001) if device == "cuda" else (1301, 301)
    generator = torch.Generator().manual_seed(6)
    for count in range(1, 17):
        rounding = "stochastic" if count % 2 and dtype != torch.float32 else "nearest"
        for n, offset in zip(sizes, (2**32 - 1501, 2**34 + 7 * count), strict=True):
            x = torch.randn(n, generator=generator).to(dtype)
            seeds = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)
            coeffs = torch.randn(count, generator=generator)
            options = {"offset": offset, "noise": noise, "rounding": rounding, "sr_seed": 5}
            moved = x.to(device, copy=True)
            with ops.use(backend):
                ops.add_noise_(moved, seeds.to(device), coeffs.to(device), **options)
            with ops.use("cpp"):
                ops.add_noise_(x, seeds, coeffs, **options)
            assert_same(moved, x, f"{count} terms, {n} from {offset}")


@EVERYWHERE
def test_square_roots_of_every_mantissa_of_two_exponents(where):
    """The root of h in z / sqrt(h), for all h in [1, 4), and again near the ends of what is normal."""
    device, backend = where
    step = 1 if PROCESSORS > 8 else 65537
    mantissas = torch.arange(0x3F800000, 0x40800000, step, dtype=torch.int32).view(torch.float32)
    for scale in (1.0, 2.0**-120, 2.0**120):
        h = mantissas * scale
        x = torch.zeros_like(h)
        moved, diag = x.to(device, copy=True), h.to(device)
        with ops.use(backend):
            ops.add_noise_(moved, 3, 1.0, noise="rademacher", diag=diag)
        with ops.use("cpp"):
            ops.add_noise_(x, 3, 1.0, noise="rademacher", diag=h)
        assert_same(moved, x, str(scale))


def network(device, dtype):
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(33, 65), nn.Tanh(), nn.Linear(65, 17)).to(dtype).to(device)


@EVERYWHERE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["inplace", "shadow"])
@pytest.mark.parametrize("method", ["mezo", "conmezo", "loren"])
def test_ten_steps_from_recorded_losses(where, method, mode, dtype):
    """Steps on the CPU, and on the other device the same steps answered with their losses: the same weights."""
    device, backend = where
    fields = {"lr": 1e-2, "zo_eps": 1e-2, "mode": mode, "seed": 11}
    fields |= {"steps": 10} if method == "conmezo" else {}
    x = torch.randn(8, 33, generator=torch.Generator().manual_seed(1)).to(dtype)
    original, twin = network("cpu", dtype), network(device, dtype)
    first, second = methods.create(method, original, **fields), methods.create(method, twin, **fields)
    before = [parameter.clone() for parameter in original.parameters()]
    for _ in range(10 if device == "cuda" else 2):  # the reference takes long
        with ops.use("cpp"):
            first.step(lambda: original(x).float().square().mean())
        with ops.use(backend):
            second.replay(first.last_losses)
        for a, b in zip(twin.parameters(), original.parameters(), strict=True):
            assert_same(a.detach(), b.detach(), f"step {first.step_number}")
    assert all(not torch.equal(a, b) for a, b in zip(before, original.parameters(), strict=True))
