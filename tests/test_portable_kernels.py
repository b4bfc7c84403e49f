"""The portable CPU kernels on another processor: compiled for 64-bit Arm and run by an emulator, where both exist."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from zoengine.noise import table
from zoengine.ops import reference
from zoengine.ops.schema import RULES

ROOT = Path(__file__).resolve().parent.parent
# The host's own compiler takes part too: it shows that the test itself works.
TARGETS = {"host": ("g++", ""), "aarch64": ("aarch64-linux-gnu-g++", "qemu-aarch64")}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FIRST_UNIT, UNITS = 2**21 - 1, 2  # across the lowest 32 bits of the index


@pytest.fixture(scope="module", params=TARGETS)
def command(request, tmp_path_factory):
    """The command line of the program for one target."""
    compiler, emulator = TARGETS[request.param]
    if not shutil.which(compiler) or (emulator and not shutil.which(emulator)):
        pytest.skip(f"needs {compiler} {emulator}".strip())
    folder = tmp_path_factory.mktemp("portable")
    (folder / "noise_table.h").write_text(table.cpp_header())
    sources = [ROOT / "tests/portable_kernels.cpp", ROOT / "csrc/cpu/isa_scalar.cpp"]
    flags = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-static"]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{folder}"]
    subprocess.run([compiler, *flags, *includes, *sources, "-o", folder / "program"], check=True)
    if platform.machine() == request.param:
        emulator = ""
    return [*([emulator] if emulator else []), str(folder / "program")]


@pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "bfloat16", "float16"))
@pytest.mark.parametrize("noise", [table.GAUSSIAN, table.RADEMACHER], ids=("gaussian", "rademacher"))
def test_another_processor_gives_the_same_bits(command, dtype, noise):
    n = UNITS * 2048
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    x = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[:8] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-7, 6e-5, 6e4, -1e-40])
    seeds, coeffs = torch.tensor([0x0123456789ABCDEF, 42]), torch.tensor([0.5, -0.001])
    for stochastic in (False, True):
        arguments = (DTYPES.index(dtype), int(noise == table.GAUSSIAN), int(stochastic), FIRST_UNIT, UNITS)
        program = [*command, *map(str, arguments)]
        done = subprocess.run(program, input=x.view(torch.uint8).numpy().tobytes(), capture_output=True, check=True)
        *results, stepped, moved = torch.frombuffer(bytearray(done.stdout), dtype=integers).view(4, n)
        index = FIRST_UNIT * 2048
        for count, result in zip((1, 2), results, strict=True):
            expected = torch.empty_like(x)
            sr_seed = torch.tensor(7) if stochastic else None
            streams = torch.zeros(count, dtype=torch.int64)
            terms = (seeds[:count], streams, coeffs[:count], [], None, sr_seed, index, noise, 0, None)
            reference.add_noise_out(x, *terms, out=expected)
            assert torch.equal(result, expected.view(integers))

        expected, scalars = x.clone(), torch.tensor([0.9, 0.1, 0.99, 0.01, 1.5, 1e-3, -0.01])
        first = (seeds[:1], torch.tensor([0]), torch.tensor([0.5]))
        states = [torch.full((n,), value) for value in (0.25, 0.125)]
        reference.rule_step_(expected, states, *first, scalars, None, sr_seed, index, noise, RULES["adam"][0])
        assert torch.equal(stepped, expected.view(integers))

        expected, a, table_of_one = x.clone(), torch.full((500,), 0.0625), torch.tensor([[0, n // 500, 500, 0, 0]])
        rest = (torch.tensor([0.5]), table_of_one, seeds, coeffs, None, sr_seed, None, index, noise, 1, 500)
        reference.kron_rows_(expected, a, *rest)
        assert torch.equal(moved, expected.view(integers))
