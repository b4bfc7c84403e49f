"""What Triton compiles for NVIDIA GPUs, run on the CPU by a PTX interpreter and compared bit for bit.

This covers what neither Triton's interpreter nor counts of SASS see: the inline assembly, the layouts, shuffles and
the exchange through shared memory, LLVM's rewriting of the arithmetic, and that no access leaves the tensors.
"""

import itertools
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
import ptx
import triton
import triton_aot as aot
from triton.compiler import ASTSource
from zoengine.kernels import launch
from zoengine.kernels.mask_below import mask_below_kernel
from zoengine.kernels.noise_fill import noise_fill_kernel

from zoengine import kernels, ops
from zoengine.noise import table
from zoengine.ops import reference
from zoengine.ops.schema import RULES, TRANSFORMS

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8",
}  # fmt: skip
COMPILED: dict[str, str] = {}


def compile_for(kernel, values: dict[str, object], options: dict[str, object]) -> str:
    """PTX of ``kernel`` specialised as a launch with these arguments specialises it."""
    signature, constants, attributes = {}, {}, {}
    for k, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(k,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = parameter.annotation_type
    key = f"{kernel.fn.__name__} {signature} {constants} {attributes}"
    if key not in COMPILED:
        source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
        COMPILED[key] = triton.compile(source, target=aot.SM90, options=options).asm["ptx"]
    return COMPILED[key]


@pytest.fixture(autouse=True)
def launches_go_to_the_ptx_interpreter(monkeypatch):
    def replace(kernel):
        def run(*args, grid, warmup, **kwargs):
            values = dict(zip(kernel.arg_names, args, strict=False))
            values |= {name: kwargs.pop(name) for name in kernel.arg_names if name in kwargs}
            passed = [v for p in kernel.params if (v := values[p.name]) is not None and not p.is_constexpr]
            tensors = [v for v in passed if isinstance(v, torch.Tensor)]
            text = compile_for(kernel, values, kwargs)
            block = ptx.Block(text, passed, tensors, grid, 32 * kwargs["num_warps"])
            for program in itertools.product(*map(range, grid)):
                block.run(program)

        monkeypatch.setattr(kernel, "run", run)

    for kernel in {variant.kernel for variant in aot.VARIANTS.values()}:
        replace(kernel)
    monkeypatch.setattr(launch, "uses_ptx", lambda x: True)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, any NaN equal to any NaN."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return bool(((a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())).all())


def check_add_noise(x, count, states, keep, stochastic, offset, noise, specials=(), transform="none", operand=None):
    for k, value in enumerate(specials):
        x[k :: 2 * len(specials)] = value
    arguments = (
        torch.arange(count) * 2**60 - 7,
        torch.arange(count) % 3,
        torch.randn(count + states),
        [torch.randn(x.numel()) for _ in range(states)],
        torch.tensor([0.9]) if keep else None,
        torch.tensor([-99]) if stochastic else None,
    )
    for state in arguments[3]:
        state.view(torch.int32)[::101] = 0x7FFFFFFF  # the NaN of NVIDIA's arithmetic
    expected = x.clone()
    reference.add_noise_(expected, *arguments, offset, noise, TRANSFORMS[transform], operand)
    kernels.add_noise_(x, *arguments, offset, noise, TRANSFORMS[transform], operand)
    assert same(x, expected)


@pytest.mark.parametrize("noise", table.NOISES.values(), ids=table.NOISES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
class TestElementwise:
    def test_one_seed(self, dtype, noise):
        check_add_noise(torch.randn(9001).to(dtype), 1, 0, False, False, 2**34 - 500, noise)

    def test_everything(self, dtype, noise):
        specials = (float("inf"), float("nan"), -0.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny / 2)
        check_add_noise(torch.randn(9000).to(dtype), 2, 2, True, True, 2**40 - 512, noise, specials)

    def test_noise_fill(self, dtype, noise):
        out, expected = torch.empty(8500, dtype=dtype), torch.empty(8500, dtype=dtype)
        kernels.noise_fill_(out, torch.tensor([-5]), 2**39 - 100, 3, noise)
        reference.noise_fill_(expected, torch.tensor([-5]), 2**39 - 100, 3, noise)
        assert same(out, expected)


def test_unaligned_pointers():
    check_add_noise(torch.randn(9001).bfloat16()[1:], 1, 0, False, False, 0, table.GAUSSIAN)


@pytest.mark.parametrize(
    "starts, lengths",
    [([0, 1024, 7000, 16384, 3, 0], [576, 5000, 1, 3616, 0, 1024]), ([0, 1, 2, 1500], [6000, 5999, 5998, 1000])],
    ids=["disjoint", "overlapping"],
)
def test_segments(starts, lengths):
    x, y = torch.randn(20000).bfloat16(), torch.randn(20000).bfloat16()
    x[17000], x[8000] = float("nan"), float("inf")
    if starts[-1]:
        x, y = x[:6000], y[:6000]
    segments = (torch.tensor(starts), torch.tensor(lengths))
    assert same(kernels.segment_stats(x, *segments), reference.segment_stats(x, *segments))
    assert same(kernels.segment_dot(x, y, *segments), reference.segment_dot(x, y, *segments))
    arguments = (torch.tensor([9]), *segments, 1024, 0, table.GAUSSIAN)
    assert same(kernels.segment_dot_noise(x, *arguments), reference.segment_dot_noise(x, *arguments))


OPERANDS = {
    "scale": lambda n: torch.randn(n // 1024),
    "mask": lambda n: torch.randint(0, 256, (n // 8,), dtype=torch.uint8),
    "diag": lambda n: torch.randn(n).abs(),
}


@pytest.mark.parametrize("transform", OPERANDS)
def test_transforms(transform):
    dtype = torch.float32 if transform == "mask" else torch.bfloat16
    x, operand = torch.randn(4096).to(dtype), OPERANDS[transform](4096)
    check_add_noise(x, 1, 0, False, False, 2**34 - 4096, table.GAUSSIAN, transform=transform, operand=operand)


def check(op: str, *arguments) -> None:
    """Run an op of the kernels and of the reference on copies: results and tensors must have the same bits after."""
    runs = []
    for module in (kernels, reference):
        copies = [[s.clone() for s in a] if isinstance(a, list) else a for a in arguments]
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in copies]
        result = getattr(module, op)(*copies)
        tensors = [t for a in copies for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
        runs.append(tensors if result is None else [*tensors, result])
    assert all(same(a, b) for a, b in zip(*runs, strict=True))


TERMS = (torch.tensor([7, -8]), torch.tensor([0, 1]))
SR_SEED = torch.tensor([5])


@pytest.mark.parametrize("noise", table.NOISES.values(), ids=table.NOISES)
def test_fold(noise):
    n, valid = 4096 + 1100, torch.tensor([1024, 1000, 0, 1024, 1024, 76], dtype=torch.int32)
    x = torch.randn(n).bfloat16()
    options = (torch.rand(1), torch.randn(4), torch.rand(1), SR_SEED, valid)
    check("state_fold_", torch.randn(n), x, *TERMS, torch.randn(2), *options, 4096, noise)


@pytest.mark.parametrize("rule", ["amsgrad", "adamu", "hizoo"])
def test_rules(rule):
    number, states, names = RULES[rule]
    n, states = 4096, [torch.rand(4096) for _ in range(states)]
    if states:
        states[-1][5::9], states[-1][6::9], states[-1][7::9] = float("nan"), 0.0, float("inf")
    terms = (*TERMS, torch.randn(4)) if rule == "adamu" else (TERMS[0][:1], TERMS[1][:1], torch.randn(2))
    check(
        "rule_step_", torch.randn(n).bfloat16(), states, *terms, torch.rand(len(names)), torch.rand(1), SR_SEED, 0, 0,
        number,
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 2])
def test_kron_rows(count):
    matrices = ops.Matrices.for_kron([512, 3 * 1024 + 5], [(2, 1040), (2, 13)])
    a, kappa = torch.randn(matrices.sizes[0]), torch.randn(2)
    extents = (2**34 - 1024, table.GAUSSIAN, matrices.blocks, matrices.widest)
    common = (matrices.table, TERMS[0][:count], torch.randn(count), torch.rand(1), SR_SEED, torch.zeros_like(a))
    check("kron_rows_", torch.randn(3200).bfloat16(), a, kappa, *common, *extents)


@pytest.mark.parametrize("count, columns", [(1, 7 * 1024 + 16), (2, 4 * 1024)])
def test_kron_rows_wider_than_what_is_kept(count, columns):
    """Rows at multiples of 16, whose last tiles are drawn twice, and a narrow one among them."""
    matrices = ops.Matrices.for_kron([512, 20000], [(2, columns), (1, 32)])
    a, kappa = torch.randn(matrices.sizes[0]), torch.randn(2)
    extents = (2**34 - 1024, table.GAUSSIAN, matrices.blocks, matrices.widest)
    common = (matrices.table, TERMS[0][:count], torch.randn(count), torch.rand(1), SR_SEED, torch.zeros_like(a))
    check("kron_rows_", torch.randn(20100).bfloat16(), a, kappa, *common, *extents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lowrank_add(dtype):
    rank = 5
    matrices = ops.Matrices.for_lowrank([32, 1005], [(5, 80), (3, 70)], rank)
    left, right = (torch.randn(size) for size in matrices.sizes)
    options = (torch.rand(1), torch.rand(1), SR_SEED, 2**35 - 500, rank, matrices.blocks, matrices.widest)
    check("lowrank_add_", torch.randn(1300).to(dtype), left, right, matrices.table, *options)


@pytest.mark.parametrize("noise", table.NOISES.values(), ids=table.NOISES)
def test_segment_noise_fill(noise):
    tables = (torch.tensor([0, 8300, 8200]), torch.tensor([8192, 700, 1]), torch.tensor([4096, 2**34 - 300, 77]))
    check("segment_noise_fill_", torch.randn(9000), torch.tensor([9]), *tables, 2, noise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_and_masks(dtype):
    x = torch.randn(5120).to(dtype)  # the last program has one whole tile and nothing of the next
    x[::7] = float("nan")
    prefixes = x[1:3].float().abs().view(torch.int32).long() >> 19
    check("segment_histogram", x, torch.tensor([0, 4097]), torch.tensor([4097, 900]), prefixes, 1)
    check("mask_below_", torch.zeros(640, dtype=torch.uint8), x, torch.rand(5))


FAR = 2**22  # a program whose elements a 32-bit number cannot count


def run_far(kernel, values: dict[str, object], shifts: dict[str, int]) -> None:
    """Program ``FAR`` alone, on tensors that begin ``shifts`` elements before what there is of them."""
    options = launch.compile_options(True)
    text = compile_for(kernel, values, options)
    tensors = [v for v in values.values() if isinstance(v, torch.Tensor)]
    values = {n: v.data_ptr() - shifts[n] * v.element_size() if n in shifts else v for n, v in values.items()}
    passed = [values[p.name] for p in kernel.params if not p.is_constexpr]
    ptx.Block(text, passed, tensors, (FAR + 1,), 32 * options["num_warps"]).run((FAR,))


def test_elements_beyond_32_bits():
    config = launch.noise_config(table.GAUSSIAN)
    out, expected, seed = torch.empty(config.span), torch.empty(config.span), torch.tensor([-5])
    numbers = {"n": (FAR + 1) * config.span, "offset": 0, "first": 0, "step": 1, "stream": 3}
    constants = {"NOISE": table.GAUSSIAN, "EDGE": False, "TILES": config.tiles, "ROWS": config.rows, "PTX": True}
    run_far(
        noise_fill_kernel, {"out_ptr": out, "seed_ptr": seed, **numbers, **constants}, {"out_ptr": FAR * out.numel()}
    )
    reference.noise_fill_(expected, seed, FAR * config.span, 3, table.GAUSSIAN)
    assert same(out, expected)

    x, thresholds, bits = torch.randn(4096), torch.rand(4), torch.zeros(512, dtype=torch.uint8)
    tensors = {"bits_ptr": bits, "x_ptr": x, "thresholds_ptr": thresholds}
    shifts = {name: FAR * t.numel() for name, t in tensors.items()}
    run_far(mask_below_kernel, {**tensors, "n": (FAR + 1) * 4096, "TILES": 4, "PTX": True}, shifts)
    expected = torch.zeros_like(bits)
    reference.mask_below_(expected, x, thresholds)
    assert same(bits, expected)
