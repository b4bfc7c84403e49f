"""What Triton compiles for NVIDIA GPUs, run on the CPU by a PTX interpreter and compared bit for bit.

This covers what neither Triton's interpreter nor counts of SASS see: the inline assembly, the layouts, shuffles and
the exchange through shared memory, LLVM's rewriting of the arithmetic, and that no access leaves the tensors.
"""

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

from zoengine import kernels
from zoengine.noise import table
from zoengine.ops import reference
from zoengine.ops.schema import TRANSFORMS

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64", torch.int64: "*i64"
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
            block = ptx.Block(compile_for(kernel, values, kwargs), passed, tensors)
            for program in range(grid[0]):
                block.run(program)

        monkeypatch.setattr(kernel, "run", run)

    for kernel in {variant.kernel for variant in aot.VARIANTS.values()}:
        replace(kernel)
    monkeypatch.setattr(launch, "uses_ptx", lambda x: True)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, any NaN equal to any NaN."""
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
