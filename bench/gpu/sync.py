"""No hidden synchronisation: what a step reads from the device, what can be captured, what is compiled anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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
WARM = 2  # steps after which everything is compiled: directions along a momentum begin with the second
STEPS = 3


def run(device: torch.device, backends: list[str]) -> Iterator[Check]:
    """Every check of this part."""
    if device.type == "cuda":
        _events(lambda: torch.zeros(1, device=device).item(), device)  # the first profile of a process may miss some
    for method, mode in METHODS:
        what = f"{method}, {mode}"
        yield attempt(PART, "one read a step", what, lambda m=method, n=mode: one_read(m, n, device))
        if "triton" in backends:
            yield attempt(
                PART, "nothing compiled after the second step", what,
                lambda m=method, n=mode: compiles_no_more(m, n, device),
            )  # fmt: skip
    for backend in sorted(backends):  # "cuda" first: it compiles nothing
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

    for _ in range(WARM):
        found.step(closure)
    torch.cuda.synchronize(device)
    names = [_events(lambda: found.step(closure), device) for _ in range(STEPS)]
    reads = [count_reads(some) for some in names]
    waits = [some.count("cudaStreamSynchronize") for some in names]
    detail = f"{reads} copies from the device in {STEPS} steps, {waits} waits for a stream"
    return reads == [1] * STEPS, detail


def _events(function: Callable[[], object], device: torch.device) -> list[str]:
    """Names of the profiler's events while ``function`` runs."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize(device)
    return [event.name for event in profile.events()]


def count_reads(names: list[str]) -> int:
    """Copies from the device to the host among the names of a profile's events."""
    return sum(name.startswith(_READ) for name in names)


def compiles_no_more(method: str, mode: str, device: torch.device) -> tuple[bool, str]:
    """Whether Triton compiles nothing in the steps after the first ``WARM``."""
    found, model, x = optimizer(method, mode, device)
    with ops.use("triton"), compiling() as names:
        for step in range(WARM + STEPS):
            if step == WARM:
                names.clear()
            found.step(lambda: model(x).float().square().mean())
    return not names, f"compiled after step {WARM}: {', '.join(names)}" if names else ""


@contextmanager
def compiling() -> Iterator[list[str]]:
    """The names of the kernels that Triton compiles, or loads from its cache, within the block."""
    from triton import knobs

    names: list[str] = []

    def note(**info: Any) -> None:
        names.append(str(getattr(info.get("fn"), "name", "a kernel")))

    before, knobs.runtime.jit_post_compile_hook = knobs.runtime.jit_post_compile_hook, note
    try:
        yield names
    finally:
        knobs.runtime.jit_post_compile_hook = before


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
