"""The optimizer every method is: parameters in an arena, a step driven by the method's requests.

A method implements :meth:`ZOOptimizer.run`, a generator that yields requests (:mod:`zoengine.directions`) and is
answered with losses. It is a deterministic function of its state, run seed, step number and those losses, so a step
can be answered by a model, by a log (:meth:`ZOOptimizer.replay`) or by a formula in a test.
"""

from __future__ import annotations

import copy
import logging
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoengine.arena import Arena
from zoengine.directions import Call, Change, Evaluate, Fold, FoldAndUpdate, Request, Rule, Step, Update
from zoengine.evaluation import Closure, Mode, choose_mode
from zoengine.evaluation.base import read, uninterrupted
from zoengine.methods import spsa
from zoengine.methods.fields import FieldError, Fields, build
from zoengine.noise import table
from zoengine.transforms import Dense, States

logger = logging.getLogger(__name__)

Run = Generator[Request, Any, float]
Params = nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

_GROUP_FIELDS = ("lr", "weight_decay")
_SQUARES = ".squares"  # ends the name of a state's squared norm among the states of a state_dict


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
    state_names: ClassVar[tuple[str, ...]] = ()  #: fp32 states laid out as the transform has it, zero at first
    copy_names: ClassVar[tuple[str, ...]] = ()  #: copies of theta in its own dtype
    needs_full_data: ClassVar[bool] = False  #: whether ``full_closure`` has to be set
    backwards_per_step: ClassVar[int] = 0

    def __init__(self, params: Params, **fields: Any) -> None:
        self.fields: Any = build(self.Fields, fields, self.name)
        module, groups = _groups(params)
        super().__init__(groups, {name: getattr(self.fields, name) for name in _GROUP_FIELDS})
        for group in self.param_groups:
            Fields(**{name: group[name] for name in _GROUP_FIELDS})  # checks the values
        named = [
            list(zip(given["names"], group["params"], strict=True))
            for given, group in zip(groups, self.param_groups, strict=True)
        ]
        self.arena = Arena(named, module=module)
        self._states = States()
        self.transform = self.make_transform()
        for state in self.state_names:
            self._states.tensors[state] = self.transform.new_state()
        self.copies: dict[str, list[Tensor]] = {
            copy: [buffer.clone() for buffer in self.arena.buffers] for copy in self.copy_names
        }
        self.memory: dict[str, Any] = self.new_memory()
        mode = choose_mode(self.fields.mode, self.arena)
        self._mode: Mode = mode(self.transform, self.copies, self.fields.rounding)
        self._module = module
        self.full_closure: Closure | None = None  #: the loss over all training data, if the method asks for it
        self.start()
        self._step_number = 0
        self.forward_passes = 0  #: forward passes so far
        self.last_losses: list[float] = []  #: every loss of the last step, in the order of evaluation

    @property
    def states(self) -> dict[str, list[Tensor]]:
        """The method's states by name."""
        return self._states.tensors

    def make_transform(self) -> Dense:
        """What the method's directions are made of. The arena and ``fields`` are there already, states are not."""
        return Dense(self.arena, self.fields.noise, self._states)

    def new_memory(self) -> dict[str, Any]:
        """What the method remembers besides tensors, as JSON can hold it. It changes only after the last evaluation."""
        return {}

    def start(self) -> None:
        """The optimizer is built; for methods whose states do not start at zero."""

    @property
    def step_number(self) -> int:
        """Steps taken so far, which is the number of the next one."""
        return self._step_number

    @classmethod
    def forwards_per_step(cls, fields: Fields) -> int:
        """Forward passes one step takes with these hyperparameters; unless overridden, those of one SPSA estimate."""
        return spsa.forwards(fields)

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
        if self.needs_full_data and self.full_closure is None:
            raise TypeError(
                f"{type(self).__name__} needs the loss over all training data: set optimizer.full_closure to a "
                "function that returns it at the current weights (ZOTrainer does so)"
            )
        if self._step_number == 0:
            self._warn_of_dropout()
        step = self._step()

        def answer(request: Sequence[Evaluate]) -> list[float]:
            asked = [(e, self.full_closure if e.full else closure) for e in request]
            return read([self._mode.evaluate(step, e, function) for e, function in asked], step)

        return self._drive(step, answer)

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
                self._mode.skip(step, evaluation)
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
            "states": {name: list(tensors) for name, tensors in self._stored().items()},
            "memory": copy.deepcopy(self.memory),
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
        stored = {name: tensors for name, tensors in self._stored().items() if not name.endswith(_SQUARES)}
        given = {name: tensors for name, tensors in own["states"].items() if not name.endswith(_SQUARES)}
        sizes, found = ({n: [t.numel() for t in tensors] for n, tensors in d.items()} for d in (stored, given))
        if sizes != found:
            raise ValueError(f"states of other parameters: expected elements {sizes}, got {found}")
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "zoengine"})
        for name, tensors in stored.items():
            for target, source in zip(tensors, given[name], strict=True):
                target.copy_(source)
        device = self.arena.buffers[0].device
        self._states.squares = {
            name.removesuffix(_SQUARES): tensors[0].to(device)
            for name, tensors in own["states"].items()
            if name.endswith(_SQUARES)
        }
        self._restored()
        self.memory = copy.deepcopy(own["memory"])
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
        forwards = 0
        run, reply = self.run(step), None
        with ExitStack() as applying:
            try:
                while True:
                    request = run.send(reply)
                    reply = None
                    if isinstance(request, Call) and request.prepares:
                        self._apply(step, request)
                    elif isinstance(request, Change):
                        if not complete():
                            raise ValueError(f"step {step.number} needs fewer losses than were given")
                        # From the first change on, the step is finished: an interrupt now would leave half of it.
                        applying.enter_context(uninterrupted())
                        self._apply(step, request)
                    else:
                        reply = answer(request)
                        losses += reply
                        forwards += sum(getattr(self.full_closure, "forwards", 1) if e.full else 1 for e in request)
            except StopIteration as stop:
                self._mode.settle(step)
                self._step_number += 1
                self.forward_passes += forwards
                self.last_losses = losses
                return stop.value
            except BaseException:
                self._mode.settle(step)
                raise

    def _apply(self, step: Step, request: Change) -> None:
        rates = ([float(group[name]) for group in self.param_groups] for name in _GROUP_FIELDS)
        match request:
            case Call():
                self._mode.settle(step)
                request.function()
            case Fold():
                self._mode.fold(step, request)
            case Update():
                self._mode.update(step, request, *rates)
            case FoldAndUpdate():
                self._mode.fold_and_update(step, request, *rates)
            case Rule():
                self._mode.rule(step, request, *rates)

    def _stored(self) -> dict[str, list[Tensor]]:
        """Every tensor a state_dict holds."""
        squares = {name + _SQUARES: [square] for name, square in self._states.squares.items()}
        return {**self.states, **self.copies, **squares}

    def _restored(self) -> None:
        """States were loaded; for methods whose transform keeps something derived from them."""

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
