"""Build of the compiled extension; everything else about the project stands in pyproject.toml.

The extension zoengine._C holds the CPU kernels and, where torch has CUDA and nvcc is there, the CUDA kernels. It is
built against the torch that is installed: ``pip install --no-build-isolation .`` It is optional: without torch or a
working compiler the package is installed all the same and runs on Triton and plain torch.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
GENERATED = Path("build", "generated")
TRITON = "kernels/zo_triton"  # installed as zoengine.kernels: a top-level package `kernels` is somebody else's name
TORCH_2_10 = "0x020a000000000000"


def warn(message: str) -> None:
    print(f"\nwarning: zoengine: {message}\n", file=sys.stderr)


def write_noise_table() -> None:
    """The constants of the noise stream as a C++ header; left alone when unchanged, so that nothing is rebuilt."""
    text = runpy.run_path(str(ROOT / "zoengine" / "noise" / "table.py"))["cpp_header"]()
    header = ROOT / GENERATED / "noise_table.h"
    header.parent.mkdir(parents=True, exist_ok=True)
    if not header.exists() or header.read_text() != text:
        header.write_text(text)


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def extension(cuda: bool):
    from torch.utils import cpp_extension

    write_noise_table()
    common = ["-O3", f"-DTORCH_TARGET_VERSION={TORCH_2_10}"]
    host = [
        "-std=c++17",
        "-ffp-contract=off",  # the noise stream fixes every rounding
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fvisibility=hidden",
        "-g0",
    ]
    files = sources("csrc/*.cpp", "csrc/cpu/*.cpp")
    make = cpp_extension.CppExtension
    flags = {"cxx": [*common, *host]}
    if cuda:
        make = cpp_extension.CUDAExtension
        files += sources("csrc/cuda/*.cu", "csrc/cuda/*.cpp")
        flags["cxx"] += ["-DZO_WITH_CUDA", "-DUSE_CUDA"]
        flags["nvcc"] = [*common, "-std=c++17", "-DUSE_CUDA", "--fmad=false", "--expt-relaxed-constexpr"]
    return make(
        "zoengine._C",
        files,
        include_dirs=[str(ROOT / GENERATED), str(ROOT / "csrc")],
        extra_compile_args=flags,
        py_limited_api=True,
    )


def build_command(cuda: bool):
    from torch.utils import cpp_extension

    class Build(cpp_extension.BuildExtension):
        """Falls back to the CPU half when the CUDA half does not build, and to no extension when that fails too."""

        def run(self) -> None:
            inplace = self.inplace  # setuptools clears it on its way
            failure = self.attempt()
            if failure and cuda:
                warn(f"the CUDA kernels could not be built ({failure}); building the CPU kernels alone")
                self.distribution.ext_modules = [extension(cuda=False)]
                again = build_command(cuda=False)(self.distribution)
                again.inplace, again.editable_mode = inplace, self.editable_mode
                again.build_lib, again.build_temp = self.build_lib, self.build_temp
                again.ensure_finalized()
                again.run()
                self.extensions = again.extensions
            elif failure:
                warn(f"the C++ kernels could not be built ({failure}); installing without them, slow on CPU")
                self.extensions.clear()

        def attempt(self) -> str:
            """Empty, or the beginning of what went wrong: any failure of a compiler leaves a working package."""
            try:
                super().run()
            except Exception as error:
                return f"{type(error).__name__}: {str(error)[:200]} ..."
            return ""

    return Build


def name_toolkit() -> None:
    """Set CUDA_HOME to the toolkit of the nvcc on the path, where nobody has set it.

    torch takes the folder above the one nvcc is in, which holds no headers where that nvcc is a script that starts the
    real one. The real one says where it is.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return
    try:
        said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    except OSError:
        return
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    if top and Path(top[1], "include", "cuda_runtime_api.h").exists():
        os.environ["CUDA_HOME"] = str(Path(top[1]).resolve())


def build_options() -> dict:
    name_toolkit()  # before torch.utils.cpp_extension looks for it
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        warn("torch is not importable during the build, so no kernels are compiled; use pip --no-build-isolation")
        return {}
    has_nvcc = cpp_extension.CUDA_HOME is not None and shutil.which("nvcc", path=f"{cpp_extension.CUDA_HOME}/bin")
    cuda = torch.version.cuda is not None and bool(has_nvcc) and bool(sources("csrc/cuda/*.cu"))
    return {"ext_modules": [extension(cuda)], "cmdclass": {"build_ext": build_command(cuda)}}


setup(
    packages=[
        *find_packages(include=["zoengine", "zoengine.*"]),
        "zoengine.kernels",
        *(f"zoengine.kernels.{name}" for name in find_packages(TRITON)),
    ],
    package_dir={"zoengine.kernels": TRITON},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    **build_options(),
)
