"""What Python sees of the simulated GPU: ``torch.cuda`` and the compiled extension's CUDA half."""

from __future__ import annotations

import contextlib
import importlib
import sys
from types import SimpleNamespace
from typing import Any

import torch

NAME = "Simulated GPU"
MEMORY = 1 << 30
MULTIPROCESSORS = 3


class Stream:
    """All work runs when it is enqueued, so there is nothing to wait for."""

    device = torch.device("cuda", 0)
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, other: Any) -> None: ...


@contextlib.contextmanager
def _graph(graph: Any, **kwargs: Any):
    graph.capture_begin()
    try:
        yield
    finally:
        graph.capture_end()


def _nothing(*args: Any, **kwargs: Any) -> None: ...


def install() -> None:
    """Make ``torch.cuda`` say that there is a GPU, and the package that its CUDA kernels were built.

    Raises:
        RuntimeError: this torch has CUDA.
    """
    if torch.version.cuda is not None:
        raise RuntimeError("a torch with CUDA has kernels of its own for this device; install one without")
    from simulated_gpu.build import load

    device = load()
    properties = SimpleNamespace(
        name=NAME, major=9, minor=0, total_memory=MEMORY, multi_processor_count=MULTIPROCESSORS
    )
    for name, value in {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (MEMORY // 2, MEMORY),
        "max_memory_allocated": lambda device=None: MEMORY // 4,
        "memory_allocated": lambda device=None: MEMORY // 4,
        "current_stream": lambda device=None: Stream(),
        "Stream": Stream,
        "CUDAGraph": device.Graph,
        "graph": _graph,
        **dict.fromkeys(("stream", "device"), contextlib.nullcontext),
        **dict.fromkeys(("_lazy_init", "_sleep", "empty_cache", "reset_peak_memory_stats", "synchronize"), _nothing),
    }.items():
        setattr(torch.cuda, name, value)
    torch.version.cuda = "13.0"
    torch.Tensor.pin_memory = lambda self, *args: self.clone()
    importlib.import_module("zoengine._C").has_cuda = lambda: True  # its ops for CUDA are the simulated GPU's
    sys.modules.setdefault("triton", None)  # its kernels would want a driver; its interpreter is tested elsewhere
