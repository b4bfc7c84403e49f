"""Timing several functions against each other, interleaved: A B C A B C ... in one run.

Machines drift (other work, clocks, temperature), so two functions are compared only within one round, where they ran
next to each other, and over rounds by the median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Function = Callable[[], object]

SHORTEST = 2e-3  # seconds a sample should last on a CPU, so that the clock and a call's cost do not matter
GPU_MILLISECONDS = 20  # of do_bench, for one sample


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

    On a CPU a sample is as many calls as take two milliseconds, or one; on a GPU it is the median of
    ``triton.testing.do_bench``, which takes CUDA events and empties the L2 cache before each call.
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
    from triton.testing import do_bench

    return do_bench(function, warmup=5, rep=GPU_MILLISECONDS, return_mode="median") / 1e3


def _calls(function: Function) -> int:
    """How many calls make a sample; runs the function once or twice."""
    seconds = once(function)
    if seconds < SHORTEST:
        seconds = once(function)  # the first call also paid for fresh memory and caches
    return max(1, round(SHORTEST / max(seconds, 1e-7)))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
