"""The C++ CPU kernels of states, rules, matrices and counts against the reference, bit for bit, on every instruction
set that this CPU runs. ``add_noise_`` and the sums are in test_cpp_kernels.py."""

import functools
import itertools

import pytest
import torch
from bitwise import assert_same

from zoengine import ops
from zoengine.noise import table
from zoengine.ops import extension, reference
from zoengine.ops.schema import RULES, SCHEMAS

try:
    cpp = extension.load("cpu")
    ISAS = extension.isas()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NOISES = (table.GAUSSIAN, table.RADEMACHER)

isa = pytest.mark.parametrize("isa", ISAS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
noises = pytest.mark.parametrize("noise", NOISES, ids=("gaussian", "rademacher"))

# Elements and offset: a part of a unit, cut units at both ends, whole units, places beyond 32 bits; then K.
PLACES = [(3, 1023, 1), (5000, 1024, 2), (6149, 2**32 - 2051, 1), (4096, 2**40, 6), (9000, 2**63 - 9000, 3)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def terms_of(count, coefficients):
    generator = torch.Generator().manual_seed(count)
    seeds = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)
    return seeds, torch.arange(count) % 2, randn(coefficients, seed=7) / 2


def both(op, tensors, *args, **kwargs):
    """Run ``op`` of the kernels and of the reference on copies of ``tensors``; what they wrote, and their results."""
    found = []
    for backend in (cpp, reference):
        copies = [[t.clone() for t in tensor] if isinstance(tensor, list) else tensor.clone() for tensor in tensors]
        result = getattr(backend, op)(*copies, *args, **kwargs)
        written = [t for copy in copies for t in (copy if isinstance(copy, list) else [copy])]
        found.append([*written, *([] if result is None else [result])])
    return zip(*found, strict=True)


@functools.cache
def fold_case(n, offset, count, dtype, noise, mode):
    """Arguments of state_fold_, and what the reference makes of them. ``mode`` counts what is left out."""
    terms = terms_of(count, count)
    fused, stochastic, kept, normed = mode % 2 == 0, mode % 3 == 0, mode % 4 < 2, offset % 1024 == 0
    state, x = randn(n), randn(n, seed=3).to(dtype)
    factor, x_factor = torch.tensor([0.9]), torch.tensor([1 - 1e-3])
    valid = torch.arange(-(-n // 1024)).flip(0).mul(333).clamp(max=1024).int() if normed else None
    rest = (
        *terms, factor if kept else None, randn(count + 2, seed=5) if fused else None, x_factor if fused else None,
        torch.tensor([-5 - n]) if stochastic else None, valid, offset, noise,
    )  # fmt: skip
    after_state, after_x = state.clone(), x.clone()
    squares = reference.state_fold_(after_state, after_x if fused else None, *rest)
    return state, x if fused else None, rest, after_state, after_x, squares


@isa
@dtypes
@noises
def test_state_fold_is_the_reference(isa, dtype, noise):
    with extension.use_isa(isa):
        for mode, (n, offset, count) in enumerate([*PLACES, (2048, 1024, 0), (0, 1024, 1), (5000, 2048, 1)]):
            state, x, rest, after_state, after_x, squares = fold_case(n, offset, count, dtype, noise, mode)
            state, x = state.clone(), x if x is None else x.clone()
            found = cpp.state_fold_(state, x, *rest)
            what = f"{n} at {offset}"
            assert_same(state, after_state, f"state, {what}")
            assert_same(found, squares, f"sum of squares, {what}")
            if x is not None:
                assert_same(x, after_x, f"x, {what}")


def test_the_norm_counts_no_more_than_there_is_of_the_last_tile():
    state, none = torch.ones(1500), torch.zeros(0, dtype=torch.int64)
    valid = torch.tensor([1024, 1024], dtype=torch.int32)
    rest = (torch.tensor([5]), torch.tensor([0]), torch.tensor([0.5]), None, None, None, None, valid, 1024, 0)
    assert torch.equal(cpp.state_fold_(state.clone(), None, *rest), reference.state_fold_(state.clone(), None, *rest))
    unmoved = (none, none, none.float(), *rest[3:])
    assert cpp.state_fold_(state, None, *unmoved).item() == 1500 and valid.tolist() == [1024, 1024]


def test_the_norm_counts_valid_elements_alone():
    state = randn(5000)
    state[1500] = float("nan")
    valid = torch.tensor([1024, 400, 0, 1024, 10_000], dtype=torch.int32)
    none = torch.zeros(0, dtype=torch.int64)
    rest = (none, none, none.float(), None, None, None, None, valid, 1024, 0)
    (_, _), (found, expected) = both("state_fold_", [state], None, *rest)
    assert_same(found, expected)
    assert torch.isfinite(found).all()


SCALARS = {
    "sign": (-0.125,),
    "adam": (0.9, 0.1, 0.99, 0.01, 1.5, 1e-3, -0.01),
    "amsgrad": (0.9, 0.1, 0.99, 0.01, 1.5, 1e-3, -0.01),
    "adamu": (0.4, 0.7, 0.6, 0.2, 0.8, 1e-8, -0.05, -1.0),
    "hizoo": (0.9, 1.0, 0.4, 1.0),
    "adam_replay": (2.0, 1e-3, -0.01),
}


@functools.cache
def rule_case(rule, n, offset, count, dtype, noise, mode):
    number, states, _ = RULES[rule]
    count = 2 if rule == "adamu" else count
    sets = 2 if rule in ("hizoo", "adam_replay") else 1
    x, states = randn(n).to(dtype), [randn(n, seed=j).abs() for j in range(states)]
    if states:
        states[-1][1::7] = 0.0
        states[-1][::5] = 1e-41  # a subnormal root
    scalars = list(SCALARS[rule])
    if rule == "hizoo":
        scalars[3] = float(mode % 2)
    rest = (
        *terms_of(count, sets * count), torch.tensor(scalars), torch.tensor([0.99]) if mode % 2 else None,
        torch.tensor([n]) if mode % 3 else None, offset, noise, number,
    )  # fmt: skip
    after_x, after = x.clone(), [state.clone() for state in states]
    reference.rule_step_(after_x, after, *rest)
    return x, states, rest, after_x, after


@isa
@dtypes
@noises
@pytest.mark.parametrize("rule", RULES)
def test_rules_are_the_reference(isa, dtype, noise, rule):
    with extension.use_isa(isa):
        for mode, place in enumerate(PLACES[:4]):
            x, states, rest, after_x, after = rule_case(rule, *place, dtype, noise, mode)
            x, states = x.clone(), [state.clone() for state in states]
            cpp.rule_step_(x, states, *rest)
            assert_same(x, after_x, f"x, {place}")
            for j, (actual, expected) in enumerate(zip(states, after, strict=True)):
                assert_same(actual, expected, f"state {j}, {place}")


@isa
@pytest.mark.parametrize("rule", ["sign", "amsgrad", "hizoo"])
def test_rules_with_values_that_are_no_numbers(isa, rule):
    number, count, _ = RULES[rule]
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1.0, -1.0])
    triples = torch.tensor(list(itertools.product(special.tolist(), repeat=3)))
    x, states = triples[:, 0].clone(), [triples[:, (j + 1) % 3].clone() for j in range(count)]
    terms = (torch.tensor([3]), torch.tensor([0]), torch.tensor([1.0, 0.25]))
    for coefficient in (1.0, 0.0, float("nan")):
        terms[2][0] = coefficient
        with extension.use_isa(isa):
            pairs = both("rule_step_", [x, states], *terms, torch.tensor(SCALARS[rule]), None, None, 5, 0, number)
            for j, (found, expected) in enumerate(pairs):
                # Which zero is the larger one is not part of the contract.
                assert_same(found + 0.0, expected + 0.0, f"coefficient {coefficient}, tensor {j}")


# Rows and columns: one row, one column, rows within a tile, rows over tiles, more rows than a block, no multiple of
# anything; matrices that do not start at a tile.
SHAPES = ((1, 700), (130, 1), (70, 33), (12, 2100), (64, 8), (5, 1024), (17, 100))
UNTOUCHED = 2.0**14  # in out where no matrix is
KRON_CASES = [(0, 1, 0), (7, 2, 1), (2**32 - 5000, 6, 2), (2**40, 1, 3), (1024, 0, 4)]


def matrices_at(shapes, *parts, gap=5):
    """The table of ``zoengine/ops/schema.py`` for matrices with gaps between them, and how long x has to be."""
    rows, start, blocks, places = [], gap, 0, [0] * len(parts)
    for m, n in shapes:
        rows.append([start, m, n, blocks, *places])
        places = [place + (m, n)[axis] * factor for place, (axis, factor) in zip(places, parts, strict=True)]
        start, blocks = start + m * n + gap, blocks + -(-m // 64)
    return torch.tensor(rows), start, blocks, max(n for _, n in shapes), places


@functools.cache
def kron_case(offset, count, mode, dtype, noise):
    shapes = SHAPES if count < 6 else SHAPES[-3:]
    segments, length, blocks, widest, (size,) = matrices_at(shapes, (1, 1))
    seeds, _, coeffs = terms_of(count, count)
    a, kappa = randn(size), randn(len(shapes)) / 50
    keep, sr_seed = torch.tensor([0.9]) if mode % 2 else None, torch.tensor([mode]) if mode % 3 else None
    x, out = randn(length).to(dtype), torch.full((length,), UNTOUCHED, dtype=dtype)
    before = (a, kappa, segments, seeds, coeffs, keep, sr_seed)
    after = (offset, noise, blocks, widest)
    score = torch.empty(size)
    reference.kron_rows_out(x, *before, score, *after, out=out)
    return x, before, after, out, score


@isa
@dtypes
@noises
@pytest.mark.parametrize("parameters", KRON_CASES, ids=lambda p: f"offset{p[0]}-k{p[1]}")
def test_kron_rows_are_the_reference(isa, dtype, noise, parameters):
    x, before, after, expected, expected_score = kron_case(*parameters, dtype, noise)
    with extension.use_isa(isa):
        out, score = torch.full_like(x, UNTOUCHED), torch.full_like(expected_score, float("nan"))
        cpp.kron_rows_out(x.clone(), *before, score, *after, out=out)
        assert_same(out, expected, "out")
        assert_same(score, expected_score, "score")
        in_place = x.clone()
        cpp.kron_rows_(in_place, *before, None, *after)
        assert_same(in_place, torch.where(expected == UNTOUCHED, x, expected), "in place")
        a, _, segments, seeds, coeffs, _, _ = before
        assert_same(cpp.kron_score(a, segments, seeds, coeffs, *after), expected_score, "score alone")


@functools.cache
def lowrank_case(rank, mode, dtype):
    segments, length, blocks, widest, sizes = matrices_at(SHAPES, (0, rank), (1, rank), gap=3 + mode)
    keep, sr_seed = torch.tensor([0.9]) if mode % 2 else None, torch.tensor([mode]) if mode % 3 else None
    left, right = (randn(size) for size in sizes)
    x, out = randn(length).to(dtype), torch.full((length,), UNTOUCHED, dtype=dtype)
    rest = (left, right, segments, torch.tensor([0.3]), keep, sr_seed, 2**32 - 3000 * mode, rank, blocks, widest)
    reference.lowrank_add_out(x, *rest, out=out)
    return x, rest, out


@isa
@dtypes
@pytest.mark.parametrize("rank", [1, 2, 5, 64])
def test_lowrank_add_is_the_reference(isa, dtype, rank):
    for mode in range(4):
        x, rest, expected = lowrank_case(rank, mode, dtype)
        with extension.use_isa(isa):
            out = torch.full_like(x, UNTOUCHED)
            cpp.lowrank_add_out(x.clone(), *rest, out=out)
            assert_same(out, expected, f"mode {mode}, out")
            in_place = x.clone()
            cpp.lowrank_add_(in_place, *rest)
            assert_same(in_place, torch.where(expected == UNTOUCHED, x, expected), f"mode {mode}, in place")


@isa
@dtypes
@noises
def test_packed_noise_is_the_reference(isa, dtype, noise):
    starts, lengths = torch.tensor([3, 2000, 2000, 9001]), torch.tensor([1500, 0, 7000, 999])
    indices = torch.tensor([2**32 - 700, 5, 0, 2**50 + 1023])
    with extension.use_isa(isa):
        out = torch.full((10_010,), UNTOUCHED, dtype=dtype)
        rest = (torch.tensor([-9]), starts, lengths, indices, 2, noise)
        for found, expected in both("segment_noise_fill_", [out], *rest):
            assert_same(found, expected)


@isa
@dtypes
def test_histograms_are_the_reference(isa, dtype):
    x = randn(250_000).to(dtype)
    x[::50] = 0.0
    x[7:2000:100] = float("nan")
    x[8:2000:100] = -float("inf")
    starts, lengths = torch.tensor([5, 0, 9, 3000, 1000]), torch.tensor([0, 17, 1024, 240_001, 3000])
    magnitude = x.float().abs().view(torch.int32).long()
    with extension.use_isa(isa):
        for digit, high in enumerate((31, 19, 7)):
            prefixes = magnitude[starts + lengths // 2] >> high
            for found, expected in both("segment_histogram", [x], starts, lengths, prefixes, digit):
                assert torch.equal(found.nan_to_num(), expected.nan_to_num()), digit


@isa
@dtypes
@pytest.mark.parametrize("n", [1, 8, 1023, 1024, 5003])
def test_masks_are_the_reference(isa, dtype, n):
    x = randn(n).to(dtype)
    x[::9] = -0.5
    x[4::100] = float("nan")
    bits = torch.full((-(-n // 8),), 255, dtype=torch.uint8)
    thresholds = torch.tensor([0.5, float("inf"), -1.0, 0.0, 0.7])[: -(-n // 1024)]
    with extension.use_isa(isa):
        (found, expected), _ = both("mask_below_", [bits, x], thresholds)
    assert torch.equal(found, expected)


def test_results_do_not_depend_on_the_number_of_threads():
    n = 200_001
    x, state, h = randn(n), randn(n, seed=1), randn(n, seed=2).abs()
    terms = terms_of(2, 2)
    valid = torch.full((-(-n // 1024),), 1000, dtype=torch.int32)
    segments, _, blocks, widest, (size,) = matrices_at(((3000, 33), (60, 900)), (1, 1))
    a = randn(size)
    low, _, _, _, sizes = matrices_at(((3000, 33), (60, 900)), (0, 4), (1, 4))
    left, right = (randn(size) for size in sizes)
    starts, lengths = torch.tensor([0, 150_000]), torch.tensor([150_001, 50_001])

    def everything():
        one = torch.tensor([0.5])
        folded, moved, second = state.clone(), x.bfloat16(), h.clone()
        yield cpp.state_fold_(folded, moved, *terms, one, randn(4), one, torch.tensor([1]), valid, 1024, 0)
        yield cpp.rule_step_(
            moved, [second], *terms_of(2, 4), torch.tensor(SCALARS["hizoo"]), None, one.long(), 7, 0, 4
        )
        yield from (folded, moved, second)
        score, out = torch.empty(size), x.bfloat16()
        rest = (segments, terms[0], terms[2], None, torch.tensor([1]), score, 3, 0, blocks, widest)
        cpp.kron_rows_(out, a, torch.tensor([0.1, 0.2]), *rest)
        yield from (score, out)
        out = x.bfloat16()
        cpp.lowrank_add_(out, left, right, low, one, None, torch.tensor([1]), 3, 4, blocks, widest)
        yield out
        yield cpp.segment_histogram(x, starts, lengths, torch.tensor([0, 0]), 0).double()
        out = torch.zeros(n)
        cpp.segment_noise_fill_(out, torch.tensor([1]), starts, lengths, torch.tensor([77, 5]), 2, 0)
        yield out

    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([result for result in everything() if result is not None])
    finally:
        torch.set_num_threads(before)
    assert len(results[0]) == 9
    for other in results[1:]:
        for expected, found in zip(results[0], other, strict=True):
            assert_same(found, expected)


def test_every_op_runs_on_these_kernels():
    """The automatic choice on a CPU is this backend, for every op of the schema."""
    assert ops.current("cpu") == "cpp"
    for name in SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"zoengine_C::{name}", "CPU"), name
