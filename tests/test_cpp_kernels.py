"""The C++ CPU kernels against the reference, bit for bit, on every instruction set that this CPU runs."""

import functools
import itertools

import pytest
import torch
from bitwise import assert_same, bits

from zoengine import ops
from zoengine.noise import table
from zoengine.ops import extension, reference
from zoengine.ops.schema import TRANSFORMS

try:
    cpp = extension.load("cpu")
    ISAS = extension.isas()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NOISES = (table.GAUSSIAN, table.RADEMACHER)
# Every size and offset where a tile, a unit or a word of the counter begins or ends, each with other K, decay, states.
SIZES = (1, 7, 255, 256, 1023, 1024, 1025, 2048, 5000, 9000)
OFFSETS = (0, 5, 1000, 1024, 2**32 - 3, 2**33 + 77, 2**40, 2**63 - 9000)
CASES = [
    (n, offset, (i + i // 8) % 4, i % 3 == 1, i % 5 % 3)
    for i, (n, offset) in enumerate(itertools.product(SIZES, OFFSETS))
    if i % 3 == 0 or n in (7, 5000)
]
CASES += [(33000, 2**15 - 5, 1, False, 0), (3000, 999, 16, True, 1)]

NO_TRANSFORM = (TRANSFORMS["none"], None)

isa = pytest.mark.parametrize("isa", ISAS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
noises = pytest.mark.parametrize("noise", NOISES, ids=("gaussian", "rademacher"))


@functools.cache
def case(n, offset, count, decay, states, dtype, noise, stochastic, transform="none"):
    """Arguments of add_noise_ without out, and what the reference makes of them."""
    generator = torch.Generator().manual_seed(n + 31 * count)
    args = (
        torch.randn(n, generator=generator).to(dtype),
        torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator),
        torch.arange(count) % 2 + table.STREAM_DIRECTION,
        torch.randn(count + states, generator=generator),
        [torch.randn(n, generator=generator) for _ in range(states)],
        torch.tensor(1 - 0.1, dtype=torch.float32) if decay else None,
        torch.tensor(-77 - n) if stochastic else None,
        offset,
        noise,
        TRANSFORMS[transform],
        operand(transform, n, offset, generator),
    )
    expected = torch.empty_like(args[0])
    reference.add_noise_out(*args, out=expected)
    return args, expected


def operand(transform, n, offset, generator):
    tiles = (offset % 1024 + n + 1023) // 1024
    return {
        "none": None,
        "scale": torch.randn(tiles, generator=generator),
        "mask": torch.randint(0, 256, ((n + 7) // 8,), generator=generator, dtype=torch.uint8),
        "diag": torch.rand(n, generator=generator) * 3,
    }[transform]


@isa
@dtypes
@noises
@pytest.mark.parametrize("stochastic", [False, True], ids=("nearest", "stochastic"))
def test_add_noise_is_the_reference(isa, dtype, noise, stochastic):
    with extension.use_isa(isa):
        for parameters in CASES:
            args, expected = case(*parameters, dtype, noise, stochastic)
            x, out = args[0].clone(), torch.full_like(expected, float("nan"))
            cpp.add_noise_out(x, *args[1:], out=out)
            assert_same(out, expected, f"{parameters}, out")
            assert torch.equal(x, args[0]), f"{parameters}: x was written to"
            cpp.add_noise_(x, *args[1:])
            assert_same(x, expected, f"{parameters}, in place")


# One term and several; cut units at both ends and whole ones between; a mask that does not start at a whole byte.
TRANSFORMED = [
    (5000, 1024, 1, False, 0),
    (5000, 2**33 + 77, 2, True, 1),
    (9000, 2**32 - 3, 6, False, 0),
    (2048, 2048, 1, True, 2),
    (6145, 8, 1, False, 0),
    (3, 1023, 2, False, 0),
    (700, 2**40 + 300, 0, True, 1),
]


@isa
@dtypes
@noises
@pytest.mark.parametrize("transform", ["scale", "mask", "diag"])
def test_transforms_are_the_reference(isa, dtype, noise, transform):
    with extension.use_isa(isa):
        for i, parameters in enumerate(TRANSFORMED):
            args, expected = case(*parameters, dtype, noise, i % 2 == 0, transform)
            x, out = args[0].clone(), torch.full_like(expected, float("nan"))
            cpp.add_noise_out(x, *args[1:], out=out)
            assert_same(out, expected, f"{parameters}, out")
            cpp.add_noise_(x, *args[1:])
            assert_same(x, expected, f"{parameters}, in place")


@isa
@dtypes
@noises
def test_noise_fill_is_the_reference(isa, dtype, noise):
    with extension.use_isa(isa):
        for n, offset in itertools.product((1, 1025, 5000), OFFSETS):
            out, expected = torch.full((n,), 7.0, dtype=dtype), torch.empty(n, dtype=dtype)
            seed = torch.tensor(offset ^ 0x5DEECE66D)
            cpp.noise_fill_(out, seed, offset, table.STREAM_STATE, noise)
            reference.noise_fill_(expected, seed, offset, table.STREAM_STATE, noise)
            assert_same(out, expected, f"{n} at {offset}")


@isa
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=("bfloat16", "float16"))
@pytest.mark.parametrize("stochastic", [False, True], ids=("nearest", "stochastic"))
def test_rounding_of_any_fp32_value(isa, dtype, stochastic):
    generator = torch.Generator().manual_seed(5)
    patterns = torch.randint(-(2**31), 2**31 - 1, (60_000,), generator=generator).to(torch.int32)
    near_fp16 = torch.randn(60_000, generator=generator) * 2.0 ** torch.randint(-30, 20, (60_000,), generator=generator)
    halfway = (patterns & -0x10000 | 0x8000).view(torch.float32)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, -1e-45, 3.4028235e38, 65504.0])
    special = torch.cat((special, torch.tensor([65519.0, 65519.99, 65520.0, -65536.0, 2.0**-14, 2.0**-25, 2.0**-24])))
    values = torch.cat((patterns.view(torch.float32), near_fp16, halfway, special, -special))
    # -0 + 1 * value is the value itself: the whole range of fp32 reaches the rounding
    x = torch.full_like(values, -0.0, dtype=dtype)
    seed = torch.tensor(3) if stochastic else None
    none = torch.zeros(0, dtype=torch.int64)
    args = (none, none, torch.ones(1), [values], None, seed, 3, table.GAUSSIAN, *NO_TRANSFORM)
    expected = torch.empty_like(x)
    reference.add_noise_out(x, *args, out=expected)
    with extension.use_isa(isa):
        cpp.add_noise_(x, *args)
    assert_same(x, expected)


@isa
@dtypes
def test_special_weights(isa, dtype):
    low, high = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    weights = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), low, -low / 4, high, -high, 1.0]
    x = torch.tensor(weights, dtype=dtype).repeat(300)
    for coefficient, seed in itertools.product((0.0, -0.0, 1e-3, 1e38, float("inf"), float("nan")), (None, 9)):
        sr = None if seed is None else torch.tensor(seed)
        terms = (torch.tensor([1]), torch.tensor([0]), torch.tensor([coefficient]))
        args = (x, *terms, [], None, sr, 11, table.GAUSSIAN, *NO_TRANSFORM)
        out, expected = torch.empty_like(x), torch.empty_like(x)
        reference.add_noise_out(*args, out=expected)
        with extension.use_isa(isa):
            cpp.add_noise_out(*args, out=out)
        assert_same(out, expected, f"coefficient {coefficient}")


@isa
@dtypes
@noises
def test_slices_give_what_the_whole_gives(isa, dtype, noise):
    x = torch.randn(100_000).to(dtype)
    state = torch.randn(100_000)
    common = (None, torch.tensor(4))
    terms = (torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([0.1, -0.2, 0.3]))
    with extension.use_isa(isa):
        whole, pieces = x.clone(), x.clone()
        cpp.add_noise_(whole, *terms, [state], *common, 77, noise, *NO_TRANSFORM)
        for piece in torch.arange(100_000).split([1, 1022, 3000, 40_000, 2048, 53_929]):
            a, b = piece[0].item(), piece[-1].item() + 1
            cpp.add_noise_(pieces[a:b], *terms, [state[a:b]], *common, 77 + a, noise, *NO_TRANSFORM)
    assert_same(pieces, whole)


def test_results_do_not_depend_on_the_number_of_threads():
    def everything():
        x = torch.linspace(-1, 1, 300_001).bfloat16()
        terms = (torch.tensor([1]), torch.tensor([0]), torch.tensor([0.5]))
        starts, lengths = torch.tensor([0, 100_000]), torch.tensor([99_000, 200_001])
        cpp.add_noise_(x, *terms, [], None, torch.tensor(2), 5, table.GAUSSIAN, *NO_TRANSFORM)
        yield x
        cpp.add_noise_(x, *terms, [], None, torch.tensor(2), 5, table.RADEMACHER, *NO_TRANSFORM)
        yield x
        yield cpp.segment_stats(x, starts, lengths)
        yield cpp.segment_dot(x, x, starts, lengths)
        yield cpp.segment_dot_noise(x, torch.tensor(1), starts, lengths, 5, 0, table.GAUSSIAN)

    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([result.clone() for result in everything()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same(b, a)


# Empty, inside a tile, whole tiles, overlapping, unaligned, and more tiles than the 256 lanes of the second sum.
STARTS = torch.tensor([0, 5, 1024, 3000, 9, 70_001, 0])
LENGTHS = torch.tensor([3, 0, 2048, 5000, 1023, 200_003, 300_000])


@isa
@dtypes
def test_sums_are_the_reference(isa, dtype):
    x, y = torch.randn(300_000).to(dtype), torch.randn(300_000)
    with extension.use_isa(isa):
        assert_same(cpp.segment_stats(x, STARTS, LENGTHS), reference.segment_stats(x, STARTS, LENGTHS), "stats")
        for other in (y, y.bfloat16(), y.half()):
            assert_same(
                cpp.segment_dot(x, other, STARTS, LENGTHS), reference.segment_dot(x, other, STARTS, LENGTHS), "dot"
            )
        for noise, offset in itertools.product(NOISES, (0, 2**32 - 1000)):
            args = (x, torch.tensor(8), STARTS[:-2], LENGTHS[:-2], offset, 1, noise)
            assert_same(cpp.segment_dot_noise(*args), reference.segment_dot_noise(*args), "dot with noise")
        none = torch.zeros(0, dtype=torch.int64)
        assert cpp.segment_stats(x, none, none).shape == (0, 4)
        assert cpp.segment_dot(x, y, none, none).shape == (0,)


@isa
@pytest.mark.parametrize("place", [0, 700, 1500, 2999])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 9.0, -9.0])
def test_stats_see_every_element(isa, place, value):
    x = torch.rand(3000)
    x[place] = value
    starts, lengths = torch.tensor([0]), torch.tensor([3000])
    with extension.use_isa(isa):
        assert_same(cpp.segment_stats(x, starts, lengths), reference.segment_stats(x, starts, lengths))


def test_zeros_have_one_sign_in_the_extremes():
    for x in (torch.zeros(40), -torch.zeros(40), torch.tensor([0.0, -0.0] * 20)):
        low, high = cpp.segment_stats(x, torch.tensor([0]), torch.tensor([40]))[0, 2:]
        assert bits(torch.stack((low, high))).tolist() == [0, 0]


@pytest.mark.parametrize("out_of_place", [False, True])
def test_opcheck_of_add_noise(out_of_place):
    x = torch.randn(3000).bfloat16()
    terms = (torch.tensor([1, 2]), torch.tensor([0, 1]), torch.ones(3))
    args = (
        *terms,
        [torch.randn(3000)],
        torch.tensor([0.9]),
        torch.tensor([1]),
        5,
        0,
        TRANSFORMS["diag"],
        x.float().abs(),
    )
    with ops.use("cpp"):
        if out_of_place:
            torch.library.opcheck(torch.ops.zoengine.add_noise_out.default, (x, *args), {"out": torch.empty_like(x)})
        else:
            torch.library.opcheck(torch.ops.zoengine.add_noise_.default, (x, *args))


def test_opcheck_of_the_other_ops():
    x, seed = torch.randn(3000), torch.tensor(1)
    starts, lengths = torch.tensor([0, 100]), torch.tensor([100, 2900])
    with ops.use("cpp"):
        torch.library.opcheck(torch.ops.zoengine.noise_fill_.default, (x, seed, 0, 0, 0))
        torch.library.opcheck(torch.ops.zoengine.segment_stats.default, (x, starts, lengths))
        torch.library.opcheck(torch.ops.zoengine.segment_dot.default, (x, x.half(), starts, lengths))
        torch.library.opcheck(torch.ops.zoengine.segment_dot_noise.default, (x, seed, starts, lengths, 0, 0, 1))


def test_the_public_ops_run_on_these_kernels():
    assert ops.current("cpu") == "cpp"
    x = torch.randn(5000)
    version = x._version
    with ops.use("reference"):
        expected = ops.add_noise_(x.clone(), [1, 2], [0.5, -1.0], offset=9, decay=0.1)
    assert_same(ops.add_noise_(x, [1, 2], [0.5, -1.0], offset=9, decay=0.1), expected)
    assert x._version > version


@pytest.fixture
def fresh_module():
    extension._module.cache_clear()
    yield
    extension._module.cache_clear()


def test_the_environment_chooses_the_instruction_set(monkeypatch, fresh_module):
    best = extension.isa()
    with extension.use_isa(best):
        monkeypatch.setenv(extension.ISA_VARIABLE, "scalar")
        extension._module.cache_clear()
        assert extension.isa() == "scalar"
        assert extension.build_info()["isa"] == "scalar"
    assert extension.isa() == best


@pytest.mark.parametrize("name", ["sse9", *({"scalar", "avx2", "avx512"} - set(ISAS))])
def test_an_instruction_set_that_cannot_run_is_refused(monkeypatch, fresh_module, name):
    monkeypatch.setenv(extension.ISA_VARIABLE, name)
    reason = "but this CPU and build offer" if name in extension.ISAS else "expected one of scalar"
    with pytest.raises(ValueError, match=f"{extension.ISA_VARIABLE}='{name}'.*{reason}"):
        extension.load("cpu")
    with pytest.raises(ValueError, match=name), extension.use_isa(name):
        pass
