"""The bodies of the CUDA kernels, built as host code and run in a loop, against the reference bit for bit.

What only a GPU can show (that the grid covers every unit, and the device's own instructions) is in test_cuda_kernels.
"""

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch

from zoengine.noise import table
from zoengine.ops import reference

if "cuda_bodies" not in sys.modules:  # other test files compile the same library
    _spec = importlib.util.spec_from_file_location("cuda_bodies", Path(__file__).with_name("cuda_bodies.py"))
    sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_spec.name])
bodies = sys.modules["cuda_bodies"]
address, bits, DTYPES = bodies.address, bodies.bits, bodies.DTYPES
pytestmark = pytest.mark.skipif(bodies.COMPILER is None, reason="no C++ compiler")


def elementwise(x, seeds, streams, coeffs, states, keep, sr_seed, offset, noise, *, out, stream=0, fill=False):
    args = bodies.AddNoise(
        *map(address, (x, out, seeds, streams, coeffs)), bodies.addresses(2, states), *map(address, (keep, sr_seed)),
        x.numel(), offset, stream, seeds.numel(), len(states),
    )  # fmt: skip
    bodies.call("zo_elementwise", args, DTYPES.index(x.dtype), noise, int(fill))


# (elements, offset, elements that x stands after a 64-byte boundary): whole units, cut ones, both kinds of address, and
# ranges across the places where the upper half of a block number changes.
PLACES = [
    (9000, 0, 0),
    (9000, 1024, 0),
    (20000, 5, 5),
    (20000, 5, 0),
    (9000, 8192 - 8, 8),
    (1, 0, 0),
    (300, 2**32 - 3, 1),
    (21000, 2**34 - 10000, 16),
    (9000, 2**35 - 4096, 0),
    (20000, 2**39 - 8192, 0),
    (9000, 2**63 - 9216, 0),
]
KINDS = [(1, False, 0), (2, False, 0), (3, False, 0), (1, True, 0), (0, True, 1), (2, True, 2)]
CASES = [(*place, *KINDS[i % len(KINDS)]) for i, place in enumerate(PLACES)]
CASES += [(9000, 2048, 0, *kind) for kind in KINDS]
CASES += [(9000, 3072, 0, 2, True, 2)]


@pytest.mark.parametrize("stochastic", (False, True), ids=("nearest", "stochastic"))
@pytest.mark.parametrize("noise", table.NOISES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_noise(dtype, noise, stochastic):
    if stochastic and dtype == torch.float32:
        pytest.skip("fp32 is not rounded")
    generator = torch.Generator().manual_seed(5)
    for n, offset, shift, count, decay, state_count in CASES:
        x = torch.empty(shift + n, dtype=dtype)[shift:].copy_(torch.randn(n, generator=generator))
        x[:: max(1, n // 7)] = float("nan")
        x[n // 2] = float("inf")
        seeds = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)
        coeffs = torch.randn(count + state_count, generator=generator)
        states = []
        for j in range(state_count):
            at = shift + j * (offset == 2048)  # the second of two at an address that does not suit vectors
            states.append(torch.empty(at + n)[at:].normal_(generator=generator))
        for state in states:  # the NaN that a GPU's arithmetic makes: random bits could carry out of it
            state[3 :: max(1, n // 50)] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
        keep = torch.tensor([0.75]) if decay else None
        sr_seed = torch.tensor([77]) if stochastic else None
        streams = torch.arange(count) % 3
        args = (x, seeds, streams, coeffs, states, keep, sr_seed, offset, table.NOISES[noise])
        frame = torch.full((shift + n + 64,), 3.0, dtype=dtype)  # must stay 3 outside of the range
        expected, out = torch.empty_like(x), frame[shift : shift + n]
        reference.add_noise_out(*args, 0, None, out=expected)
        elementwise(*args, out=out)
        assert torch.equal(bits(out), bits(expected)), (n, offset, shift, count, decay, state_count)
        assert (frame[:shift] == 3).all() and (frame[shift + n :] == 3).all()


@pytest.mark.parametrize("noise", table.NOISES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_fill(dtype, noise):
    seed = torch.tensor([-3])
    for n, offset, shift in PLACES[:8]:
        expected, out = torch.empty(n, dtype=dtype), torch.empty(shift + n, dtype=dtype)[shift:]
        reference.noise_fill_(expected, seed, offset, 0, table.NOISES[noise])
        elementwise(out, seed, None, None, [], None, None, offset, table.NOISES[noise], out=out, fill=True)
        assert torch.equal(bits(out), bits(expected)), (n, offset, shift)


STARTS = torch.tensor([0, 1024, 1025, 40000, 39000, 7, 300000])
LENGTHS = torch.tensor([1024, 1, 5000, 0, 2047, 263000, 3])  # not sorted, overlapping, one empty, one above 256 tiles


def segments(x, factor, columns, starts=STARTS, lengths=LENGTHS):
    out = torch.full((starts.numel(), columns), float("nan"), dtype=torch.float64)
    args = bodies.Segments(*map(address, (x, starts, lengths)), starts.numel())
    bodies.call("zo_segments", args, DTYPES.index(x.dtype), factor, out)
    return out


@pytest.fixture(scope="module")
def values():
    return torch.randn(300003, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segment_stats(values, dtype):
    x = values.to(dtype, copy=True)
    assert torch.equal(segments(x, None, 4), reference.segment_stats(x, STARTS, LENGTHS))
    x[1500] = float("nan")
    assert torch.equal(bits(segments(x, None, 4)), bits(reference.segment_stats(x, STARTS, LENGTHS)))


@pytest.mark.parametrize("dtypes", [*itertools.product(DTYPES, DTYPES)][::2], ids=str)
def test_segment_dot(values, dtypes):
    x, y = values.to(dtypes[0]), values.flip(0).contiguous().to(dtypes[1])
    out = segments(x, bodies.Factor(y=address(y), y_type=DTYPES.index(dtypes[1])), 1)
    assert torch.equal(out.squeeze(1), reference.segment_dot(x, y, STARTS, LENGTHS))


@pytest.mark.parametrize("offset", (0, 1, 300, 700, 2**40 + 32768 - 1024 - 2))
@pytest.mark.parametrize("noise", table.NOISES)
def test_segment_dot_noise(values, noise, offset):
    x, seed, kind = values[:4000].bfloat16(), torch.tensor([11]), table.NOISES[noise]
    starts, lengths = torch.tensor([0, 1024, 1025, 4000]), torch.tensor([1024, 2050, 2975, 0])
    factor = bodies.Factor(seed=address(seed), offset=offset, stream=2, noise=kind)
    out = segments(x, factor, 1, starts, lengths)
    assert torch.equal(out.squeeze(1), reference.segment_dot_noise(x, seed, starts, lengths, offset, 2, kind))


@pytest.mark.parametrize("noise", table.NOISES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segment_noise_fill(dtype, noise):
    starts, lengths = torch.tensor([3, 5003, 5004, 5004, 9000]), torch.tensor([5000, 1, 0, 3000, 1000])
    indices = torch.tensor([7, 2**33 + 5, 0, 2**34 - 1500, 2**39 - 500])
    seed, framed = torch.tensor([-5]), bodies.Framed(torch.full((10003,), 3.0, dtype=dtype), 1)
    expected = framed.tensor.clone()
    args = bodies.SegmentFill(
        *map(address, (framed.tensor, starts, lengths, indices, seed)), 5, 10003, 2, table.NOISES[noise]
    )
    reference.segment_noise_fill_(expected, seed, starts, lengths, indices, 2, table.NOISES[noise])
    bodies.call("zo_segment_fill", args, DTYPES.index(dtype))
    assert torch.equal(framed.tensor, expected)
    assert framed.intact()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segment_histogram(dtype):
    x = bodies.Framed(torch.randn(5000, generator=torch.Generator().manual_seed(2)).to(dtype), 3).tensor
    x[:3], x[100:200] = torch.tensor([float("nan"), float("-inf"), -0.0]), 0.25
    starts, lengths = torch.tensor([0, 1, 90, 4999, 7]), torch.tensor([5000, 3000, 4, 1, 0])
    prefixes = torch.zeros(5, dtype=torch.int64)
    for digit, bits_of in enumerate((12, 12, 7)):
        expected = reference.segment_histogram(x, starts, lengths, prefixes, digit)
        counts = torch.full_like(expected, -1)
        args = bodies.Histogram(
            bodies.Segments(*map(address, (x, starts, lengths)), 5), address(prefixes), address(counts), 5000, digit
        )
        bodies.call("zo_segment_histogram", args, DTYPES.index(dtype))
        assert torch.equal(counts, expected), digit
        prefixes = prefixes << bits_of | expected.argmax(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_below(dtype):
    for n, shift in [(4096, 0), (3001, 0), (3001, 3), (5, 0)]:
        x = bodies.Framed(torch.randn(n, generator=torch.Generator().manual_seed(2)).to(dtype), shift).tensor
        x[: n : max(1, n // 9)] = torch.tensor(float("nan"), dtype=dtype)
        x[3:n:7] = float("inf")
        thresholds = torch.tensor([0.5, float("inf"), 1.0, 0.0])[: -(-n // 1024)]
        expected = torch.zeros(-(-n // 8), dtype=torch.uint8)
        framed = bodies.Framed(torch.full_like(expected, 255), shift)
        reference.mask_below_(expected, x, thresholds)
        bodies.call("zo_mask_below", framed.tensor, x, DTYPES.index(dtype), thresholds, n)
        assert torch.equal(framed.tensor, expected)
        assert framed.intact()
