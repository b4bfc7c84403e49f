"""What the modes have in common: asking the closure, and launching one pass over the arena."""

from __future__ import annotations

import math
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from zoengine import ops
from zoengine.arena import Arena, Span
from zoengine.directions import Noise, Step, Term

Loss = Tensor | float
Closure = Callable[[], Loss]


class EvaluationError(RuntimeError):
    """The closure did not return one number."""


class NonFiniteLossError(FloatingPointError):
    """A loss was NaN or infinite. The weights are those from before the step."""


class Mode(ABC):
    """Evaluates losses at perturbed weights and applies updates, for one arena and the states of one method.

    Args:
        arena: the weights.
        states: fp32 buffers of the method's states by name, one per buffer of the arena.
        noise: distribution of the directions, as in :func:`zoengine.ops.add_noise_`.
        rounding: how updates of 16-bit weights are rounded, ``"stochastic"`` or ``"nearest"``.
    """

    def __init__(self, arena: Arena, states: dict[str, list[Tensor]], noise: str, rounding: str) -> None:
        self.arena = arena
        self.states = states
        self.noise = noise
        self.rounding = rounding

    @abstractmethod
    def evaluate(self, step: Step, terms: Sequence[Term], closure: Closure) -> Loss:
        """What ``closure`` returns when the model reads theta + ``terms``, not yet read from the device."""

    @abstractmethod
    def skip(self, step: Step, terms: Sequence[Term]) -> None:
        """What :meth:`evaluate` does to the weights, without a forward: for a replay from recorded losses."""

    @abstractmethod
    def update(self, step: Step, terms: Sequence[Term], lrs: Sequence[float], weight_decays: Sequence[float]) -> None:
        """theta <- (1 - lr weight_decay) theta - lr sum(terms), with one lr and weight_decay per parameter group."""

    @abstractmethod
    def settle(self, step: Step) -> None:
        """Leave theta clean: no perturbation outstanding."""

    def fold(self, step: Step, name: str, keep: float, terms: Sequence[Noise]) -> None:
        """state[name] <- keep state[name] + sum(terms)."""
        for span in self.arena.spans:
            self._launch(span, self.states[name], terms, keep=keep)

    def _launch(
        self,
        span: Span,
        source: Sequence[Tensor],
        terms: Sequence[Term],
        *,
        keep: float = 1.0,
        target: Sequence[Tensor] | None = None,
        sr_seed: int | None = None,
    ) -> None:
        """target (or source) = keep source + sum(terms) over one span, in one pass.

        Terms whose coefficient is 0 are dropped, not multiplied: -0.0 + 0 z would become +0.0.
        """
        noises = [t for t in terms if isinstance(t, Noise) and t.coeff != 0.0]
        states = [t for t in terms if not isinstance(t, Noise) and t.coeff != 0.0]
        if target is None and not noises and not states and keep == 1.0:
            return
        where = slice(span.start, span.stop)
        ops.add_noise_(
            source[span.buffer][where],
            [t.seed for t in noises],
            [t.coeff for t in noises],
            offset=span.index,
            noise=self.noise,
            states=[self.states[t.name][span.buffer][where] for t in states],
            state_coeffs=[t.coeff for t in states],
            decay=1.0 - keep,
            out=None if target is None else target[span.buffer][where],
            rounding="nearest" if sr_seed is None else "stochastic",
            sr_seed=sr_seed or 0,
        )

    def _update_spans(
        self, lrs: Sequence[float], weight_decays: Sequence[float]
    ) -> Iterator[tuple[Span, float, float]]:
        """(span, keep factor, lr) of the launches an update needs: one per buffer when all groups agree."""
        uniform = len(set(lrs)) == 1 and not any(lr * decay for lr, decay in zip(lrs, weight_decays, strict=True))
        for span in self.arena.spans if uniform else self.arena.group_spans:
            decay = lrs[span.group] * weight_decays[span.group] if span.decays else 0.0
            yield span, 1.0 - decay, lrs[span.group]

    def _update_seed(self, step: Step) -> int | None:
        return step.rounding_seed() if self.rounding == "stochastic" else None


def call(closure: Closure) -> Loss:
    """Run ``closure`` without autograd and check that it returned one number.

    Raises:
        EvaluationError: it returned None, a vector, or something that is not a number.
    """
    with torch.no_grad():
        loss = closure()
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise EvaluationError(
                f"the closure returned a tensor of shape {tuple(loss.shape)}; return one loss, for example its mean"
            )
        return loss.detach()
    if loss is None:
        raise EvaluationError("the closure returned None; return the loss (did it end without a return statement?)")
    try:
        return float(loss)
    except (TypeError, ValueError):
        raise EvaluationError(f"the closure returned {type(loss).__name__}; return a number or a tensor") from None


def read(losses: Sequence[Loss], step: Step) -> list[float]:
    """The losses as Python floats, with one device-to-host copy for all those on the same device.

    Raises:
        NonFiniteLossError: one of them is NaN or infinite; names step, evaluation and seed.
    """
    values: list[float] = [0.0] * len(losses)
    on_device: dict[torch.device, list[int]] = {}
    for k, loss in enumerate(losses):
        if isinstance(loss, Tensor):
            on_device.setdefault(loss.device, []).append(k)
        else:
            values[k] = loss
    for positions in on_device.values():
        stacked = torch.stack([losses[k].reshape(()).double() for k in positions])
        for k, value in zip(positions, stacked.tolist(), strict=True):
            values[k] = value
    for k, value in enumerate(values):
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"loss {value} in step {step.number}, evaluation {k + 1} of {len(values)}, run seed {step.run_seed}; "
                "the weights are as before this step. A smaller lr or zo_eps, or fp32 weights, may help"
            )
    return values


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back during the block, so that a pass over the weights and its bookkeeping happen together."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or previous is None:
        yield  # Python runs signal handlers in the main thread only
        return
    pending: list[tuple] = []
    signal.signal(signal.SIGINT, lambda *args: pending.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if pending and callable(previous):
            previous(*pending[-1])
