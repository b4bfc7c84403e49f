"""Where a measurement was taken: device, versions, commit."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import zoengine
from zoengine.noise import table
from zoengine.ops import extension

ROOT = Path(__file__).resolve().parent.parent


def describe(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """The ``environment`` of a row (bench.rows) measured on ``device``; ``commit`` overrides what git says."""
    built = extension.build_info()
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "device_type": device.type,
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "isa": str(built["isa"]) if built["built"] else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "zoengine": zoengine.__version__,
        "noise_stream": table.VERSION,
    }


def _commit() -> str | None:
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
