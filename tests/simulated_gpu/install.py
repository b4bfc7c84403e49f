"""What Python sees of the simulated GPU: ``torch.cuda`` and the compiled extension's CUDA half."""

from __future__ import annotations

import contextlib
import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

NAME = "Simulated GPU"
MEMORY = 1 << 30
MULTIPROCESSORS = 3
_device: ModuleType | None = None


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


def install() -> ModuleType:
    """Make ``torch.cuda`` say that there is a GPU, and the package that its CUDA kernels were built; the extension.

    Raises:
        RuntimeError: this torch has CUDA.
    """
    global _device
    if _device is not None:
        return _device
    if torch.version.cuda is not None:
        raise RuntimeError("a torch with CUDA has kernels of its own for this device; install one without")
    from simulated_gpu.build import load

    _device = load()
    properties = SimpleNamespace(
        name=NAME, major=9, minor=0, total_memory=MEMORY, multi_processor_count=MULTIPROCESSORS
    )
    nothing = lambda *args, **kwargs: None  # noqa: E731
    no_context = lambda *args, **kwargs: contextlib.nullcontext()  # noqa: E731
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
        "CUDAGraph": _device.Graph,
        "graph": _graph,
        "stream": no_context,
        "device": no_context,
        **dict.fromkeys(("_lazy_init", "_sleep", "empty_cache", "reset_peak_memory_stats", "synchronize"), nothing),
    }.items():
        setattr(torch.cuda, name, value)
    torch.version.cuda = "13.0"
    torch.Tensor.pin_memory = lambda self, *args: self.clone()
    _offer_cuda_half()
    return _device


def _offer_cuda_half() -> None:
    """The extension that holds the CPU kernels says that it has those for CUDA, which are the simulated GPU's."""
    compiled = importlib.import_module("zoengine._C")
    compiled.has_cuda = lambda: True
    sys.modules.setdefault("triton", None)  # its kernels would want a driver; its interpreter is tested elsewhere
