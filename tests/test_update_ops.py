"""The ops that fold states, apply rules and move matrices: each against its formula in float64."""

import pytest
import torch

from zoengine import ops
from zoengine.ops.schema import RULES

N = 2500  # not a multiple of a tile
OFFSET = 7 * 1024


def noise(seed, count=N, offset=OFFSET, stream=0):
    return ops.noise_fill(count, seed, offset=offset, stream=stream).double()


def close(actual, expected, atol=3e-6):
    assert torch.allclose(actual.double(), expected, rtol=1e-5, atol=atol), (actual.double() - expected).abs().max()


def test_terms_may_be_on_different_streams():
    x = ops.add_noise_(torch.zeros(N), [5, 5], [0.5, 2.0], offset=OFFSET, stream=[0, 1])
    close(x, 0.5 * noise(5) + 2.0 * noise(5, stream=1))


def test_scale_is_one_factor_per_tile():
    offset, factors = OFFSET + 1000, torch.tensor([2.0, 0.5, -1.0, 3.0])
    x = ops.add_noise_(torch.zeros(N), [1, 2], [1.0, 0.25], offset=offset, scale=factors)
    tile = (torch.arange(N) + 1000) // 1024
    close(x, factors[tile] * (noise(1, offset=offset) + 0.25 * noise(2, offset=offset)))


def test_a_masked_element_is_copied():
    x = torch.randn(N)
    mask = ops.mask_below(x, torch.tensor([0.5, 1.0, float("inf")]))
    chosen = x.abs() <= torch.tensor([0.5, 1.0, float("inf")]).repeat_interleave(1024)[:N]
    out = ops.add_noise_(x, 3, 0.1, offset=OFFSET, mask=mask, decay=0.5, out=torch.empty(N))
    assert torch.equal(out[~chosen], x[~chosen])
    close(out[chosen], (0.5 * x.double() + 0.1 * noise(3))[chosen])
    assert 0.3 < chosen.float().mean() < 0.9


def test_diag_divides_by_the_root():
    h = torch.rand(N) + 0.1
    x = ops.add_noise_(torch.zeros(N), [1, 2], [1.0, 0.5], offset=OFFSET, diag=h)
    close(x, (noise(1) + 0.5 * noise(2)) / h.double().sqrt(), atol=1e-5)


def test_fold_and_its_norm():
    state, old = torch.randn(N), None
    old = state.double()
    valid = torch.tensor([1024, 1000, 400], dtype=torch.int32)
    squares = ops.state_fold_(state, [1, 2], [0.5, -1.0], keep=0.9, offset=OFFSET, valid=valid)
    close(state, 0.9 * old + 0.5 * noise(1) - noise(2))
    counted = torch.cat([state[:2024], state[2048:2448]]).double()
    assert squares.shape == (1,)
    assert torch.allclose(squares, counted.square().sum(), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_fold_is_the_two_passes(dtype):
    x, state = torch.randn(N).to(dtype), torch.randn(N)
    after_x, after_state = x.clone(), state.clone()
    ops.add_noise_(after_state, [1], [0.3], decay=0.1, offset=OFFSET)  # momentum: fold, then step along the new state
    how = dict(rounding="stochastic", sr_seed=4)
    ops.add_noise_(after_x, [], [], states=[after_state], state_coeffs=[-0.01], decay=0.2, offset=OFFSET, **how)
    fused_x, fused_state = x.clone(), state.clone()
    ops.state_fold_(
        fused_state, [1], [0.3], keep=0.9, x=fused_x, x_keep=0.8, x_coeffs=[0.0, 0.0, -0.01], offset=OFFSET, **how
    )
    assert torch.equal(fused_x, after_x)
    assert torch.equal(fused_state, after_state)

    before_x, before_state = x.clone(), state.clone()  # ConMeZO: step along noise and the old state, then fold
    ops.add_noise_(before_x, [1], [-0.02], states=[before_state], state_coeffs=[-0.01], offset=OFFSET, **how)
    ops.add_noise_(before_state, [1], [0.3], decay=0.1, offset=OFFSET)
    fused_x, fused_state = x.clone(), state.clone()
    ops.state_fold_(fused_state, [1], [0.3], keep=0.9, x=fused_x, x_coeffs=[-0.02, -0.01, 0.0], offset=OFFSET, **how)
    assert torch.equal(fused_x, before_x)
    assert torch.equal(fused_state, before_state)


def apply(rule, coeffs, scalars, states, x, seeds=(1, 2), **options):
    states = [state.clone() for state in states]
    x = ops.rule_step_(x.clone(), rule, states, list(seeds), coeffs, scalars, offset=OFFSET, **options)
    return x, states


def test_sign_rule():
    x = torch.randn(N)
    moved, _ = apply("sign", [0.5, -0.25], {"step": -0.125}, [], x, keep=0.5)
    close(moved, 0.5 * x.double() - 0.125 * (0.5 * noise(1) - 0.25 * noise(2)).sign())
    still, _ = apply("sign", [0.0, 0.0], {"step": -0.125}, [], x)
    assert torch.equal(still, x)


@pytest.mark.parametrize("rule", ["adam", "amsgrad"])
def test_adam_rules(rule):
    m, v, largest = torch.randn(N), torch.rand(N), torch.rand(N)
    states, x = [m, v, largest][: RULES[rule][1]], torch.randn(N)
    scalars = dict(beta1=0.9, one_minus_beta1=0.1, beta2=0.99, one_minus_beta2=0.01, root_correction=1.5, eps=1e-3)
    moved, new = apply(rule, [0.5, -0.25], {**scalars, "step": -0.01}, states, x)
    g = 0.5 * noise(1) - 0.25 * noise(2)
    m, v = 0.9 * m.double() + 0.1 * g, 0.99 * v.double() + 0.01 * g**2
    used = torch.maximum(largest.double(), v) if rule == "amsgrad" else v
    close(moved, x.double() - 0.01 * m / (1.5 * used.sqrt() + 1e-3))
    for actual, expected in zip(new, [m, v, used], strict=False):
        close(actual, expected)


def test_adamu_rule():
    h, x = torch.randn(N), torch.randn(N)
    scalars = dict(state=0.4, first=0.7, second=0.6, beta2=0.2, one_minus_beta2=0.8, eps=1e-8, step=-0.05, sign=-1.0)
    moved, (new,) = apply("adamu", [0.3, 0.2], scalars, [h], x, seeds=(1, 1), stream=[0, 1])
    z1, z2, h = noise(1), noise(1, stream=1), h.double()
    m = 0.3 * z1 + 0.2 * z2 + 0.4 * h
    v = 0.2 * (0.7 * z1) ** 2 + 0.8 * (0.6 * z2 + h) ** 2
    close(moved, x.double() - 0.05 * m / (v + 1e-8).sqrt(), atol=2e-5)
    close(new, -m)


@pytest.mark.parametrize("hessian_first", [0.0, 1.0])
@pytest.mark.parametrize("centre", [0.0, 1.0])
def test_hizoo_rule(hessian_first, centre):
    h, x = torch.rand(N) + 0.5, torch.randn(N)
    scalars = dict(keep=0.9, centre=centre, floor=0.4, hessian_first=hessian_first)
    moved, (new,) = apply("hizoo", [-0.1, 0.2, 0.05, 0.15], scalars, [h], x)
    z1, z2, h = noise(1), noise(2), h.double()
    expected = (0.9 * h + h * (0.05 * (z1**2 - centre) + 0.15 * (z2**2 - centre))).clamp(min=0.4)
    close(new, expected)
    root = (expected if hessian_first else h).sqrt()
    close(moved, x.double() + (-0.1 * z1 + 0.2 * z2) / root)


def test_adam_replay_rule():
    x = torch.randn(N)
    moved, _ = apply("adam_replay", [0.1, 0.2, 0.03, 0.04], dict(root_correction=2.0, eps=1e-3, step=-0.01), [], x)
    m, v = 0.1 * noise(1) + 0.2 * noise(2), 0.03 * noise(1) ** 2 + 0.04 * noise(2) ** 2
    close(moved, x.double() - 0.01 * m / (2 * v.sqrt() + 1e-3))


STARTS, SHAPES = [0, 1024, 5 * 1024], [(5, 130), (70, 33), (3, 7)]


def matrices_of(x, starts=STARTS, shapes=SHAPES):
    return [x[s : s + m * n].view(m, n) for s, (m, n) in zip(starts, shapes, strict=True)]


def test_kron_rows_and_score():
    x, table = torch.randn(6 * 1024), ops.Matrices.for_kron(STARTS, SHAPES)
    a, kappa = torch.randn(table.sizes[0]), torch.tensor([0.3, 0.2, 0.1])
    out, score = torch.full_like(x, float("nan")), torch.empty_like(a)
    ops.kron_rows_(x, a, kappa, table, [1, 2], [0.5, -0.2], keep=0.9, offset=OFFSET, out=out, score=score)
    assert torch.equal(score, ops.kron_score(a, table, [1, 2], [0.5, -0.2], offset=OFFSET))
    z = [matrices_of(noise(seed, 6 * 1024)) for seed in (1, 2)]
    vectors = a.double().split([n for _, n in SHAPES])
    for s, (before, after) in enumerate(zip(matrices_of(x), matrices_of(out), strict=True)):
        w = [u[s] - kappa[s].double() * torch.outer(u[s] @ vectors[s], vectors[s]) for u in z]
        close(after, 0.9 * before.double() + 0.5 * w[0] - 0.2 * w[1], atol=2e-5)
        expected = sum(
            c * (u[s].t() @ (u[s] @ vectors[s]) - len(u[s]) * vectors[s]) for c, u in zip((0.5, -0.2), z, strict=True)
        )
        close(score.split([n for _, n in SHAPES])[s], expected, atol=2e-4)
    untouched = torch.ones(6 * 1024, dtype=torch.bool)
    for part in matrices_of(untouched):
        part.fill_(False)
    assert out[untouched].isnan().all()
    in_place = ops.kron_rows_(x.clone(), a, kappa, table, [1, 2], [0.5, -0.2], keep=0.9, offset=OFFSET)
    assert torch.equal(in_place[~untouched], out[~untouched])
    assert torch.equal(in_place[untouched], x[untouched])


@pytest.mark.parametrize("rank", [1, 3, 64])
def test_lowrank_add(rank):
    x, table = torch.randn(6 * 1024), ops.Matrices.for_lowrank(STARTS, SHAPES, rank)
    left, right = (torch.randn(size) for size in table.sizes)
    out = ops.lowrank_add_(x, left, right, table, 0.5, rank=rank, keep=0.9, out=torch.full_like(x, float("nan")))
    lefts = left.double().split([m * rank for m, _ in SHAPES])
    rights = right.double().split([n * rank for _, n in SHAPES])
    for before, after, u, v in zip(matrices_of(x), matrices_of(out), lefts, rights, strict=True):
        close(after, 0.9 * before.double() + 0.5 * u.view(-1, rank) @ v.view(-1, rank).t(), atol=1e-5)


def test_packed_noise_is_the_stream():
    out = torch.full((200,), float("nan"))
    ops.segment_noise_fill_(out, 5, [0, 150], [100, 50], [2**33 + 5, 77], stream=2)
    assert torch.equal(out[:100], ops.noise_fill(100, 5, offset=2**33 + 5, stream=2))
    assert torch.equal(out[150:], ops.noise_fill(50, 5, offset=77, stream=2))
    assert out[100:150].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fraction", [0.001, 0.25, 0.5, 1.0])
def test_quantiles_are_exact(dtype, fraction):
    x = torch.randn(5000).to(dtype)
    x[100:200] = 0.0
    starts, lengths = [0, 3000, 4000], [3000, 1, 1000]
    found = ops.segment_quantile(x, starts, lengths, fraction)
    for value, start, length in zip(found, starts, lengths, strict=True):
        ordered = x[start : start + length].float().abs().sort().values
        rank = max(1, -int(-fraction * length // 1))
        assert value == ordered[rank - 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.add_noise_(x, 1, 1.0, scale=torch.ones(5)), r"shape \(3,\)"),
        (lambda x: ops.add_noise_(x, 1, 1.0, diag=x.abs(), scale=torch.ones(3)), "at most one of"),
        (lambda x: ops.add_noise_(x, 1, 1.0, mask=torch.zeros(7, dtype=torch.uint8)), "one bit per element"),
        (lambda x: ops.add_noise_(x, [1, 2], [1.0, 1.0], stream=[1]), "one per seed"),
        (lambda x: ops.state_fold_(x.clone(), 1, 1.0, x=x), "go together"),
        (lambda x: ops.state_fold_(x, 1, 1.0, offset=5, valid=torch.ones(3, dtype=torch.int32)), "multiple of 1024"),
        (lambda x: ops.rule_step_(x, "adamw", [], 1, 1.0, {}), "one of sign, adam"),
        (lambda x: ops.rule_step_(x, "adam", [x.clone()], 1, 1.0, {}), "has 2 states"),
        (lambda x: ops.rule_step_(x, "sign", [], 1, 1.0, {"lr": 1.0}), "takes the scalars step"),
        (lambda x: ops.rule_step_(x, "sign", [], [], [], {"step": 1.0}), "needs a seed"),
        (lambda x: ops.segment_quantile(x, [0], [5], 0.0), r"in \(0, 1\]"),
        (
            lambda x: ops.kron_score(torch.ones(5), ops.Matrices.for_kron([0], [(2, 4)]), 1, 1.0),
            r"a must be float32 of shape \(4,\)",
        ),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(torch.randn(N))


def test_opcheck():
    checks = ("test_schema", "test_faketensor")
    zo, x, state = torch.ops.zoengine, torch.randn(N), torch.randn(N)
    seeds, streams, one = torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([0.5])
    coeffs, sr = torch.tensor([0.5, 0.25]), torch.tensor([3])
    valid = torch.tensor([1024, 1024, 452], dtype=torch.int32)
    terms = (seeds, streams, coeffs)

    def check(op, *args, **kwargs):
        torch.library.opcheck(op.default, args, kwargs, test_utils=checks)

    check(zo.state_fold_, state, x.bfloat16(), *terms, one, torch.rand(4), one, sr, valid, 1024, 0)
    check(zo.state_fold_, state, None, *terms, None, None, None, None, None, 5, 1)
    check(zo.rule_step_, x, [state, x.abs()], *terms, torch.rand(7), one, sr, 5, 0, RULES["adam"][0])
    check(zo.rule_step_, x, [], *terms, torch.rand(1), None, None, 5, 0, RULES["sign"][0])
    check(zo.mask_below_, torch.zeros(313, dtype=torch.uint8), x, torch.ones(3))
    kron = ops.Matrices.for_kron([0], [(10, 100)])
    common = (kron.table, seeds, coeffs)
    extents = (kron.blocks, kron.widest)
    check(zo.kron_score, torch.randn(100), *common, 5, 0, *extents)
    args = (torch.randn(100), one, *common, one, sr, torch.zeros(100), 5, 0, *extents)
    check(zo.kron_rows_, x, *args)
    check(zo.kron_rows_out, x, *args, out=torch.empty_like(x))
    low = ops.Matrices.for_lowrank([0], [(10, 100)], 2)
    args = (torch.randn(20), torch.randn(200), low.table, one, one, sr, 5, 2, low.blocks, low.widest)
    check(zo.lowrank_add_, x, *args)
    check(zo.lowrank_add_out, x, *args, out=torch.empty_like(x))
    segments = (torch.tensor([0, 50]), torch.tensor([40, 60]))
    check(zo.segment_noise_fill_, x, sr, *segments, torch.tensor([7, 9]), 2, 0)
    check(zo.segment_histogram, x, *segments, torch.tensor([0, 0]), 0)
