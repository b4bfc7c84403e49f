"""``python -m bench.gpu.device``: the GPU that torch sees, as JSON. A process of its own leaves no context behind."""

from __future__ import annotations

import json
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def describe() -> dict[str, Any] | None:
    """Name, compute capability, memory and versions; None where torch sees no NVIDIA GPU."""
    import torch

    if not torch.cuda.is_available() or torch.version.cuda is None:
        return None
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "memory_bytes": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: _version(name) for name in ("triton", "transformers", "peft", "setuptools")},
    }


def slug(name: str) -> str:
    """The device's name as the name of a file: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.stdout.write(json.dumps(describe()) + "\n")
