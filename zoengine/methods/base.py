"""The optimizer every method is: parameters in an arena, a step driven by the method's requests.

A method implements :meth:`ZOOptimizer.run`, a generator that yields requests (:mod:`zoengine.directions`) and is
answered with losses. It is a deterministic function of its state, run seed, step number and those losses, so a step
can be answered by a model, by a log (:meth:`ZOOptimizer.replay`) or by a formula in a test.
"""

from __future__ import annotations

import dataclasses
import logging
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoengine.arena import Arena
from zoengine.directions import Fold, Request, Step, Update
from zoengine.evaluation import Closure, Mode, choose_mode
from zoengine.evaluation.base import read, uninterrupted
from zoengine.methods.fields import FieldError, Fields, build
from zoengine.noise import table

logger = logging.getLogger(__name__)

Run = Generator[Request, Any, float]
Params = nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

_GROUP_FIELDS = ("lr", "weight_decay")


class ZOOptimizer(torch.optim.Optimizer):
    """Base of all zeroth-order methods.

    Args:
        params: a module (recommended: replaced parameters are then noticed), parameters, (name, parameter) pairs, or
            parameter groups (dicts that may set their own ``lr`` and ``weight_decay``). They become views of an
            :class:`~zoengine.arena.Arena`; build the optimizer after moving or converting the model.
        **fields: the method's hyperparameters, see its ``Fields``.

    Raises:
        FieldError: an unknown hyperparameter or a bad value.
        ArenaError: the parameters cannot be trained this way.
    """

    name: ClassVar[str]
    Fields: ClassVar[type[Fields]]
    state_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, params: Params, **fields: Any) -> None:
        self.fields: Any = build(self.Fields, fields, self.name)
        module, groups = _groups(params)
        super().__init__(groups, {name: getattr(self.fields, name) for name in _GROUP_FIELDS})
        for group in self.param_groups:
            dataclasses.replace(self.fields, **{name: group[name] for name in _GROUP_FIELDS})  # checks the values
        named = [
            list(zip(given["names"], group["params"], strict=True))
            for given, group in zip(groups, self.param_groups, strict=True)
        ]
        self.arena = Arena(named, module=module)
        self.states: dict[str, list[Tensor]] = {name: self.arena.new_state() for name in self.state_names}
        mode = choose_mode(self.fields.mode, self.arena)
        self._mode: Mode = mode(self.arena, self.states, self.fields.noise, self.fields.rounding)
        self._module = module
        self._step_number = 0
        self.forward_passes = 0  #: forward passes so far
        self.last_losses: list[float] = []  #: every loss of the last step, in the order of evaluation

    @property
    def step_number(self) -> int:
        """Steps taken so far, which is the number of the next one."""
        return self._step_number

    @classmethod
    @abstractmethod
    def forwards_per_step(cls, fields: Fields) -> int:
        """Forward passes one step takes with these hyperparameters."""

    @abstractmethod
    def run(self, step: Step) -> Run:
        """One step as a generator: yields requests, is sent the losses of each, returns the loss to report."""

    def step(self, closure: Closure) -> float:  # type: ignore[override]
        """Take one step.

        Args:
            closure: runs the model and returns its loss, a number or a one-element tensor. It is called
                ``forwards_per_step`` times, without autograd, and must be a deterministic function of the weights:
                the same batch each time, and the model in eval mode.

        Returns:
            The loss to report: the mean over the queries, or at theta for one-sided methods.

        Raises:
            ArenaError: a parameter was replaced since the optimizer was built.
            EvaluationError: the closure did not return one number.
            NonFiniteLossError: a loss was NaN or infinite.

        Whatever is raised, the weights are those from before the step: bit for bit in ``shadow`` mode, up to rounding
        in ``inplace``.
        """
        if closure is None:
            raise TypeError(f"{type(self).__name__}.step needs a closure that runs the model and returns its loss")
        self.arena.check()
        if self._step_number == 0:
            self._warn_of_dropout()
        step = self._step()
        return self._drive(
            step, lambda request: read([self._mode.evaluate(step, e.terms, closure) for e in request], step)
        )

    def replay(self, losses: Sequence[float]) -> float:
        """Take one step answered from recorded losses (``last_losses`` of the original), without any forward.

        In ``shadow`` mode the weights end with the same bits as in the original run; in ``inplace`` too, because the
        perturbation passes are repeated.

        Raises:
            ValueError: the step asks for more or fewer losses than given.
        """
        self.arena.check()
        step, remaining = self._step(), list(losses)

        def answer(request: Sequence) -> list[float]:
            if len(remaining) < len(request):
                raise ValueError(f"step {step.number} needs more than the {len(losses)} recorded losses given")
            for evaluation in request:
                self._mode.skip(step, evaluation.terms)
            answers, remaining[:] = remaining[: len(request)], remaining[len(request) :]
            return read(answers, step)

        return self._drive(step, answer, lambda: len(remaining) == 0)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, plus the key ``"zoengine"``: method, noise version, step, seed, forward passes and states.

        States stand under their own key because torch casts what is in ``"state"`` to the parameters' dtype.
        """
        own = {
            "method": self.name,
            "noise_version": table.VERSION,
            "seed": self.fields.seed,
            "step": self._step_number,
            "forward_passes": self.forward_passes,
            "states": {name: list(buffers) for name, buffers in self.states.items()},
        }
        return {**super().state_dict(), "zoengine": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; with the same weights and losses, the run ends with the same bits.

        Raises:
            ValueError: the state is of another method, noise version, seed or set of parameters. Nothing is changed.
        """
        own = state_dict.get("zoengine")
        if own is None:
            raise ValueError("this state_dict has no 'zoengine' entry; it was not saved by a zoengine optimizer")
        expected = {"method": self.name, "noise_version": table.VERSION, "seed": self.fields.seed}
        for key, value in expected.items():
            if own[key] != value:
                raise ValueError(f"this state_dict has {key} {own[key]!r}, the optimizer has {value!r}")
        sizes = {name: [b.numel() for b in buffers] for name, buffers in self.states.items()}
        found = {name: [b.numel() for b in buffers] for name, buffers in own["states"].items()}
        if sizes != found:
            raise ValueError(f"states of other parameters: expected elements {sizes}, got {found}")
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "zoengine"})
        for name, buffers in own["states"].items():
            for target, source in zip(self.states[name], buffers, strict=True):
                target.copy_(source)
        self._step_number = own["step"]
        self.forward_passes = own["forward_passes"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while the optimizer is built: its arena is laid out once."""
        if hasattr(self, "arena"):
            raise RuntimeError("parameter groups cannot be added to an arena; build a new optimizer with all of them")
        super().add_param_group(param_group)

    def _step(self) -> Step:
        return Step(self.fields.seed, self._step_number)

    def _drive(
        self, step: Step, answer: Callable[[Sequence], list[float]], complete: Callable[[], bool] = lambda: True
    ) -> float:
        """Run the method's generator to its end; whatever is raised, theta is clean afterwards."""
        losses: list[float] = []
        run, reply = self.run(step), None
        with ExitStack() as applying:
            try:
                while True:
                    request = run.send(reply)
                    reply = None
                    if isinstance(request, Update | Fold):
                        if not complete():
                            raise ValueError(f"step {step.number} needs fewer losses than were given")
                        # From the first change on, the step is finished: an interrupt now would leave half of it.
                        applying.enter_context(uninterrupted())
                        self._apply(step, request)
                    else:
                        reply = answer(request)
                        losses += reply
            except StopIteration as stop:
                self._mode.settle(step)
                self._step_number += 1
                self.forward_passes += len(losses)
                self.last_losses = losses
                return stop.value
            except BaseException:
                self._mode.settle(step)
                raise

    def _apply(self, step: Step, request: Update | Fold) -> None:
        if isinstance(request, Fold):
            self._mode.fold(step, request.name, request.keep, request.terms)
        else:
            lrs, decays = ([group[name] for group in self.param_groups] for name in _GROUP_FIELDS)
            self._mode.update(step, request.terms, [float(lr) for lr in lrs], decays)

    def _warn_of_dropout(self) -> None:
        if self._module is None:
            return
        for name, child in self._module.named_modules():
            if isinstance(child, nn.modules.dropout._DropoutNd) and child.training and child.p > 0:
                logger.warning(
                    "module %r applies dropout; call model.eval(), or a step's losses cannot be compared", name
                )
                return


def _groups(params: Params) -> tuple[nn.Module | None, list[dict[str, Any]]]:
    """The module, if one was given, and torch parameter groups that each hold ``params`` and ``names``."""
    if isinstance(params, nn.Module):
        pairs = [(name, p) for name, p in params.named_parameters() if p.requires_grad]
        return params, [_group(pairs or list(params.named_parameters()), {}, 0)]
    members = list(params)
    if members and isinstance(members[0], dict):
        groups, first = [], 0
        for group in members:
            unknown = set(group) - {"params", *_GROUP_FIELDS}
            if unknown:
                raise FieldError(
                    f"a parameter group may set {', '.join(_GROUP_FIELDS)}; got {', '.join(sorted(unknown))}"
                )
            inside = group["params"]
            inside = [inside] if isinstance(inside, Tensor) else list(inside)
            groups.append(_group(inside, {k: v for k, v in group.items() if k != "params"}, first))
            first += len(inside)
        return None, groups
    return None, [_group(members, {}, 0)]


def _group(members: Sequence[Any], options: dict[str, Any], first: int) -> dict[str, Any]:
    pairs = [m if isinstance(m, tuple) else (f"parameters[{first + k}]", m) for k, m in enumerate(members)]
    return {**options, "params": [p for _, p in pairs], "names": [name for name, _ in pairs]}
