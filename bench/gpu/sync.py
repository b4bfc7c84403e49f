"""No hidden synchronisation: what a step reads from the device, what can be captured, what is compiled anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from bench.gpu.calls import Call, calls
from bench.gpu.check import Check, attempt, same
from zoengine import methods, ops
from zoengine.methods import ZOOptimizer

PART = "sync"
METHODS = (
    ("mezo", "inplace"), ("mezo", "shadow"), ("mezo-momentum", "shadow"), ("mezo-adam", "shadow"), ("lozo", "shadow"),
    ("conmezo", "shadow"), ("loren", "shadow"), ("hizoo", "shadow"),
)  # fmt: skip
_READ = "Memcpy DtoH"
STEPS = 3


def run(device: torch.device, backends: list[str], compiled: Path | None = None) -> Iterator[Check]:
    """Every check of this part; ``compiled`` is the folder that Triton writes what it compiles to."""
    for method, mode in METHODS:
        yield attempt(PART, "one read a step", f"{method}, {mode}", lambda m=method, n=mode: one_read(m, n, device))
        if compiled is not None:
            what = f"{method}, {mode}"
            yield attempt(
                PART, "nothing compiled after the first step", what,
                lambda m=method, n=mode: compiles_once(m, n, device, compiled),
            )  # fmt: skip
    for backend in backends:
        for dtype in ("bf16", "fp32"):
            with ops.use(backend):
                for call in calls(dtype, device):
                    what = f"{call.name}, {dtype}, {backend}"
                    yield attempt(PART, "captured and replayed", what, lambda c=call: replays(c))


def optimizer(method: str, mode: str, device: torch.device) -> tuple[ZOOptimizer, nn.Module, torch.Tensor]:
    """A method on a small bf16 network, the network and its input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 130)).to(device, torch.bfloat16)
    return (
        methods.create(method, model, lr=1e-3, zo_eps=1e-2, mode=mode),
        model,
        torch.randn(8, 300).to(model[0].weight),
    )


def one_read(method: str, mode: str, device: torch.device) -> tuple[bool, str]:
    """Whether each step after the first copies from the device to the host once, for its losses."""
    found, model, x = optimizer(method, mode, device)

    def closure() -> torch.Tensor:
        return model(x).float().square().mean()

    found.step(closure)
    torch.cuda.synchronize(device)
    reads = []
    for _ in range(STEPS):
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            found.step(closure)
            torch.cuda.synchronize(device)
        reads.append(count_reads([event.name for event in profile.events()]))
    return reads == [1] * STEPS, f"{reads} copies from the device in {STEPS} steps"


def count_reads(names: list[str]) -> int:
    """Copies from the device to the host among the names of a profile's events."""
    return sum(name.startswith(_READ) for name in names)


def compiles_once(method: str, mode: str, device: torch.device, compiled: Path) -> tuple[bool, str]:
    """Whether the steps after the first leave the folder of what Triton compiled as it was."""
    found, model, x = optimizer(method, mode, device)
    counts = []
    for _ in range(1 + STEPS):
        found.step(lambda: model(x).float().square().mean())
        counts.append(entries(compiled))
    return len(set(counts)) == 1, f"{counts[-1] - counts[0]} kernels compiled after the first step"


def entries(folder: Path) -> int:
    """Entries of Triton's cache: one a kernel and specialisation."""
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0


def replays(call: Call) -> tuple[bool, str]:
    """Whether a graph of the op, replayed after new seeds and coefficients, gives what a launch with them gives."""
    call.run()  # loads the kernel outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call.function()
    call.renew()
    call.reset()
    graph.replay()
    replayed = [tensor.clone() for tensor in call.written] + ([] if result is None else [result.clone()])
    launched = call.run()
    equal = [bool(same(a, b)) for a, b in zip(replayed, launched, strict=True)]
    return all(equal), "" if all(equal) else f"tensors with other bits: {[k for k, e in enumerate(equal) if not e]}"
