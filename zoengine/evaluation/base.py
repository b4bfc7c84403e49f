"""What the modes have in common: asking the closure, and carrying out changes."""

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
from zoengine.arena import Span
from zoengine.directions import Evaluate, Fold, FoldAndUpdate, Rule, State, Step, Term, Update, merged, scaled
from zoengine.transforms import Dense

Loss = Tensor | float
Closure = Callable[[], Loss]


class EvaluationError(RuntimeError):
    """The closure did not return one number."""


class NonFiniteLossError(FloatingPointError):
    """A loss was NaN or infinite. The weights are those from before the step."""


class Mode(ABC):
    """Evaluates losses at perturbed weights and carries out a method's changes, for one arena.

    Args:
        transform: what the directions are made of; it knows the arena and the states.
        copies: the method's copies of theta by name, one tensor per buffer, in theta's dtypes.
        rounding: how updates of 16-bit weights are rounded, ``"stochastic"`` or ``"nearest"``.
    """

    def __init__(self, transform: Dense, copies: dict[str, list[Tensor]], rounding: str) -> None:
        self.arena = transform.arena
        self.transform = transform
        self.copies = copies
        self.rounding = rounding

    @abstractmethod
    def evaluate(self, step: Step, request: Evaluate, closure: Closure) -> Loss:
        """What ``closure`` returns when the model reads the point asked for, not yet read from the device."""

    @abstractmethod
    def skip(self, step: Step, request: Evaluate) -> None:
        """What :meth:`evaluate` does to the weights, without a forward: for a replay from recorded losses."""

    @abstractmethod
    def outstanding(self) -> Sequence[Term]:
        """The perturbation that stands in theta."""

    @abstractmethod
    def settle(self, step: Step) -> None:
        """Leave theta and its copies clean: no perturbation outstanding."""

    @abstractmethod
    def _settled(self) -> None:
        """A pass has taken the outstanding perturbation out of theta."""

    def update(self, step: Step, update: Update, lrs: Sequence[float], weight_decays: Sequence[float]) -> None:
        """theta <- (1 - lr weight_decay) theta - lr sum(terms), with one lr and weight_decay per parameter group."""
        with uninterrupted():
            for span, keep, lr in self._update_spans(lrs, weight_decays):
                moves = self._moves(update.terms, keep, lr)
                self.transform.add(span, self.arena.buffers, moves, keep=keep, sr_seed=self._update_seed(step))
            self._settled()

    def fold(self, step: Step, fold: Fold) -> None:
        """state[name] <- keep state[name] + sum(terms)."""
        if self._stands_in_theta(fold.name):
            self.settle(step)  # undoing it later would use the state's new values
        self.transform.fold(fold)

    def fold_and_update(
        self, step: Step, request: FoldAndUpdate, lrs: Sequence[float], weight_decays: Sequence[float]
    ) -> None:
        """A fold and an update, in one pass if transform and terms allow, else one after the other."""
        fold, update = request.fold, request.update
        others = any(isinstance(t, State) and t.name != fold.name for t in update.terms)
        if others or not self.transform.fuses:
            if request.fold_first:
                self.fold(step, fold)
            self.update(step, update, lrs, weight_decays)
            if not request.fold_first:
                self.fold(step, fold)
            return
        if request.fold_first and self._stands_in_theta(fold.name):
            self.settle(step)
        with uninterrupted():
            squares = [
                self.transform.fold_span(
                    span, fold, theta=self.arena.buffers, keep=keep, terms=self._moves(update.terms, keep, lr),
                    fold_first=request.fold_first, sr_seed=self._update_seed(step),
                )
                for span, keep, lr in self._update_spans(lrs, weight_decays)
            ]  # fmt: skip
            self.transform.set_norm(fold, squares)
            self._settled()

    def rule(self, step: Step, rule: Rule, lrs: Sequence[float], weight_decays: Sequence[float]) -> None:
        """theta and states through an elementwise rule."""
        self.settle(step)
        tensors = self.transform.states.tensors
        with uninterrupted():
            for span, keep, lr in self._update_spans(lrs, weight_decays):
                where, factor = slice(span.start, span.stop), 1.0 if rule.step is not None else -lr
                theta = self.arena.buffers[span.buffer][where]
                ops.rule_step_(
                    theta if lr else theta.clone(),  # with lr 0 only the states move: theta - 0 u would lose a -0.0
                    rule.name,
                    [tensors[name][span.buffer][where] for name in rule.states],
                    [t.seed for t in rule.terms],
                    [*(t.coeff * factor for t in rule.terms), *rule.second],
                    {**rule.scalars, **({} if rule.step is None else {"step": -lr * rule.step})},
                    keep=keep,
                    offset=span.index,
                    stream=[t.stream for t in rule.terms],
                    noise=self.transform.noise,
                    rounding="nearest" if self._update_seed(step) is None else "stochastic",
                    sr_seed=self._update_seed(step) or 0,
                )

    def _moves(self, terms: Sequence[Term], keep: float, lr: float) -> list[Term]:
        """What to add to keep theta' for keep theta - lr terms, where theta' = theta + outstanding is what is there."""
        return merged([*scaled(self.outstanding(), -keep), *scaled(terms, -lr)])

    def _stands_in_theta(self, name: str) -> bool:
        return any(isinstance(t, State) and t.name == name for t in self.outstanding())

    def _update_spans(
        self, lrs: Sequence[float], weight_decays: Sequence[float]
    ) -> Iterator[tuple[Span, float, float]]:
        """(span, keep factor, lr) of the launches an update needs: one per buffer when all groups agree."""
        uniform = len(set(lrs)) == 1 and not any(lr * decay for lr, decay in zip(lrs, weight_decays, strict=True))
        for span in self.transform.spans(by_group=not uniform):
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
