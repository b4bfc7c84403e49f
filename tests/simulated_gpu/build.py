"""Compile the simulated GPU: its device, its runtime, and csrc/cuda as host code.

CUDA C++ is C++ but for two things, which are rewritten: ``kernel<<<blocks, threads, shared, stream>>>(args);`` becomes
a call of ``simulated::launch``, and ``extern __shared__ T name[];`` a pointer to the runtime's shared memory.
"""

from __future__ import annotations

import importlib.util
import re
import runpy
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FOLDER = ROOT / "build" / "simulated-gpu"
_LAUNCH = re.compile(r"([A-Za-z_][\w:]*(?:<[^;{}()]*?>)?)<<<(.*?)>>>\((.*?)\);", re.DOTALL)
_SHARED = re.compile(r"extern __shared__ (\w+) (\w+)\[\];")
_FLAGS = ["-O1", "-g0", "-w", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-DUSE_CUDA"]


def translated(text: str) -> str:
    """A file of csrc/cuda as C++."""
    text = _LAUNCH.sub(r"simulated::launch(\2, [=] { \1(\3); });", text)
    return _SHARED.sub(r"\1* \2 = reinterpret_cast<\1*>(simulated::shared_memory);", text)


def sources() -> list[Path]:
    """Write the translated files, those that changed; returns what is to be compiled."""
    folder = FOLDER / "csrc" / "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder.parent / "noise.h": (ROOT / "csrc" / "noise.h").read_text()}
    table = runpy.run_path(str(ROOT / "zoengine" / "noise" / "table.py"))["cpp_header"]()
    files[folder.parent / "noise_table.h"] = table
    found = [HERE / "device.cpp", HERE / "runtime.cpp"]
    for path in sorted((ROOT / "csrc" / "cuda").iterdir()):
        text, to = translated(path.read_text()), folder / path.name
        if path.suffix == ".cu":
            text, to = '#include "runtime.h"\n' + text, folder / f"{path.name}.cpp"
        files[to] = text
        found += [to] if to.suffix == ".cpp" else []
    for path, text in files.items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    return found


def headers() -> Path | None:
    """Where CUDA's headers are: Triton brings them."""
    spec = importlib.util.find_spec("triton")
    folder = Path(spec.origin).parent / "backends" / "nvidia" / "include" if spec and spec.origin else None
    return folder if folder and (folder / "cuda_runtime_api.h").exists() else None


def load() -> ModuleType:
    """The extension, compiled where it is not yet: minutes the first time."""
    from torch.utils import cpp_extension

    include = [HERE, FOLDER / "csrc", FOLDER / "csrc" / "cuda", headers()]
    return cpp_extension.load(
        "simulated_gpu_extension", [str(path) for path in sources()], extra_cflags=_FLAGS,
        extra_ldflags=["-Wl,-Bsymbolic"],  # torch's own device guard is for devices that it knows
        extra_include_paths=[str(path) for path in include], build_directory=str(FOLDER),
    )  # fmt: skip


if __name__ == "__main__":
    load()
