"""The CUDA C++ kernels of transforms, folds, rules and matrices on a GPU, against those for CPUs bit for bit."""

import pytest
import torch
from gpu_places import MANY, PROCESSORS, SOME, moved

from zoengine import ops
from zoengine.noise import table
from zoengine.ops import extension
from zoengine.ops.schema import RULES, TRANSFORMS

CUDA = ops.backends()["cuda"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA.available, reason=f"backend cuda is not available: {CUDA.reason}"),
]

# The C++ kernels on the CPU, whose bits are the reference's (tests/test_cpp_*.py), and which do not take minutes.
reference = extension.load("cpu") if CUDA.available else None
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [(dtype, rounding) for dtype in DTYPES for rounding in (False, True) if dtype != torch.float32 or not rounding]
# (elements, offset, terms, elements that data begins after a place that suits every vector): whole units, cut ones, and
# ranges across the places where the upper half of a block number changes.
PLACES = [
    (MANY, 0, 1, 0), (SOME, 1027, 2, 3), (SOME + 1, 2**34 - SOME // 2, 3, 0), (7, 2**40 + 1023, 1, 1),
    (9000, 2**39 - 8192, 0, 8), (5000, 2**34 - 2045, 1, 0),
]  # fmt: skip
NOISES = pytest.mark.parametrize("noise", table.NOISES.values(), ids=table.NOISES)
EVERY_CASE = pytest.mark.parametrize(("dtype", "stochastic"), CASES, ids=str)


def assert_same(actual, expected, what=""):
    actual = actual.cpu()
    if actual.is_floating_point():
        size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
        differ = (actual.view(size) != expected.view(size)) & ~(actual.isnan() & expected.isnan())
    else:
        differ = actual != expected
    assert not differ.any(), f"{what}: {int(differ.sum())} of {actual.numel()}, first at {int(differ.nonzero()[0][0])}"


def run(name, *args, shift=0, **kwargs):
    """The op on copies on the GPU, ``shift`` elements behind the beginning of their memory.

    Returns what it returns and its arguments.
    """
    args, kwargs = moved(list(args), shift), {key: moved(one, shift) for key, one in kwargs.items()}
    with ops.use("cuda"):
        return getattr(torch.ops.zoengine, name)(*args, **kwargs), args, kwargs


def copies(*values):
    return [[v.clone() for v in one] if isinstance(one, list) else one.clone() for one in values]


def terms(generator, count, sets=1, extra=0):
    return (
        torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator),
        torch.arange(count) % 3,
        torch.randn(sets * count + extra, generator=generator),
    )


def weights(generator, n, dtype):
    x = torch.randn(n, generator=generator).to(dtype)
    x[::7919] = float("nan")
    return x


def positive(generator, n):
    """Roots and divisions at their ends too: zero, subnormal, infinite, NaN, negative."""
    h = torch.rand(n, generator=generator) + 1e-3
    for k, value in enumerate((0.0, 1e-42, float("inf"), float("nan"), 3e38, 1e-38, -1.0)):
        h[k::9973] = value
    return h


@NOISES
@pytest.mark.parametrize("transform", ("scale", "mask", "diag"))
@EVERY_CASE
def test_add_transformed(dtype, stochastic, transform, noise):
    generator = torch.Generator().manual_seed(1)
    for case, (n, offset, count, shift) in enumerate(PLACES):
        x = weights(generator, n, dtype)
        if transform == "scale":
            operand = torch.randn(-(-(n + offset % 1024) // 1024), generator=generator)
        elif transform == "mask":
            operand = torch.randint(0, 256, (-(-n // 8),), generator=generator).to(torch.uint8)
        else:
            operand = positive(generator, n)
        states = [torch.randn(n, generator=generator) for _ in range(case % 3)]
        keep, sr_seed = torch.tensor([0.75]) if case % 2 else None, torch.tensor([77]) if stochastic else None
        args = (*terms(generator, count, extra=len(states)), states, keep, sr_seed, offset, noise)
        args += (TRANSFORMS[transform], operand)
        expected = torch.empty_like(x)
        reference.add_noise_out(x, *args, out=expected)
        _, _, named = run("add_noise_out", x, *args, shift=shift, out=torch.full_like(x, float("nan")))
        assert_same(named["out"], expected, f"{n} {offset}")
        _, in_place, _ = run("add_noise_", x, *args, shift=shift)
        assert_same(in_place[0], expected, f"{n} {offset} in place")


@NOISES
@pytest.mark.parametrize(("dtype", "stochastic"), [(None, False), *CASES], ids=str)
def test_state_fold(dtype, stochastic, noise):
    generator = torch.Generator().manual_seed(2)
    for case, (n, offset, count, shift) in enumerate([*PLACES, (700_003, 3 * 1024, 1, 4)]):
        state = torch.randn(n, generator=generator)
        x = None if dtype is None else weights(generator, n, dtype)
        seeds, streams, coeffs = terms(generator, count)
        keep, x_keep = (torch.tensor([0.75]) if case % 2 else None), (torch.tensor([0.5]) if case % 3 else None)
        x_coeffs = None if x is None else torch.randn(count + 2, generator=generator)
        sr_seed = torch.tensor([77]) if stochastic else None
        valid = None
        if offset % 1024 == 0:
            valid = torch.randint(0, 1025, (-(-n // 1024),), dtype=torch.int32, generator=generator)
        rest = (seeds, streams, coeffs, keep, x_coeffs, x_keep, sr_seed, valid, offset, noise)
        new, new_x = state.clone(), None if x is None else x.clone()
        squares = reference.state_fold_(new, new_x, *rest)
        for _ in range(2):
            result, args, _ = run("state_fold_", state, x, *rest, shift=shift)
            assert_same(args[0], new, f"{n} {offset}")
            assert_same(result, squares, f"squares {n} {offset}")
            if x is not None:
                assert_same(args[1], new_x, f"{n} {offset}")


@pytest.mark.skipif(PROCESSORS < 8, reason="takes too long on the simulated GPU")
def test_the_norm_of_more_tiles_than_one_step_adds():
    state, seed = torch.randn(68_000_000, generator=torch.Generator().manual_seed(3)), torch.tensor([1])
    valid = torch.full((-(-len(state) // 1024),), 1024, dtype=torch.int32)
    args = (seed, torch.zeros_like(seed), torch.ones(1), None, None, None, None, valid, 0, 0)
    result, _, _ = run("state_fold_", state, None, *args)
    assert_same(result, reference.state_fold_(state, None, *args))


@NOISES
@pytest.mark.parametrize("rule", RULES)
@EVERY_CASE
def test_rule_step(dtype, stochastic, rule, noise):
    number, state_count, names = RULES[rule]
    generator = torch.Generator().manual_seed(3)
    for case, (n, offset, count, shift) in enumerate(PLACES[1:]):
        count = 2 if rule == "adamu" else count
        x, states = weights(generator, n, dtype), [positive(generator, n) for _ in range(state_count)]
        numbers = torch.rand(len(names), generator=generator) * 0.5
        if rule == "hizoo":
            numbers[3] = case % 2
        rest = (*terms(generator, count, sets=2 if rule in ("hizoo", "adam_replay") else 1), numbers)
        rest += (torch.tensor([0.75]) if case % 2 else None, torch.tensor([7]) if stochastic else None)
        new_x, new_states = copies(x, states)
        reference.rule_step_(new_x, new_states, *rest, offset, noise, number)
        _, args, _ = run("rule_step_", x, states, *rest, offset, noise, number, shift=shift)
        assert_same(args[0], new_x, f"{n} {offset}")
        for actual, expected in zip(args[1], new_states, strict=True):
            assert_same(actual, expected, f"state {n} {offset}")


# More than one block of rows, rows narrower than a lane, wider than tiles and than shared memory, and places that suit
# no vector; (offset, terms, shift): one term, several, more than are held at all, none.
STARTS, SHAPES = [8, 300_032, 600_000, 700_001], [(130, 2048), (67, 1200), (3, 30_000), (65, 5)]
SIZE = 701_000
ROWS = [(0, 1, 0), (2**34 - 300_000, 2, 4), (5, 17, 1), (2**39 - 9000, 3, 0), (0, 0, 0)]


@NOISES
@EVERY_CASE
def test_kron(dtype, stochastic, noise):
    generator = torch.Generator().manual_seed(4)
    matrices = ops.Matrices.for_kron(STARTS, SHAPES)
    for offset, count, shift in ROWS if dtype == torch.float32 else ROWS[:2]:
        x, a = weights(generator, SIZE, dtype), torch.randn(matrices.sizes[0], generator=generator)
        kappa, (seeds, _, coeffs) = torch.rand(len(SHAPES), generator=generator), terms(generator, count)
        keep, sr_seed = torch.tensor([0.75]), torch.tensor([9]) if stochastic else None
        with_score = dtype == torch.float32 and noise == 0  # the reference takes long
        score, extents = torch.empty_like(a) if with_score else None, (matrices.blocks, matrices.widest)
        args = (a, kappa, matrices.table, seeds, coeffs, keep, sr_seed, score, offset, noise, *extents)
        expected = torch.full_like(x, 3.0)
        reference.kron_rows_out(x, *args, out=expected)
        _, moved, named = run("kron_rows_out", x, *args, shift=shift, out=torch.full_like(x, 3.0))
        assert_same(named["out"], expected, f"{offset} {count}")
        if with_score:
            assert_same(moved[8], score, f"{offset} {count}")
            alone, _, _ = run("kron_score", a, matrices.table, seeds, coeffs, offset, noise, *extents)
            assert_same(alone, score, f"{offset} {count} alone")
        _, moved, _ = run("kron_rows_", x, *args, shift=shift)
        for start, (rows, columns) in zip(STARTS, SHAPES, strict=True):
            part = slice(start, start + rows * columns)
            assert_same(moved[0][part], expected[part], "in place")


@pytest.mark.parametrize("rank", (1, 4, 33))
@EVERY_CASE
def test_lowrank_add(dtype, stochastic, rank):
    generator = torch.Generator().manual_seed(5)
    matrices = ops.Matrices.for_lowrank(STARTS, SHAPES, rank)
    for offset, shift in ((0, 0), (2**35 - 300_000, 1)):
        x = weights(generator, SIZE, dtype)
        left, right = (torch.randn(size, generator=generator) for size in matrices.sizes)
        sr_seed = torch.tensor([9]) if stochastic else None
        args = (left, right, matrices.table, torch.tensor([-0.3]), torch.tensor([0.75]) if offset else None, sr_seed)
        args += (offset, rank, matrices.blocks, matrices.widest)
        expected = torch.full_like(x, 3.0)
        reference.lowrank_add_out(x, *args, out=expected)
        _, _, named = run("lowrank_add_out", x, *args, shift=shift, out=torch.full_like(x, 3.0))
        assert_same(named["out"], expected, f"{offset}")


@NOISES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segment_noise_fill(dtype, noise):
    starts, lengths = torch.tensor([3, 5003, 5004, 5004, 9000]), torch.tensor([5000, 1, 0, 3000, 300_000])
    indices, seed = torch.tensor([7, 2**33 + 5, 0, 2**34 - 1500, 2**39 - 500]), torch.tensor([-5])
    out = torch.full((310_000,), 3.0, dtype=dtype)
    expected = out.clone()
    reference.segment_noise_fill_(expected, seed, starts, lengths, indices, 2, noise)
    _, args, _ = run("segment_noise_fill_", out, seed, starts, lengths, indices, 2, noise)
    assert_same(args[0], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_histograms_and_masks(dtype):
    x = torch.randn(2_000_003, generator=torch.Generator().manual_seed(6)).to(dtype)
    x[:3], x[1000:50_000] = torch.tensor([float("nan"), float("-inf"), -0.0]), 0.0
    starts, lengths = torch.tensor([0, 1, 90, 1_999_999, 7]), torch.tensor([2_000_003, 3000, 4, 1, 0])
    prefixes = torch.zeros(5, dtype=torch.int64)
    for digit, bits in enumerate((12, 12, 7)):
        expected = reference.segment_histogram(x, starts, lengths, prefixes, digit)
        counts, _, _ = run("segment_histogram", x, starts, lengths, prefixes, digit)
        assert_same(counts, expected, digit)
        prefixes = prefixes << bits | expected.argmax(1)
    for n in (2_000_003, 1024, 5):
        thresholds, bits = torch.rand(-(-n // 1024)), torch.full((-(-n // 8),), 255, dtype=torch.uint8)
        expected = torch.empty_like(bits)
        reference.mask_below_(expected, x[:n], thresholds)
        _, args, _ = run("mask_below_", bits, x[:n], thresholds)
        assert_same(args[0], expected, n)


def test_graphs_replay_every_op_with_new_values():
    """No op reads device memory on the host or allocates where a capture forbids it."""
    n = 50_000
    matrices = ops.Matrices.for_kron([0], [(80, 600)], device="cuda")
    low = ops.Matrices.for_lowrank([0], [(80, 600)], 2, device="cuda")
    seed, coeff = torch.tensor([1], device="cuda"), torch.tensor([0.5], device="cuda")
    x, state, a = (torch.zeros(size, device="cuda") for size in (n, n, 600))
    left, right, score = (torch.zeros(size, device="cuda") for size in (160, 1200, 600))
    kappa, scale = torch.ones(1, device="cuda"), torch.ones(-(-n // 1024), device="cuda")
    valid = torch.full((-(-n // 1024),), 1024, dtype=torch.int32, device="cuda")
    table_of = [torch.tensor(values, device="cuda") for values in ([0, 160], [160, 0], [5, 7])]
    squares, streams = torch.zeros(1, dtype=torch.float64, device="cuda"), torch.zeros_like(seed)

    def every_op():
        ops.add_noise_(x, seed, coeff, scale=scale)
        squares.copy_(ops.state_fold_(state, seed, coeff, valid=valid))
        torch.ops.zoengine.rule_step_(x, [], seed, streams, coeff, kappa, None, None, 0, 0, RULES["sign"][0])
        ops.kron_rows_(x, a, kappa, matrices, seed, coeff, score=score)
        ops.segment_noise_fill_(left, seed, *table_of, stream=2)
        ops.lowrank_add_(x, left, right, low, coeff, rank=2)
        torch.ops.zoengine.segment_histogram(x, *table_of[:2], table_of[0] * 0, 0)
        ops.mask_below(x, scale)

    with ops.use("cuda"):
        every_op()  # loads the kernels outside of the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            every_op()
        for tensor in (x, state):
            tensor.zero_()
        seed.fill_(2)
        graph.replay()
        expected = state.cpu() * 0
        sums = reference.state_fold_(
            expected, None, seed.cpu(), torch.zeros(1, dtype=torch.int64), coeff.cpu(), None, None, None, None,
            valid.cpu(), 0, 0,
        )  # fmt: skip
        assert_same(state, expected)
        assert_same(squares, sums)


def test_streams_are_read_at_replay():
    x, streams = torch.zeros(5000, device="cuda"), torch.tensor([0], device="cuda")
    seed, coeff = torch.tensor([1], device="cuda"), torch.tensor([1.0], device="cuda")
    args = (seed, streams, coeff, [], None, None, 0, 0, 0, None)
    with ops.use("cuda"):
        torch.ops.zoengine.add_noise_(x, *args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            torch.ops.zoengine.add_noise_(x, *args)
        x.zero_()
        streams.fill_(1)
        graph.replay()
        assert_same(x, ops.noise_fill(5000, 1, stream=1, device="cuda").cpu())
