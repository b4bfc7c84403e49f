"""The tests of the CUDA C++ kernels, which need a GPU, on a simulated one: see tests/simulated_gpu."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zoengine import ops

HERE = Path(__file__).resolve().parent
HEADERS = pytest.importorskip("triton", reason="CUDA's headers come with triton").__path__[0]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # the first test compiles it
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch has kernels of its own for CUDA"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the simulated GPU is written for x86-64"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    pytest.mark.skipif(not Path(HEADERS, "backends/nvidia/include").exists(), reason="no CUDA headers"),
    pytest.mark.skipif(not ops.backends()["cpp"].available, reason="the compiled extension is not installed"),
]


def python(*arguments):
    """What Python says with the simulated GPU within reach."""
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built():
    python("-m", "simulated_gpu.build")


@pytest.mark.parametrize("file", ["test_cuda_kernels.py", "test_cuda_update_kernels.py", "test_gpu_bits.py"])
def test_on_the_simulated_gpu(built, file):
    options = ["-q", "-x", "-m", "gpu", "-p", "no:cacheprovider", "--import-mode=importlib"]
    assert " passed" in python("-m", "simulated_gpu", "pytest", *options, file)


# What a GPU would do to wrong code: each of these ends with an error that says so.
REFUSED = {
    "Expected all tensors to be on the same device": "torch.ones(3, device='cuda') + torch.ones(3)",
    "not permitted when stream is capturing: reading a number": (
        "x = torch.ones(1, device='cuda')\nwith torch.cuda.graph(torch.cuda.CUDAGraph()): x.item()"
    ),
    "not permitted when stream is capturing: a copy from the host": (
        "x = torch.ones(1, device='cuda')\nwith torch.cuda.graph(torch.cuda.CUDAGraph()): x.copy_(torch.zeros(1))"
    ),
    "Segmentation fault": (
        "x = torch.ones(1024, device='cuda')\nwith ops.use('cuda'): ops.add_noise_(x.as_strided((9000,), (1,)), 1, 1.0)"
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_a_gpu_refuses_is_refused(built, tmp_path, words):
    (tmp_path / "refused.py").write_text(f"import torch\nfrom zoengine import ops\n{REFUSED[words]}\n")
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{tmp_path}", "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, "-m", "simulated_gpu", "refused"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and words in done.stderr, done.stderr[-2000:]
