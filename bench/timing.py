"""Timing several functions against each other, interleaved: A B C A B C ... in one run.

Machines drift (other work, clocks, temperature), so two functions are compared only within one round, where they ran
next to each other, and over rounds by the median.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Function = Callable[[], object]

SHORTEST = 2e-3  # seconds a sample should last on a CPU, so that the clock and a call's cost do not matter
GPU_MILLISECONDS = 20  # one sample on a GPU, about
_FLUSH_BYTES = 1 << 28  # several times any L2 cache
_QUEUEING_CYCLES = 600_000  # of a GPU, a third of a millisecond: longer than it takes to queue one call


@dataclass(frozen=True)
class Samples:
    """Seconds per call of one function, one sample per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def times(self, other: Samples) -> float:
        """How many times longer than ``other`` this takes: the median of the ratio within each round."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def once(function: Function) -> float:
    """Seconds of one call, waiting for the GPU if there is one."""
    _wait()
    start = time.perf_counter()
    function()
    _wait()
    return time.perf_counter() - start


def interleaved(
    functions: Sequence[Function],
    device: torch.device,
    rounds: int,
    *,
    before: Callable[[int], object] = lambda k: None,
    after: Callable[[int], object] = lambda k: None,
) -> list[Samples]:
    """Time ``functions`` in turn, ``rounds`` times over, after a call or two each that are not counted.

    On a CPU a sample is as many calls as take two milliseconds, or one. On a GPU it is the median over some calls of
    the time between two events, with the L2 cache emptied before each; all are queued while the GPU is kept waiting,
    so that what Python takes for a call does not count.
    ``before(k)`` and ``after(k)`` are called around every use of function k and are not timed.
    """
    taken: list[list[float]] = [[] for _ in functions]
    calls = [0] * len(functions)  # 0: not known yet
    for _ in range(rounds + 1):
        for k, function in enumerate(functions):
            before(k)
            if not calls[k]:
                calls[k] = _calls(function)
            elif device.type == "cuda":
                taken[k].append(_on_gpu(function))
            else:
                start = time.perf_counter()
                for _ in range(calls[k]):
                    function()
                taken[k].append((time.perf_counter() - start) / calls[k])
            after(k)
    return [Samples(tuple(seconds)) for seconds in taken]


def _on_gpu(function: Function) -> float:
    alone = _between(function)
    count = min(max(round(GPU_MILLISECONDS / max(alone, 0.1)), 3), 50)
    pairs = [_events() for _ in range(count)]
    flushed = _flushed(torch.cuda.current_device())
    torch.cuda._sleep(count * _QUEUEING_CYCLES)
    for begin, end in pairs:
        flushed.zero_()
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3


def _between(function: Function) -> float:
    """Milliseconds of one call."""
    begin, end = _events()
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


@functools.cache
def _flushed(device: int) -> torch.Tensor:
    """What is written to empty the L2 cache."""
    return torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=torch.device("cuda", device))


def _calls(function: Function) -> int:
    """How many calls make a sample; runs the function once or twice."""
    seconds = once(function)
    if seconds < SHORTEST:
        seconds = once(function)  # the first call also paid for fresh memory and caches
    return max(1, round(SHORTEST / max(seconds, 1e-7)))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
