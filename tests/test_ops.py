"""The public ops: what they compute, against plain float64 formulas, and what they refuse."""

from types import SimpleNamespace

import pytest
import torch

from zoengine import ops
from zoengine.ops import extension, schema
from zoengine.ops.reference import round_stochastic


def test_add_noise_is_the_formula():
    x = torch.randn(3000)
    momentum = torch.randn(3000)
    z = [ops.noise_fill(3000, seed, offset=7).double() for seed in (11, 12)]
    expected = 0.75 * x.double() + 0.5 * z[0] - 2.0 * z[1] + 0.125 * momentum.double()
    out = torch.full_like(x, float("nan"))
    before = x.clone()
    returned = ops.add_noise_(
        x, [11, 12], [0.5, -2.0], offset=7, decay=0.25, states=[momentum], state_coeffs=[0.125], out=out
    )
    assert returned is out
    assert torch.equal(x, before)
    assert torch.allclose(out.double(), expected, rtol=0, atol=2e-6)
    assert ops.add_noise_(x, [11, 12], [0.5, -2.0], offset=7, decay=0.25, states=[momentum], state_coeffs=[0.125]) is x
    assert torch.equal(x, out)


def test_two_terms_in_one_pass_equal_two_fp32_passes():
    once, twice = torch.randn(5000), None
    twice = once.clone()
    ops.add_noise_(once, [1, 2], [0.3, -0.7])
    ops.add_noise_(ops.add_noise_(twice, 1, 0.3), 2, -0.7)
    assert torch.equal(once, twice)


def test_sixteen_bit_weights_are_rounded_once():
    x = torch.randn(4000).bfloat16()
    expected = ops.add_noise_(x.float(), [1, 2], [1e-3, 2e-3]).bfloat16()
    assert torch.equal(ops.add_noise_(x, [1, 2], [1e-3, 2e-3]), expected)


def test_no_terms_changes_no_bit():
    x = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45, 3.0])
    before = x.clone()
    ops.add_noise_(x, [], [])
    assert torch.equal(x.view(torch.int32), before.view(torch.int32))


def test_seeds_may_be_integers_or_tensors_of_the_same_bits():
    for seed in (5, 2**63 + 5, 2**64 - 1):
        a = ops.noise_fill(100, seed)
        b = ops.noise_fill(100, torch.tensor(seed - 2**64 if seed >= 2**63 else seed))
        assert torch.equal(a, b)


def test_decay_may_be_a_tensor():
    a, b = torch.ones(10), torch.ones(10)
    ops.add_noise_(a, [], [], decay=0.1)
    ops.add_noise_(b, [], [], decay=torch.tensor(0.1, dtype=torch.float64))
    assert torch.equal(a, b)
    assert torch.equal(a, torch.full((10,), 1 - 0.1, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [3e-7, 1e-5, 2e-2, 1.0, 300.0])
def test_stochastic_rounding_is_unbiased(dtype, scale):
    n = 400_000
    value = torch.full((n,), 1.2345 * scale)
    rounded = round_stochastic(value, torch.randint(0, 2**16, (n,)), dtype).double()
    low, high = rounded.min(), rounded.max()
    assert len(rounded.unique()) == 2
    assert low < value[0].double() < high
    p = (value[0].double() - low) / (high - low)
    sigma = (high - low) * (p * (1 - p) / n).sqrt()
    # fp16 sees 13 random bits, so the mean may be off by up to 2^-13 of a spacing
    assert abs(rounded.mean() - value[0].double()) < 4 * sigma + (high - low) * 2.0**-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_keeps_what_is_exact(dtype):
    special = torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), -float("inf"), float("nan"), 2.0**-24, -(2.0**-14)])
    for random in (0, 2**16 - 1):
        rounded = round_stochastic(special, torch.full(special.shape, random), dtype)
        assert torch.equal(rounded.isnan(), special.isnan())
        bits, expected = rounded.view(torch.int16), special.to(dtype).view(torch.int16)
        assert torch.equal(bits[~special.isnan()], expected[~special.isnan()])


def test_stochastic_rounding_overflows_to_infinity_in_fp16():
    x = torch.tensor([65504.0, 65535.0, 1e6, -1e6])
    up = round_stochastic(x, torch.full((4,), 2**16 - 1), torch.float16)
    assert up.tolist() == [65504.0, *[float("inf")] * 2, float("-inf")]
    assert round_stochastic(x, torch.zeros(4, dtype=torch.int64), torch.float16).tolist()[:2] == [65504.0, 65504.0]


def test_updates_below_an_ulp_survive_only_stochastic_rounding():
    x = torch.full((100_000,), 0.02, dtype=torch.bfloat16)
    step = -1e-6  # an ulp at 0.02 is 1.2e-4
    nearest = ops.add_noise_(x.clone(), [], [], states=[torch.ones(x.shape)], state_coeffs=[step])
    stochastic = ops.add_noise_(
        x.clone(), [], [], states=[torch.ones(x.shape)], state_coeffs=[step], rounding="stochastic", sr_seed=9
    )
    assert torch.equal(nearest, x)
    moved = (stochastic.double() - x.double()).mean().item()
    assert abs(moved / step - 1) < 0.15  # one standard deviation is 3.5 %


def test_segment_stats_and_dots_are_the_sums():
    x = torch.randn(10_000)
    starts, lengths = [0, 1024, 9000, 50], [1000, 5000, 1000, 0]
    stats = ops.segment_stats(x, starts, lengths)
    y = torch.randn(10_000).bfloat16()
    dots = ops.segment_dot(x, starts, lengths, y=y)
    noisy = ops.segment_dot(x, starts, lengths, seed=3, offset=2**33)
    z = ops.noise_fill(10_000, 3, offset=2**33).double()
    for s, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        part = slice(start, start + length)
        values = x[part].double()
        expected = [values.sum(), values.square().sum()]
        assert torch.allclose(stats[s, :2], torch.stack(expected), rtol=1e-12)
        if length:
            assert stats[s, 2:].tolist() == [values.min().item(), values.max().item()]
        else:
            assert stats[s, 2:].tolist() == [float("inf"), float("-inf")]
        assert torch.allclose(dots[s], values @ y[part].double(), rtol=1e-12)
        assert torch.allclose(noisy[s], values @ z[part], rtol=1e-12)


def test_autograd_notices_the_change():
    x = torch.randn(8, requires_grad=True)
    y = x.clone()
    product = (y * y).sum()
    ops.add_noise_(y.detach(), 1, 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_inference_tensors_are_taken():
    with torch.inference_mode():
        x = torch.zeros(10)
        ops.add_noise_(x, 1, 1.0)
    assert torch.equal(x, ops.noise_fill(10, 1))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=torch.zeros(4, 4).t()[:, :2], seeds=1, coeffs=1.0), ValueError, "contiguous"),
        (dict(x=torch.zeros(4, dtype=torch.float64), seeds=1, coeffs=1.0), TypeError, "float32, bfloat16 or float16"),
        (dict(x=[1.0], seeds=1, coeffs=1.0), TypeError, "torch.Tensor"),
        (dict(x=torch.zeros(4, device="meta"), seeds=1, coeffs=1.0), ValueError, "meta"),
        (dict(x=torch.zeros(4), seeds=2**64, coeffs=1.0), ValueError, "64 bits"),
        (dict(x=torch.zeros(4), seeds=torch.zeros(1), coeffs=1.0), TypeError, "int64"),
        (dict(x=torch.zeros(4), seeds=[1, 2], coeffs=1.0), ValueError, "2 numbers"),
        (dict(x=torch.zeros(4), seeds=1, coeffs=1.0, noise="uniform"), ValueError, "gaussian, rademacher"),
        (dict(x=torch.zeros(4), seeds=1, coeffs=1.0, rounding="up"), ValueError, "nearest, stochastic"),
        (dict(x=torch.zeros(4), seeds=1, coeffs=1.0, offset=-1), ValueError, "offset"),
        (dict(x=torch.zeros(4), seeds=1, coeffs=1.0, offset=2**63), ValueError, "offset"),
        (dict(x=torch.zeros(4), seeds=1, coeffs=1.0, stream=2**32), ValueError, "stream"),
        (dict(x=torch.zeros(4), seeds=1, coeffs=1.0, out=torch.zeros(5)), ValueError, "shape"),
        (dict(x=torch.zeros(4), seeds=1, coeffs=1.0, out=torch.zeros(4).half()), TypeError, "float32"),
        (dict(x=torch.zeros(4), seeds=1, coeffs=1.0, out=torch.zeros(4, device="meta")), ValueError, "meta"),
        (dict(x=torch.zeros(4), seeds=1, coeffs=1.0, states=[torch.zeros(3)], state_coeffs=[1.0]), ValueError, "shape"),
        (dict(x=torch.zeros(4), seeds=1, coeffs=1.0, states=[torch.zeros(4)]), ValueError, "one per state"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.add_noise_(**arguments)


@pytest.mark.parametrize(("starts", "lengths"), [([0], [11]), ([-1], [2]), ([0], [-1])])
def test_a_segment_outside_is_refused(starts, lengths):
    with pytest.raises(ValueError, match="outside"):
        ops.segment_stats(torch.zeros(10), starts, lengths)


def test_segment_dot_takes_one_of_y_and_seed():
    with pytest.raises(ValueError, match="exactly one"):
        ops.segment_dot(torch.zeros(10), [0], [10])


def test_out_may_not_overlap_x():
    memory = torch.zeros(20)
    with pytest.raises(ValueError, match="overlap"):
        ops.add_noise_(memory[:10], 1, 1.0, out=memory[5:15])


def test_backends_report_and_can_be_forced():
    found = ops.backends()
    assert set(found) == {"reference", "cpp", "triton", "cuda"}
    assert found["reference"].available
    for backend in found.values():
        assert backend.available or backend.reason
    with ops.use("reference"):
        assert ops.current("cpu") == "reference"
    with pytest.raises(RuntimeError, match="unknown backend 'cppp'"):
        ops.use("cppp")


@pytest.mark.parametrize("error", ["", "no kernel image is available for execution on the device"])
def test_cuda_kernels_built_for_other_gpus_are_refused(monkeypatch, error):
    module = SimpleNamespace(has_cuda=lambda: True, cuda_error=lambda: error)
    monkeypatch.setattr(extension, "_module", lambda: module)
    for name, value in {
        "is_available": True, "current_device": 0, "get_device_name": "A card", "get_device_capability": (12, 1)
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    if not error:
        assert set(vars(extension.load("cuda"))) == set(schema.SCHEMAS)
        return
    with pytest.raises(ImportError, match=r"not run on A card \(no kernel image.*TORCH_CUDA_ARCH_LIST=12\.1"):
        extension.load("cuda")


def test_ops_compile_without_graph_breaks():
    def step(x):
        ops_out = torch.empty_like(x)
        torch.ops.zoengine.add_noise_out(
            x, torch.tensor([1]), torch.tensor([0]), torch.tensor([0.5]), [], None, None, 0, 0, 0, None, out=ops_out
        )
        return ops_out * 2

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    x = torch.randn(100)
    assert torch.equal(compiled(x), step(x))


@pytest.mark.parametrize("noise", [0, 1])
def test_opcheck(noise):
    seeds, coeffs = torch.tensor([1, 2]), torch.tensor([0.5, 0.25, 1.0])
    x, starts, lengths = torch.randn(3000), torch.tensor([0, 1024]), torch.tensor([1000, 1500])
    checks = ("test_schema", "test_faketensor")
    streams = torch.tensor([0, 1])
    common = (seeds, streams, coeffs, [torch.randn(3000)], torch.tensor([0.9]), torch.tensor([3]), 5, noise, 0, None)
    torch.library.opcheck(torch.ops.zoengine.add_noise_.default, (x.bfloat16(), *common), test_utils=checks)
    torch.library.opcheck(
        torch.ops.zoengine.add_noise_out.default, (x, *common), {"out": torch.empty(3000)}, test_utils=checks
    )
    torch.library.opcheck(
        torch.ops.zoengine.noise_fill_.default, (x.clone(), seeds[:1], 5, 0, noise), test_utils=checks
    )
    torch.library.opcheck(torch.ops.zoengine.segment_stats.default, (x, starts, lengths), test_utils=checks)
    torch.library.opcheck(torch.ops.zoengine.segment_dot.default, (x, x.bfloat16(), starts, lengths), test_utils=checks)
    torch.library.opcheck(
        torch.ops.zoengine.segment_dot_noise.default, (x, seeds[:1], starts, lengths, 5, 0, noise), test_utils=checks
    )
