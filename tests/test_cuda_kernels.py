"""The CUDA C++ kernels on a GPU: against those for CPUs and the Triton kernels, bit for bit."""

import itertools

import pytest
import torch
from gpu_places import MANY, SOME, moved

from zoengine import ops
from zoengine.noise import table
from zoengine.ops import extension

CUDA = ops.backends()["cuda"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA.available, reason=f"backend cuda is not available: {CUDA.reason}"),
]

# The C++ kernels on the CPU, whose bits are the reference's (tests/test_cpp_*.py), and which do not take minutes.
reference = extension.load("cpu") if CUDA.available else None
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (elements, offset, elements that x begins after a place that suits every vector): whole units, cut ones, and ranges
# across the places where the upper half of a block number changes.
PLACES = [
    (MANY, 0, 0), (SOME, 5, 0), (SOME, 5, 5), (SOME + 3, 2**34 - SOME // 2, 8), (7, 2**40 + 1023, 1), (1, 0, 0),
    (9000, 2**39 - 8192, 0), (SOME, 2**63 - SOME, 0),
]  # fmt: skip
NAMES = ["cuda", "triton"] if ops.backends()["triton"].available else ["cuda"]
KINDS = [(1, False, 0), (2, False, 0), (4, True, 2), (0, True, 1)]  # terms, decay, states


def assert_same(actual, expected, what=""):
    size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    actual, expected = actual.cpu(), expected.cpu()
    differ = (actual.view(size) != expected.view(size)) & ~(actual.isnan() & expected.isnan())
    assert not differ.any(), f"{what}: {int(differ.sum())} of {actual.numel()}, first at {int(differ.nonzero()[0])}"


@pytest.mark.parametrize("stochastic", (False, True), ids=("nearest", "stochastic"))
@pytest.mark.parametrize("noise", table.NOISES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_noise(dtype, noise, stochastic):
    generator = torch.Generator().manual_seed(1)
    for (n, offset, shift), (count, decay, states) in itertools.product(PLACES, KINDS):
        x = torch.randn(n, generator=generator).to(dtype)
        x[::7919] = float("nan")
        args = (
            torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator),
            torch.arange(count) % 2,
            torch.randn(count + states, generator=generator),
            [torch.randn(n, generator=generator) for _ in range(states)],
            torch.tensor([0.9]) if decay else None,
            torch.tensor([7]) if stochastic else None,
        )
        place = (offset, table.NOISES[noise], 0, None)
        expected = torch.empty_like(x)
        reference.add_noise_out(x, *args, *place, out=expected)
        on_gpu = [moved(value, shift) for value in args]
        for name in NAMES:
            with ops.use(name):
                in_place, out = moved(x, shift), moved(torch.full_like(x, float("nan")), shift)
                torch.ops.zoengine.add_noise_out(in_place, *on_gpu, *place, out=out)
                torch.ops.zoengine.add_noise_(in_place, *on_gpu, *place)
            assert_same(out, expected, f"{name} {n} {offset} {shift} {count}")
            assert_same(in_place, expected, f"{name} {n} {offset} {shift} {count} in place")


@pytest.mark.parametrize("shift", (1, 4, 8))
def test_views_at_any_address(shift):
    x = torch.zeros(10_000 + shift, device="cuda", dtype=torch.bfloat16)
    with ops.use("cuda"):
        ops.add_noise_(x[shift:], 3, 1.0, offset=shift)
        assert (x[:shift] == 0).all()
        assert_same(x[shift:], ops.noise_fill(10_000, 3, offset=shift, dtype=torch.bfloat16, device="cuda"))


@pytest.mark.parametrize("noise", table.NOISES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_fill(dtype, noise):
    """16 million normals reach every mantissa of the root often enough to trust its four instructions."""
    n = min(2**24 if dtype == torch.float32 else 2**20, 6 * MANY)
    expected = torch.empty(n, dtype=dtype)
    reference.noise_fill_(expected, torch.tensor([5]), 0, 0, table.NOISES[noise])
    with ops.use("cuda"):
        assert_same(ops.noise_fill(n, 5, noise=noise, dtype=dtype, device="cuda"), expected)


def test_graph_replays_with_new_values():
    x = torch.zeros(5000, device="cuda")
    seed, coeff = torch.tensor([1], device="cuda"), torch.tensor([0.5], device="cuda")
    with ops.use("cuda"):
        ops.add_noise_(x, seed, coeff)  # loads the kernel outside of the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ops.add_noise_(x, seed, coeff)
        x.zero_()
        seed.fill_(2)
        coeff.fill_(1.0)
        graph.replay()
        assert_same(x, ops.noise_fill(5000, 2, device="cuda"))


def test_segments():
    generator = torch.Generator().manual_seed(3)
    starts = torch.tensor([0, 1024, 1025, 40_000, 7, 2_000_000])
    lengths = torch.tensor([1024, 1, 5000, 0, 263_000, 1_000_000])  # short ones and two above 512 tiles or near it
    for dtype in DTYPES:
        x = torch.randn(3_000_001, generator=generator).to(dtype)
        y = torch.randn(3_000_001, generator=generator).bfloat16()
        with ops.use("cuda"):
            on_gpu = (starts.cuda(), lengths.cuda())
            assert_same(ops.segment_stats(x.cuda(), *on_gpu), reference.segment_stats(x, starts, lengths))
            dots = ops.segment_dot(x.cuda(), *on_gpu, y=y.cuda())
            assert_same(dots, reference.segment_dot(x, y, starts, lengths))
            for offset, noise in itertools.product((0, 1, 700), table.NOISES):
                dots = ops.segment_dot(x.cuda(), *on_gpu, seed=9, offset=offset, noise=noise)
                kind = table.NOISES[noise]
                expected = reference.segment_dot_noise(x, torch.tensor([9]), starts, lengths, offset, 0, kind)
                assert_same(dots, expected, f"{dtype} {noise} {offset}")


def test_current_stream_and_device():
    """A launch goes to torch's current stream: work queued before it there is seen, without a synchronisation."""
    stream = torch.cuda.Stream()
    with ops.use("cuda"), torch.cuda.stream(stream):
        x = torch.ones(1 << 22, device="cuda")
        torch.cuda._sleep(20_000_000)
        x.zero_()
        ops.add_noise_(x, 4, 1.0)
        assert_same(x, ops.noise_fill(1 << 22, 4, device="cuda"))
