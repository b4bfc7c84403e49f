"""What the tests of the Triton kernels share: where they run, inputs, and equality of bits."""

import os
import subprocess
import sys

import torch

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if GPU and not INTERPRETED else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SEEDS = [-7, 2**62 + 12345, 3, -(2**63), 2**63 - 1]


def run_in_the_interpreter(file: str) -> None:
    """Run the tests of ``file`` once more, in a process whose Triton interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    options = ["-q", "-x", "-p", "no:cacheprovider", "--import-mode=importlib"]
    command = [sys.executable, "-m", "pytest", *options, file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=os.path.dirname(file))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, any NaN equal to any NaN."""
    assert a.dtype == b.dtype and a.shape == b.shape
    if not a.is_floating_point():
        return torch.equal(a, b)
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return bool(((a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())).all())


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def int64(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)
