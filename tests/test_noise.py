"""Noise stream version 1: published vectors, golden values, accuracy, purity and moments."""

import math

import pytest
import torch

from zoengine.noise import reference, seeds, table

# (seed, index, bits of the normal, sign, 16 rounding bits), stream 0 for the first two and 4 for the last.
GOLDEN = [
    (0x0000000000000000, 0, 0x3F7DBB33, +1, 0x7F09),
    (0x0000000000000000, 1, 0xBE1D5353, -1, 0x72BA),
    (0x0000000000000000, 255, 0xBF4B540F, +1, 0x512F),
    (0x0000000000000000, 256, 0xBF6CB6B0, -1, 0xF223),
    (0x0000000000000000, 1023, 0xBFB62BF1, +1, 0x1321),
    (0x0000000000000000, 1024, 0x3E2707F6, +1, 0x7290),
    (0x0000000000000000, 4294967295, 0x3E975222, +1, 0xA2AA),
    (0x0000000000000000, 4294967296, 0xBD5D592F, -1, 0x2ECD),
    (0x0000000000000000, 1099511628553, 0xBF18B8A9, -1, 0x31A8),
    (0x0000000000000001, 0, 0x3EC2C3E5, -1, 0x5460),
    (0x0000000000000001, 1, 0x3F207FA8, +1, 0x4E07),
    (0x0000000000000001, 255, 0xBF621ABC, -1, 0x5437),
    (0x0000000000000001, 256, 0xBE97B1BE, -1, 0xBB31),
    (0x0000000000000001, 1023, 0x3F76664C, -1, 0xBC19),
    (0x0000000000000001, 1024, 0x3F287BA6, +1, 0x41CD),
    (0x0000000000000001, 4294967295, 0xBE61B9A3, -1, 0xAB85),
    (0x0000000000000001, 4294967296, 0xBF9EE13C, -1, 0x855A),
    (0x0000000000000001, 1099511628553, 0xC00A8A29, +1, 0xB221),
    (0x8000000000003039, 0, 0xBF445B10, -1, 0xE01D),
    (0x8000000000003039, 1, 0xBE2896B6, -1, 0x5965),
    (0x8000000000003039, 255, 0xBF86B577, -1, 0x5B78),
    (0x8000000000003039, 256, 0xBFD17005, +1, 0x053F),
    (0x8000000000003039, 1023, 0xBF21C369, +1, 0xB20B),
    (0x8000000000003039, 1024, 0xBF67355E, +1, 0x2856),
    (0x8000000000003039, 4294967295, 0x40002251, +1, 0x7CB7),
    (0x8000000000003039, 4294967296, 0x3F45ACF3, +1, 0x5D34),
    (0x8000000000003039, 1099511628553, 0x3E4EE619, +1, 0xE294),
    (0xFFFFFFFFFFFFFFFF, 0, 0x3F8C9EC8, +1, 0x020A),
    (0xFFFFFFFFFFFFFFFF, 1, 0xBF174865, +1, 0x2A6A),
    (0xFFFFFFFFFFFFFFFF, 255, 0x3D2B28BA, +1, 0x12B6),
    (0xFFFFFFFFFFFFFFFF, 256, 0x3F21DE90, -1, 0x57D4),
    (0xFFFFFFFFFFFFFFFF, 1023, 0x3EB9A4F3, +1, 0xD234),
    (0xFFFFFFFFFFFFFFFF, 1024, 0xBFAAC426, -1, 0x5EB1),
    (0xFFFFFFFFFFFFFFFF, 4294967295, 0x3F81E605, +1, 0xC27F),
    (0xFFFFFFFFFFFFFFFF, 4294967296, 0xBF18D7A9, -1, 0xA164),
    (0xFFFFFFFFFFFFFFFF, 1099511628553, 0xBF335676, +1, 0x6121),
]

# Key words, counter words, output words: the known answers published with Random123 for philox4x32-10.
RANDOM123 = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def _seed(value: int) -> torch.Tensor:
    return torch.tensor(seeds.to_int64(value))


@pytest.mark.parametrize(("key", "counter", "expected"), RANDOM123)
def test_philox_gives_the_published_words(key, counter, expected):
    assert seeds.philox4x32(key, counter) == expected


def test_the_torch_philox_is_the_integer_philox():
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 2**62, (50,), generator=generator)
    key = 0xFEDCBA9876543210
    words = torch.stack(reference.philox4x32(_seed(key), blocks, stream=5), dim=1).tolist()
    for block, found in zip(blocks.tolist(), words, strict=True):
        expected = seeds.philox4x32((key & 0xFFFFFFFF, key >> 32), (block & 0xFFFFFFFF, block >> 32, 5, 0))
        assert tuple(found) == expected


@pytest.mark.parametrize(("seed", "index", "bits", "sign", "rounding"), GOLDEN)
def test_golden_values(seed, index, bits, sign, rounding):
    normal = reference.fill(_seed(seed), index, 1, table.STREAM_DIRECTION, table.GAUSSIAN)
    assert normal.view(torch.int32).item() & 0xFFFFFFFF == bits
    assert reference.fill(_seed(seed), index, 1, table.STREAM_DIRECTION, table.RADEMACHER).item() == sign
    assert reference.fill(_seed(seed), index, 1, table.STREAM_ROUNDING, "rounding").item() == rounding


def test_normals_are_within_six_ulp_of_float64():
    words = reference.philox4x32(_seed(3), torch.arange(1 << 19), 0)
    u = (words[0] >> 1).float().double() * 2.0**-31 + 2.0**-32
    radius = (-2 * u.float().double().log()).sqrt()
    angle = words[1].double() * (2 * math.pi / 2**32)
    z0, z1 = reference.box_muller(words[0], words[1])
    for found, exact in ((z0, radius * angle.cos()), (z1, radius * angle.sin())):
        error = (found.double() - exact).abs()
        ulp = 2.0 ** (exact.abs().log2().floor() - 23)
        assert (error / ulp)[exact.abs() > 1e-3].max() <= 6
        assert error.max() <= 1e-6


def test_fma_rounds_once():
    # 1 + 2^-12 squared is 1 + 2^-11 + 2^-24: a tie in fp32, which float64 resolves only if rounded to odd.
    a = torch.tensor([1 + 2.0**-12])
    tiny = torch.tensor([2.0**-100])
    assert reference.fma(a, a, tiny).item() == 1 + 2.0**-11 + 2.0**-23
    assert reference.fma(a, a, -tiny).item() == 1 + 2.0**-11


@pytest.mark.parametrize("kind", [table.GAUSSIAN, table.RADEMACHER, "rounding"])
@pytest.mark.parametrize("offset", [0, 5, 1000, 2**32 - 700])
def test_a_slice_is_the_slice_of_the_whole(kind, offset):
    seed = _seed(99)
    whole = reference.fill(seed, offset, 5000, 0, kind)
    for start, count in ((0, 1), (17, 1024), (1023, 2), (4999, 1), (2047, 2049)):
        assert torch.equal(reference.fill(seed, offset + start, count, 0, kind), whole[start : start + count])


def test_moments_of_normals():
    z = reference.fill(_seed(2024), 0, 1 << 21, 0, table.GAUSSIAN).double()
    n = z.numel()
    # E z^(2p) = (2p-1)!!, and the standard error of its estimate is sqrt(((4p-1)!! - (2p-1)!!^2) / n).
    for p in range(1, 9):
        odd = math.prod(range(1, p, 2)) if p % 2 == 0 else 0
        variance = math.prod(range(1, 2 * p, 2)) - odd**2
        assert abs((z**p).mean().item() - odd) <= 4.5 * math.sqrt(variance / n), p


def test_seeds_streams_and_neighbours_are_uncorrelated():
    n = 1 << 20
    base = reference.fill(_seed(1), 0, n, 0, table.GAUSSIAN).double()
    others = {
        "another seed": reference.fill(_seed(2), 0, n, 0, table.GAUSSIAN),
        "high seed word": reference.fill(_seed(1 + (1 << 32)), 0, n, 0, table.GAUSSIAN),
        "another stream": reference.fill(_seed(1), 0, n, 1, table.GAUSSIAN),
        "2^32 elements on": reference.fill(_seed(1), 2**32, n, 0, table.GAUSSIAN),
        "next element": base.roll(1),
        "same lane, next row": base.roll(256),
        "next tile": base.roll(1024),
    }
    for what, other in others.items():
        assert abs((base * other.double()).mean().item()) < 4.5 / math.sqrt(n), what
        assert abs(((base**2 - 1) * (other.double() ** 2 - 1)).mean().item()) < 4.5 * 2 / math.sqrt(n), what


def test_query_seeds_are_stateless_and_distinct():
    drawn = {s for step in range(50) for query in range(4) for s in seeds.query_seeds(7, step, query)}
    assert len(drawn) == 50 * 4 * 2
    w = seeds.philox4x32((42, 0), (7, 0, table.STREAM_RUN_SEED, 3))
    assert seeds.query_seeds(42, 7, 3) == (w[0] | w[1] << 32, w[2] | w[3] << 32)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_outside_64_bits_is_refused(seed):
    with pytest.raises(ValueError, match="64 bits"):
        seeds.query_seeds(seed, 0)


def test_a_seed_that_is_no_integer_is_refused():
    with pytest.raises(TypeError, match="must be an integer"):
        seeds.query_seeds(1.5, 0)


def test_table_floats_are_exact_in_fp32():
    for name, value in vars(table).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float):
                assert torch.tensor(number, dtype=torch.float32).item() == number, name
