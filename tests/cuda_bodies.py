"""The bodies of the CUDA kernels as host code, for tests: build and call tests/cuda_host*.cpp, compare bits.

The structures mirror csrc/cuda/arguments.h field by field; a pointer is given as a tensor's address, or None.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from zoengine.noise import table

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("g++") or shutil.which("clang++")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_POINTER, _INT32, _INT64, _UINT32, _UINT64 = (
    ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32, ctypes.c_uint64,
)  # fmt: skip


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class AddNoise(ctypes.Structure):
    _fields_ = [
        *_fields(_POINTER, "x out seeds streams coeffs"), ("states", _POINTER * 2),
        *_fields(_POINTER, "keep rounding_seed"), ("count", _INT64), ("offset", _UINT64), ("stream", _UINT32),
        *_fields(_INT32, "terms state_count"),
    ]  # fmt: skip


class Fused(ctypes.Structure):
    _fields_ = [
        *_fields(_POINTER, "x out"), ("states", _POINTER * 3), ("added", _POINTER * 2),
        *_fields(_POINTER, "seeds streams coeffs numbers keep state_keep rounding_seed scale bits diag valid squares"),
        *_fields(_INT64, "count first"), ("offset", _UINT64), *_fields(_INT32, "terms noise"),
    ]  # fmt: skip


class Matrices(ctypes.Structure):
    _fields_ = [("table", _POINTER), ("count", _INT64), ("fields", _INT32), *_fields(_INT64, "blocks widest")]


class Kron(ctypes.Structure):
    _fields_ = [
        *_fields(_POINTER, "x out a kappa seeds coeffs keep rounding_seed parts totals score"),
        ("matrices", Matrices), *_fields(_INT64, "first_block block_count columns"), ("offset", _UINT64),
        *_fields(_INT32, "terms noise capacity"),
    ]  # fmt: skip


class LowRank(ctypes.Structure):
    _fields_ = [
        *_fields(_POINTER, "x out left right coeff keep rounding_seed"), ("matrices", Matrices), ("offset", _UINT64),
        ("rank", _INT32),
    ]  # fmt: skip


class Segments(ctypes.Structure):
    _fields_ = [*_fields(_POINTER, "x starts lengths"), ("count", _INT64)]


class SegmentFill(ctypes.Structure):
    _fields_ = [
        *_fields(_POINTER, "out starts lengths indices seed"), *_fields(_INT64, "count size"), ("stream", _UINT32),
        ("noise", _INT32),
    ]  # fmt: skip


class Histogram(ctypes.Structure):
    _fields_ = [("segments", Segments), *_fields(_POINTER, "prefixes counts"), ("size", _INT64), ("digit", _INT32)]


class Factor(ctypes.Structure):
    _fields_ = [
        ("y", _POINTER), ("y_type", _INT32), ("seed", _POINTER), ("offset", _UINT64), ("stream", _UINT32),
        ("noise", _INT32),
    ]  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL:
    """All of tests/cuda_host*.cpp in one shared library; not optimised: the bits are the same, and it compiles fast."""
    folder = Path(tempfile.mkdtemp(prefix="cuda_host"))
    (folder / "noise_table.h").write_text(table.cpp_header())
    flags = ["-std=c++17", "-O0", "-ffp-contract=off", "-fPIC", f"-I{folder}", f"-I{ROOT}/csrc/cuda"]
    sources = sorted((ROOT / "tests").glob("cuda_host*.cpp"))
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda s, o: _compile(*flags, "-c", str(s), "-o", o), sources, objects))
    _compile("-shared", *objects, "-o", str(folder / "host.so"))
    loaded = ctypes.CDLL(str(folder / "host.so"))
    shutil.rmtree(folder)  # it is mapped
    return loaded


def _compile(*arguments: str) -> None:
    done = subprocess.run([COMPILER, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def call(name: str, *arguments: ctypes.Structure | Tensor | int | None) -> None:
    """Run the function ``name`` of the library on structures, tensors and numbers.

    It returns 0, or 1 after a vector access at an address that a GPU would refuse.
    """
    converted = [
        ctypes.byref(a) if isinstance(a, ctypes.Structure) else _POINTER(address(a)) if isinstance(a, Tensor) else a
        for a in arguments
    ]
    assert getattr(library(), name)(*converted) == 0, "misaligned access"


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def addresses(count: int, tensors: list[Tensor]) -> ctypes.Array:
    return (_POINTER * count)(*map(address, tensors))


def bits(x: Tensor) -> Tensor:
    """The bits of ``x``, every NaN alike."""
    if not x.is_floating_point():
        return x
    x = torch.where(x.isnan(), torch.full_like(x, float("nan")), x)
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


class Framed:
    """A tensor ``shift`` elements behind a boundary of 64 bytes, between elements that must keep their value."""

    def __init__(self, values: Tensor, shift: int = 0):
        self.shift, count = shift, values.numel()
        raw = torch.full((shift + count + 128,), 3, dtype=values.dtype)
        skip = -raw.data_ptr() % 64 // values.element_size()
        self.frame = raw[skip : skip + shift + count + 32]
        self.tensor = self.frame[shift : shift + count].copy_(values)

    def intact(self) -> bool:
        behind = self.shift + self.tensor.numel()
        return bool((self.frame[: self.shift] == 3).all() and (self.frame[behind:] == 3).all())
