"""The compiled extension ``zoengine._C`` as backends: ``cpp`` for CPU tensors, ``cuda`` for those on a GPU.

Environment: ``ZOENGINE_CPU_ISA`` = scalar, avx2 or avx512 limits the CPU kernels to one instruction set; all of them
give the same bits.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import torch

from zoengine.ops import schema

ISA_VARIABLE = "ZOENGINE_CPU_ISA"
ISAS = ("scalar", "avx2", "avx512")


@functools.cache
def _module() -> ModuleType:
    """``zoengine._C``, with the instruction set of the environment chosen; importing it registers the ops."""
    try:
        module = importlib.import_module("zoengine._C")
    except ImportError as error:
        raise ImportError(
            f"the compiled extension zoengine._C cannot be imported ({error}); it is built by "
            "`pip install --no-build-isolation .` where a C++ compiler and torch are installed"
        ) from error
    name = os.environ.get(ISA_VARIABLE, "")
    if name:
        if name not in ISAS:
            raise ValueError(f"{ISA_VARIABLE}={name!r}: expected one of {', '.join(ISAS)}")
        if name not in module.cpu_isas():
            raise ValueError(
                f"{ISA_VARIABLE}={name!r}, but this CPU and build offer {', '.join(module.cpu_isas())}; "
                f"unset {ISA_VARIABLE} to take the best"
            )
        module.set_cpu_isa(name)
    return module


def load(device: str) -> SimpleNamespace:
    """The backend for ``device`` ("cpu" or "cuda"): one function per op, with the arguments of its schema.

    Raises:
        ImportError: the extension, or its CUDA half, was not built, or not for this GPU; the message says what to do.
        ValueError: ``ZOENGINE_CPU_ISA`` names an instruction set that does not exist or does not run here.
    """
    module = _module()
    if device == "cuda" and not module.has_cuda():
        raise ImportError(
            "zoengine._C was built without CUDA: that needs a torch with CUDA and nvcc at build time; the triton "
            "backend needs neither"
        )
    if device == "cuda" and torch.cuda.is_available():
        torch.cuda.current_device()  # torch makes the context, with its own settings
        if error := module.cuda_error():
            major, minor = torch.cuda.get_device_capability()
            raise ImportError(
                f"the CUDA kernels of zoengine._C do not run on {torch.cuda.get_device_name()} ({error}); they were "
                f"built for other GPUs: build again with TORCH_CUDA_ARCH_LIST={major}.{minor}"
            )
    return SimpleNamespace(**{name: getattr(torch.ops.zoengine_C, name).default for name in schema.SCHEMAS})


def isa() -> str:
    """The instruction set that the CPU kernels use now.

    Raises:
        ImportError: the extension was not built.
    """
    return _module().cpu_isa()


def isas() -> tuple[str, ...]:
    """The instruction sets that this CPU runs, the best first.

    Raises:
        ImportError: the extension was not built.
    """
    return _module().cpu_isas()


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the CPU kernels with one instruction set for a block, in all threads; for tests and benchmarks.

    Raises:
        ImportError: the extension was not built.
        ValueError: this CPU does not run it.
    """
    module = _module()
    previous = module.cpu_isa()
    module.set_cpu_isa(name)
    try:
        yield
    finally:
        module.set_cpu_isa(previous)


def build_info() -> dict[str, object]:
    """What ``zoengine doctor`` shows: whether the extension is there, where, with CUDA or not, instruction sets."""
    try:
        module = _module()
    except (ImportError, ValueError) as error:
        return {"built": False, "reason": str(error)}
    return {
        "built": True,
        "path": module.__file__,
        "cuda": module.has_cuda(),
        "isa": module.cpu_isa(),
        "isas": module.cpu_isas(),
    }
