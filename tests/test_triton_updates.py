"""The Triton kernels that fold states, apply rules, move matrices and count, against the reference, bit for bit.

As in test_triton_kernels: on a GPU where there is one, else in Triton's interpreter, in a process of its own.
"""

import pytest
import torch

pytest.importorskip("triton")
from triton_bits import BF16, DEVICE, F16, F32, GPU, INTERPRETED, SEEDS, draw, int64, run_in_the_interpreter, same

from zoengine import kernels, ops
from zoengine.noise import table
from zoengine.ops import reference
from zoengine.ops.schema import RULES

GAUSSIAN, RADEMACHER = table.GAUSSIAN, table.RADEMACHER


@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests below run in this process")
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


def one(value: float) -> torch.Tensor:
    return torch.tensor([value], device=DEVICE)


def clone(arguments):
    return [
        a.clone() if isinstance(a, torch.Tensor) else [s.clone() for s in a] if isinstance(a, list) else a
        for a in arguments
    ]


def check(op: str, *arguments, **keywords) -> None:
    """Run an op of the kernels and of the reference on copies: results and tensors must have the same bits after."""
    actual, expected = clone(arguments), clone(arguments)
    out, wanted = ({name: t.clone() for name, t in keywords.items()} for _ in range(2))
    results = getattr(kernels, op)(*actual, **out), getattr(reference, op)(*expected, **wanted)
    if results[1] is not None:
        assert same(*results)
    for a, b in zip([*actual, *out.values()], [*expected, *wanted.values()], strict=True):
        for x, y in zip(a, b, strict=True) if isinstance(a, list) else [(a, b)]:
            assert same(x, y) if isinstance(x, torch.Tensor) else x == y


def terms(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return int64(*SEEDS[:count]), int64(*((1, 0, 7)[k % 3] for k in range(count))), draw(count, seed=1)


def valid_elements(n: int) -> torch.Tensor:
    tiles = -(-n // 1024)
    return torch.tensor([(1024, 1000, 0, 1024, 77)[t % 5] for t in range(tiles)], dtype=torch.int32, device=DEVICE)


@pytest.mark.gpu  # or in the interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy in the interpreter, at NaN, infinities and idle lanes
class TestKernels:
    __test__ = GPU or INTERPRETED

    @pytest.mark.parametrize("noise", [GAUSSIAN, RADEMACHER])
    @pytest.mark.parametrize("n, offset", [(4096 + 1500, 4096 * 3), (2500, 2**34 - 1024)])
    def test_fold_with_norm(self, noise, n, offset):
        state = draw(n)
        state[1020] = float("nan")  # beyond the valid elements of its tile where that is the second
        valid = valid_elements(n)
        valid[0] = 1020
        check("state_fold_", state, None, *terms(1), one(0.9), None, None, None, valid, offset, noise)

    @pytest.mark.parametrize("dtype, noise", [(F32, GAUSSIAN), (BF16, RADEMACHER), (F16, GAUSSIAN)])
    def test_fused_fold(self, dtype, noise):
        n, x_coeffs = 4096 + 700, draw(4, seed=3)
        x, state, valid = draw(n, seed=2, dtype=dtype), draw(n), valid_elements(n)
        check("state_fold_", state, x, *terms(2), None, x_coeffs, one(0.8), int64(5), valid, 8192 - 1024, noise)
        x, state = x[:200], state[:200]
        check("state_fold_", state, x, *terms(1), one(0.5), x_coeffs[:3], None, None, None, 4000, noise)

    def test_fold_of_nothing(self):
        check("state_fold_", draw(0), None, *terms(1), None, None, None, None, valid_elements(0), 0, GAUSSIAN)
        check("state_fold_", draw(1500), None, *terms(0), one(0.5), None, None, None, valid_elements(1500), 0, GAUSSIAN)

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("count, n, dtype, noise", [(1, 4096 + 300, BF16, GAUSSIAN), (3, 300, F16, RADEMACHER)])
    def test_rules(self, rule, count, n, dtype, noise):
        number, state_count, names = RULES[rule]
        seeds, streams, _ = terms(2 if rule == "adamu" else count)
        coeffs = draw(len(seeds) * (2 if rule in ("hizoo", "adam_replay") else 1), seed=2)
        common = (seeds, streams, coeffs, draw(len(names), seed=count).abs())
        x, states = draw(n, dtype=dtype), [draw(n, seed=5 + j).abs() for j in range(state_count)]
        check("rule_step_", x, states, *common, one(0.9), int64(3), 4096 * 5, noise, number)

    @pytest.mark.parametrize("hessian_first", [0.0, 1.0])
    def test_rules_keep_specials(self, hessian_first):
        """NaN, infinities and zeros go through roots, quotients and maxima as in the reference."""
        specials = torch.tensor([0.0, -0.0, float("inf"), float("nan"), -1.0, 1e-40, 3e38], device=DEVICE).repeat(90)
        n = specials.numel()
        seeds, streams, coeffs = terms(1)
        scalars = draw(7, seed=4).abs()
        states = [specials.roll(j) for j in range(3)]
        check("rule_step_", draw(n), states, seeds, streams, coeffs, scalars, None, None, 0, GAUSSIAN, 2)
        scalars = torch.tensor([0.9, 1.0, 0.25, hessian_first], device=DEVICE)
        check("rule_step_", draw(n), states[:1], seeds, streams, draw(2), scalars, None, None, 0, GAUSSIAN, 4)
        check("rule_step_", draw(n), [], seeds, streams, coeffs * float("nan"), scalars, None, None, 0, GAUSSIAN, 0)

    @pytest.mark.parametrize(
        "count, dtype, noise, with_score, stochastic",
        [(1, BF16, GAUSSIAN, False, True), (1, F32, RADEMACHER, True, False), (2, F16, GAUSSIAN, True, True)],
    )
    def test_kron_rows(self, count, dtype, noise, with_score, stochastic):
        """At multiples of 16, inside a tile, rows longer than one; at odd places; at even ones with a at odd ones."""
        matrices = ops.Matrices.for_kron([512, 3 * 1024 + 5, 3136], [(2, 1040), (2, 13), (1, 32)], DEVICE)
        a, kappa = draw(matrices.sizes[0], seed=3), draw(3, seed=4)
        seeds, _, coeffs = terms(count)
        x, score = draw(3200, dtype=dtype), torch.zeros_like(a) if with_score else None
        sr_seed = int64(6) if stochastic else None
        common = (a, kappa, matrices.table, seeds, coeffs, one(0.9), sr_seed, score, 2**35 + 1024, noise)
        extents = (matrices.blocks, matrices.widest)
        check("kron_rows_", x, *common, *extents)
        if with_score and count == 1:
            check("kron_rows_out", x, *common, *extents, out=torch.full_like(x, float("nan")))

    @pytest.mark.parametrize("count", [0, 1, 2])
    def test_kron_score(self, count):
        matrices = ops.Matrices.for_kron([0, 64], [(2, 32), (65 if count == 1 else 1, 16)], DEVICE)
        seeds, _, coeffs = terms(count)
        a = draw(matrices.sizes[0])
        check("kron_score", a, matrices.table, seeds, coeffs, 2048, GAUSSIAN, matrices.blocks, matrices.widest)

    @pytest.mark.parametrize("rank, dtype, stochastic", [(1, BF16, True), (5, F32, False), (2, F16, True)])
    def test_lowrank_add(self, rank, dtype, stochastic):
        """The last matrix takes two programs a row block, and begins at an odd place."""
        matrices = ops.Matrices.for_lowrank([32, 3000, 4001], [(5, 80), (67, 9), (2, 272)], rank, DEVICE)
        x, (left, right) = draw(4600, dtype=dtype), (draw(size, seed=3) for size in matrices.sizes)
        common = (left, right, matrices.table, one(0.5), one(0.9), int64(6) if stochastic else None, 2**34 - 100)
        extents = (rank, matrices.blocks, matrices.widest)
        check("lowrank_add_", x, *common, *extents)
        if not stochastic:
            check("lowrank_add_out", x, *common, *extents, out=torch.full_like(x, float("nan")))

    @pytest.mark.parametrize("dtype", [F32, BF16])
    @pytest.mark.parametrize("noise", [GAUSSIAN, RADEMACHER])
    def test_segment_noise_fill(self, dtype, noise):
        starts, lengths = int64(0, 8300, 8200, 9000), int64(8197, 700, 1, 0)
        indices = int64(4096 - 5, 2**33 + 4096 - 300, 77, 4096)
        check("segment_noise_fill_", draw(9100, dtype=dtype), int64(-5), starts, lengths, indices, 2, noise)
        check("segment_noise_fill_", draw(4096), int64(9), int64(0), int64(4096), int64(2**20), 3, noise)

    @pytest.mark.parametrize("dtype", [F32, BF16, F16])
    def test_segment_histogram(self, dtype):
        x = draw(9000, dtype=dtype)
        x[3], x[5] = float("inf"), 0.0
        magnitude = x.float().abs().view(torch.int32).long()
        starts, lengths = int64(0, 4100, 0, 4099, 5), int64(4099, 4900, 9000, 1, 0)
        for digit, shift in ((0, 31), (1, 19), (2, 7)):
            check("segment_histogram", x, starts, lengths, magnitude[[0, 4101, 3, 4099, 0]] >> shift, digit)

    def test_overlapping_segments_exceed_the_programs(self):
        """Then a program takes several blocks; the last one is the last segment's, which no other writes."""
        starts, lengths, x = int64(0, 1), int64(16400, 16399), draw(16400)
        check("segment_histogram", x, starts, lengths, int64(0, 0), 0)
        starts, lengths, indices = int64(0, 0, 0, 0, 8192), int64(8192, 8192, 8192, 8192, 100), int64(5, 5, 5, 5, 0)
        check("segment_noise_fill_", draw(8292), int64(9), starts, lengths, indices, 2, RADEMACHER)

    @pytest.mark.parametrize("n", [0, 5, 4096, 5003])
    def test_mask_below(self, n):
        for dtype in (F32, BF16, F16):
            x = draw(n, dtype=dtype)
            x[::7] = float("nan")
            thresholds = draw(-(-n // 1024), seed=1).abs()
            thresholds[:1] = float("inf")
            thresholds[1:] = x[1::1024][1:].float().abs()  # at most: an element that equals its threshold counts
            bits = torch.full((-(-n // 8),), 255, dtype=torch.uint8, device=DEVICE)
            check("mask_below_", bits, x, thresholds)
