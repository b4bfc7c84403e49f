"""The Triton kernels against the reference, bit for bit.

On a GPU the tests run there. Without one they run in Triton's interpreter, which has to be chosen before Triton is
imported: ``test_in_the_interpreter`` runs this file once more in a process of its own.
"""

import pytest
import torch

from zoengine.noise import table
from zoengine.ops import reference, use
from zoengine.ops.backends import BackendError, backends
from zoengine.ops.schema import TRANSFORMS

pytest.importorskip("triton")
from triton_bits import BF16, DEVICE, F16, F32, GPU, INTERPRETED, SEEDS, draw, int64, run_in_the_interpreter, same

from zoengine import kernels

GAUSSIAN, RADEMACHER = table.GAUSSIAN, table.RADEMACHER


@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests below run in this process")
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


def terms(n: int, seeds: int, states: int, keep: bool, stochastic: bool):
    """Arguments ``seeds, streams, coeffs, states, keep, sr_seed`` of an add_noise op."""
    return (
        int64(*(SEEDS[k % 5] ^ (k // 5) for k in range(seeds))),
        int64(*((0, 1, 2**32 - 1)[k % 3] for k in range(seeds))),
        draw(seeds + states, seed=1),
        [draw(n, seed=2 + j) for j in range(states)],
        torch.tensor([0.9], device=DEVICE) if keep else None,
        int64(-99) if stochastic else None,
    )


def operand_of(transform: str, n: int, offset: int) -> torch.Tensor | None:
    if transform == "scale":
        return draw((offset % 1024 + n + 1023) // 1024, seed=7)
    if transform == "mask":
        return torch.randint(0, 256, (-(-n // 8),), dtype=torch.uint8, generator=torch.Generator().manual_seed(8)).to(
            DEVICE
        )
    return draw(n, seed=9).abs() if transform == "diag" else None


def check_add_noise(
    x: torch.Tensor, arguments, offset: int, noise: int, transform: str = "none", in_place: bool = True
) -> None:
    before, expected = x.clone(), x.clone()
    arguments = (*arguments, offset, noise, TRANSFORMS[transform], operand_of(transform, x.numel(), offset))
    reference.add_noise_(expected, *arguments)
    if in_place:
        kernels.add_noise_(x, *arguments)
        assert same(x, expected)
    else:
        out = torch.full_like(x, float("nan"))
        kernels.add_noise_out(x, *arguments, out=out)
        assert same(out, expected) and same(x, before)


@pytest.mark.gpu  # or in the interpreter
class TestKernels:
    __test__ = GPU or INTERPRETED

    @pytest.mark.parametrize("dtype", [F32, BF16, F16])
    @pytest.mark.parametrize("noise", [GAUSSIAN, RADEMACHER])
    def test_add_noise(self, dtype, noise):
        check_add_noise(draw(9001, dtype=dtype), terms(9001, 1, 0, False, False), 4096, noise)

    @pytest.mark.parametrize("dtype", [F32, BF16, F16])
    @pytest.mark.parametrize("noise", [GAUSSIAN, RADEMACHER])
    def test_every_option_out_of_place(self, dtype, noise):
        x, arguments = draw(1500, dtype=dtype), terms(1500, 2, 2, True, True)
        check_add_noise(x, arguments, 8192 * 3 - 333, noise, in_place=False)

    @pytest.mark.filterwarnings("ignore:divide by zero")  # numpy, in the interpreter, where a mask loads nothing
    @pytest.mark.parametrize("transform", ["scale", "mask", "diag"])
    @pytest.mark.parametrize(
        "n, offset, dtype, noise",
        [(9000, 2048, BF16, GAUSSIAN), (9000, 1016, F32, RADEMACHER), (8000, 777, F16, GAUSSIAN)],
    )
    def test_transforms(self, transform, n, offset, dtype, noise):
        x = draw(n, dtype=dtype)
        check_add_noise(x.clone(), terms(n, 2, 0, True, False), offset, noise, transform)
        check_add_noise(x, terms(n, 1, 0, False, True), offset, noise, transform, in_place=False)

    @pytest.mark.parametrize("noise", [GAUSSIAN, RADEMACHER])
    def test_out_may_be_x_itself(self, noise):
        x, arguments = draw(300), terms(300, 1, 1, True, False)
        expected = x.clone()
        reference.add_noise_(expected, *arguments, 0, noise, 0, None)
        kernels.add_noise_out(x, *arguments, 0, noise, 0, None, out=x)
        assert same(x, expected)

    @pytest.mark.parametrize("count, noise", [(0, GAUSSIAN), (2, GAUSSIAN), (3, RADEMACHER), (17, RADEMACHER)])
    def test_numbers_of_seeds(self, noise, count):
        check_add_noise(draw(70), terms(70, count, 1, False, False), 5, noise)

    @pytest.mark.parametrize(
        "offset", [0, 1, 255, 1023, 2**32 - 100, 2**34 - 300, 2**39 - 200, 2**39 + 4097, 2**63 - 8000]
    )
    @pytest.mark.parametrize("noise", [GAUSSIAN, RADEMACHER])
    def test_offsets(self, noise, offset):
        n = 513
        out, expected = draw(n), draw(n)
        kernels.noise_fill_(out, int64(SEEDS[1]), offset, 2**32 - 1, noise)
        reference.noise_fill_(expected, int64(SEEDS[1]), offset, 2**32 - 1, noise)
        assert same(out, expected)

    @pytest.mark.parametrize("n", [0, 1, 1023, 4097])
    def test_sizes(self, n):
        check_add_noise(draw(n, dtype=BF16), terms(n, 1, 1, True, True), 1024, GAUSSIAN)

    @pytest.mark.parametrize("dtype", [BF16, F16])
    def test_whole_groups_with_stochastic_rounding(self, dtype):
        check_add_noise(draw(8192, dtype=dtype), terms(8192, 0, 1, False, True), 8192 * 5, GAUSSIAN)

    def test_views_that_are_not_16_byte_aligned(self):
        check_add_noise(draw(5003, dtype=BF16)[3:], terms(5000, 1, 0, False, False), 0, RADEMACHER)

    @pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # numpy, in the interpreter
    @pytest.mark.parametrize("dtype", [F32, BF16, F16])
    @pytest.mark.parametrize("stochastic", [False, True])
    def test_special_values(self, dtype, stochastic):
        info = torch.finfo(dtype)
        specials = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), info.max, info.min, info.tiny, -info.tiny / 4]
        x = torch.tensor(specials * 10, dtype=dtype, device=DEVICE)
        ties = [1.0 + 2.0**-8, 1.0 + 2.0**-11]  # between two bf16, between two fp16
        wide = [3e38, -3e38, 65519.0, 65504.0, 1e-40, 6e-8, *ties, float("nan"), float("inf")]
        wide = torch.tensor(wide * 9, device=DEVICE)
        wide.view(torch.int32)[8::10] = 0x7FFFFFFF  # the NaN of NVIDIA's arithmetic: random bits carry into its sign
        keep, sr_seed = torch.tensor([1.0], device=DEVICE), int64(4) if stochastic else None
        for coeff in (0.0, 1.0, -2e38, float("nan")):
            coeffs = torch.tensor([0.0, coeff], device=DEVICE)
            check_add_noise(x.clone(), (int64(9), int64(0), coeffs, [wide], keep, sr_seed), 77, RADEMACHER)

    @pytest.mark.parametrize("dtype", [F32, BF16, F16])
    @pytest.mark.parametrize("noise", [GAUSSIAN, RADEMACHER])
    def test_noise_fill(self, dtype, noise):
        for n, offset in ((8192 + 100, 2**33), (33, 2**33 + 8190)):
            out, expected = draw(n, dtype=dtype), draw(n, dtype=dtype)
            kernels.noise_fill_(out, int64(12), offset, 3, noise)
            reference.noise_fill_(expected, int64(12), offset, 3, noise)
            assert same(out, expected)

    @pytest.mark.parametrize("dtype", [F32, BF16, F16])
    def test_segments(self, dtype):
        x, y = draw(11000, dtype=dtype), draw(11000, seed=5, dtype=dtype)
        x[10500] = float("nan")
        x[700], x[576], x[10999] = float("-inf"), 2.0, -2.0
        starts, lengths = int64(1024, 0, 577, 6144, 10999, 3, 576), int64(5000, 576, 447, 4855, 1, 0, 1)
        assert same(kernels.segment_stats(x, starts, lengths), reference.segment_stats(x, starts, lengths))
        assert same(kernels.segment_dot(x, y, starts, lengths), reference.segment_dot(x, y, starts, lengths))

    @pytest.mark.parametrize("noise", [GAUSSIAN, RADEMACHER])
    @pytest.mark.parametrize("offset", [2**39 - 1024, 256])  # at tiles, and at lanes within one
    def test_segment_dot_noise(self, noise, offset):
        x = draw(6000, dtype=BF16)
        arguments = (int64(8), int64(0, 1024, 4097), int64(576, 2900, 1000), offset, 1, noise)
        assert same(kernels.segment_dot_noise(x, *arguments), reference.segment_dot_noise(x, *arguments))

    def test_overlapping_segments_exceed_what_is_stored(self):
        x, y = draw(8300, seed=2), draw(8300, seed=5)  # one order of the tiles' sums gives other bits than another
        starts, lengths = int64(0, 1, 2), int64(8300, 8299, 2000)
        assert same(kernels.segment_stats(x, starts, lengths), reference.segment_stats(x, starts, lengths))
        assert same(kernels.segment_dot(x, y, starts, lengths), reference.segment_dot(x, y, starts, lengths))

    def test_more_than_256_tiles_in_a_segment(self):
        x = draw(270_000, dtype=BF16)
        starts, lengths = int64(0), int64(270_000)
        assert same(kernels.segment_dot(x, x, starts, lengths), reference.segment_dot(x, x, starts, lengths))

    def test_no_segments(self):
        assert kernels.segment_stats(draw(3), int64(), int64()).shape == (0, 4)
        assert kernels.segment_dot(draw(3), draw(3), int64(), int64()).shape == (0,)

    def test_the_backend_can_be_chosen(self):
        x = draw(100)
        expected = x.clone()
        arguments = (*terms(100, 1, 0, False, False), 0, RADEMACHER, 0, None)
        reference.add_noise_(expected, *arguments)
        with use("triton"):
            torch.ops.zoengine.add_noise_(x, *arguments)
        assert same(x, expected)


@pytest.mark.skipif(GPU or INTERPRETED, reason="the backend is available here")
def test_without_gpu_or_interpreter_the_backend_says_why():
    with pytest.raises(BackendError, match="no CUDA device"):
        use("triton")


@pytest.mark.parametrize("span", [4096, 8192])
def test_parts_cover_every_index_once(span):
    from zoengine.kernels.launch import parts

    for offset in (0, 1, span - 1, span, 3 * span + 17, 2**62 + 5):
        for n in (0, 1, span - 1, span, span + 1, 2 * span, 5 * span + 3):
            covered = []
            for part in parts(offset, n, span):
                for program in range(part.programs):
                    begin = (part.first + program * part.step) * span
                    inside = (max(begin, offset), min(begin + span, offset + n))
                    assert part.edge or inside == (begin, begin + span)
                    covered.append(inside)
                assert part.edge or part.start == part.first * span - offset
            assert sum(b - a for a, b in covered) == n
            assert all(a < b for a, b in covered) and len(set(covered)) == len(covered)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU or INTERPRETED, reason="needs a GPU")
class TestOnlyOnAGpu:
    @pytest.mark.parametrize("dtype", [F32, BF16, F16])
    @pytest.mark.parametrize("noise", [GAUSSIAN, RADEMACHER])
    def test_millions_of_elements(self, dtype, noise):
        n = 3_000_001
        check_add_noise(draw(n, dtype=dtype), terms(n, 2, 1, True, True), 2**34 - 1_000_000, noise)

    def test_the_square_root_is_correctly_rounded_for_every_mantissa_of_two_exponents(self):
        import triton
        import triton.language as tl
        from zoengine.kernels.noise import square_root

        @triton.jit
        def roots(out_ptr, x_ptr, PTX: tl.constexpr):
            at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
            tl.store(out_ptr + at, square_root(tl.load(x_ptr + at), PTX))

        x = torch.arange(0x3F800000, 0x40800000, dtype=torch.int32, device=DEVICE).view(F32)
        for scale in (1.0, 2.0**-96, 2.0**6):
            out = torch.empty_like(x)
            roots[(x.numel() // 1024,)](out, x * scale, PTX=torch.version.hip is None, enable_fp_fusion=False)
            assert same(out, (x * scale).double().sqrt().float())

    def test_runs_agree(self):
        x = draw(4_000_000, dtype=BF16)
        starts, lengths = int64(0, 2_000_000), int64(1_999_999, 2_000_000)
        first = kernels.segment_stats(x, starts, lengths)
        assert all(same(kernels.segment_stats(x, starts, lengths), first) for _ in range(20))

    def test_a_cuda_graph_reads_new_seeds(self):
        x = draw(100_000, dtype=BF16)
        arguments = terms(x.numel(), 1, 0, False, False)
        kernels.add_noise_(x.clone(), *arguments, 0, GAUSSIAN, 0, None)
        static, graph = x.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kernels.add_noise_(static, *arguments, 0, GAUSSIAN, 0, None)
        for seed in (5, 6):
            arguments[0].fill_(seed)
            static.copy_(x)
            graph.replay()
            expected = x.clone()
            reference.add_noise_(expected, *arguments, 0, GAUSSIAN, 0, None)
            assert same(static, expected)

    @pytest.mark.skipif(not backends()["cpp"].available, reason="the compiled extension is not installed")
    @pytest.mark.parametrize("dtype", [F32, BF16, F16])
    def test_cpu_and_gpu_agree(self, dtype):
        n = 2_000_003
        x, arguments = draw(n, dtype=dtype), terms(n, 1, 1, True, True)
        on_cpu = [
            a.cpu() if isinstance(a, torch.Tensor) else [s.cpu() for s in a] if isinstance(a, list) else a
            for a in arguments
        ]
        y = x.cpu()
        with use("cpp"):
            torch.ops.zoengine.add_noise_(y, *on_cpu, 2**33 + 5, GAUSSIAN, 0, None)
        kernels.add_noise_(x, *arguments, 2**33 + 5, GAUSSIAN, 0, None)
        assert same(x.cpu(), y)
