"""First-order baselines, so that what a zeroth-order method saves and costs can be measured in the same run.

The rules are torch's own SGD and AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101); here stand only
a step that asks a closure, as the zeroth-order methods have it, and checkpoints without pickle. There is no arena and
no noise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoengine.evaluation import Closure, EvaluationError, NonFiniteLossError
from zoengine.evaluation.base import uninterrupted
from zoengine.methods.fields import FieldError, build, check_types, require
from zoengine.noise.seeds import check_seed

Params = nn.Module | Iterable[Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstOrderFields:
    """What every first-order baseline takes."""

    lr: float = dataclasses.field(metadata={"help": "learning rate; has no default"})
    weight_decay: float = dataclasses.field(
        default=0.0, metadata={"help": "decoupled: theta *= 1 - lr * weight_decay once a step, matrices only"}
    )
    seed: int = dataclasses.field(default=0, metadata={"help": "run seed; the rule draws nothing"})
    clip_norm: float = dataclasses.field(
        default=1.0, metadata={"help": "the gradient's norm over all parameters is cut to this; 0: never"}
    )

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("lr", "weight_decay", "clip_norm"):
            require(getattr(self, name) >= 0, self, name, "at least 0")
        try:
            check_seed(self.seed)
        except ValueError as error:
            raise FieldError(str(error)) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FTAdamWFields(FirstOrderFields):
    """Fields of AdamW."""

    beta1: float = dataclasses.field(default=0.9, metadata={"help": "decay of the gradient's average, in [0, 1)"})
    beta2: float = dataclasses.field(default=0.999, metadata={"help": "decay of its square's average, in [0, 1)"})
    adam_eps: float = dataclasses.field(default=1e-8, metadata={"help": "added to the root of the second average"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, self, name, "in [0, 1)")
        require(self.adam_eps > 0, self, "adam_eps", "greater than 0")


class FirstOrder(torch.optim.Optimizer):
    """Mixed into one of torch's optimizers: one step is one forward and one backward pass of a closure.

    Args:
        params: a module, parameters, (name, parameter) pairs, or parameter groups that may set their own ``lr`` and
            ``weight_decay``. Each group becomes two, for weight decay takes matrices (ndim >= 2) and no vectors.
        **fields: the method's hyperparameters, see its ``Fields``.

    16-bit weights are updated in their own precision, as torch does it: an update smaller than half a unit in the last
    place is lost. A fair baseline has fp32 weights.

    Raises:
        FieldError: an unknown hyperparameter or a bad value.
    """

    name: ClassVar[str]
    Fields: ClassVar[type[FirstOrderFields]]
    state_names: ClassVar[tuple[str, ...]] = ()
    backwards_per_step: ClassVar[int] = 1  #: backward passes one step takes

    def __init__(self, params: Params, **fields: Any) -> None:
        self.fields: Any = build(self.Fields, fields, self.name)
        super().__init__(_decaying_apart(params), **self._options())
        self.step_number = 0  #: steps taken so far
        self.forward_passes = 0  #: forward passes so far
        self.backward_passes = 0  #: backward passes so far
        self.last_losses: list[float] = []  #: the loss of the last step

    @classmethod
    def forwards_per_step(cls, fields: FirstOrderFields) -> int:
        """Forward passes one step takes."""
        return 1

    def _options(self) -> dict[str, Any]:
        """The fields under the names of torch's optimizer."""
        return {"lr": self.fields.lr, "weight_decay": self.fields.weight_decay}

    def step(self, closure: Closure) -> float:  # type: ignore[override]
        """Take one step.

        Args:
            closure: runs the model and returns its loss, a one-element tensor that autograd can differentiate. It is
                called once, with autograd on.

        Returns:
            The loss before the step.

        Raises:
            EvaluationError: the closure's loss has no graph.
            NonFiniteLossError: the loss or the gradient was NaN or infinite; the weights are those from before.
        """
        if closure is None:
            raise TypeError(f"{type(self).__name__}.step needs a closure that runs the model and returns its loss")
        self.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = self._differentiable(closure())
            value = self._finite(float(loss.detach()), "loss")
            loss.backward()
        try:
            parameters = self._parameters()
            for parameter in parameters:
                if parameter.grad is None:  # the loss does not depend on it: that is a gradient of zero
                    parameter.grad = torch.zeros_like(parameter)
            norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
            self._finite(float(norm), "gradient norm")
            if self.fields.clip_norm:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.fields.clip_norm, norm)
            with uninterrupted():
                super().step()
                self.step_number += 1
                self.forward_passes += 1
                self.backward_passes += 1
                self.last_losses = [value]
        finally:
            self.zero_grad(set_to_none=True)
        return value

    def state_dict(self) -> dict[str, Any]:
        """As the zeroth-order methods': torch's groups, and under ``"zoengine"`` all that is needed to go on."""
        states = {name: [self.state[p][name] for p in self._parameters()] for name in self.state_names if self.state}
        own = {
            "method": self.name,
            "seed": self.fields.seed,
            "step": self.step_number,
            "forward_passes": self.forward_passes,
            "backward_passes": self.backward_passes,
            "states": {name: [tensor.contiguous() for tensor in tensors] for name, tensors in states.items()},
        }
        return {"state": {}, "param_groups": super().state_dict()["param_groups"], "zoengine": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; with the same weights and batches, the run ends with the same bits.

        Raises:
            ValueError: the state is of another method, seed or set of parameters. Nothing is changed.
        """
        own = state_dict.get("zoengine")
        if own is None:
            raise ValueError("this state_dict has no 'zoengine' entry; it was not saved by a zoengine optimizer")
        for key, value in {"method": self.name, "seed": self.fields.seed}.items():
            if own[key] != value:
                raise ValueError(f"this state_dict has {key} {own[key]!r}, the optimizer has {value!r}")
        parameters = self._parameters()
        expected = {name: [tuple(p.shape) for p in parameters] for name in self.state_names if own["step"]}
        found = {name: [tuple(tensor.shape) for tensor in tensors] for name, tensors in own["states"].items()}
        if expected != found:
            raise ValueError(f"states of other parameters: expected shapes {expected}, got {found}")
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for k, parameter in enumerate(parameters):
            for name, tensors in own["states"].items():
                value = torch.zeros_like(parameter, requires_grad=False)
                self.state[parameter][name] = value.copy_(tensors[k])
            if own["states"]:
                self.state[parameter]["step"] = torch.tensor(float(own["step"]))
        self.step_number = own["step"]
        self.forward_passes, self.backward_passes = own["forward_passes"], own["backward_passes"]

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _differentiable(self, loss: Any) -> Tensor:
        if not isinstance(loss, Tensor) or loss.grad_fn is None:
            what = "a tensor without a graph" if isinstance(loss, Tensor) else f"{type(loss).__name__} {loss!r}"
            raise EvaluationError(
                f"{self.name} needs a loss that autograd can differentiate, but the closure returned {what}; for an "
                "objective that has no gradient take a zeroth-order method, such as mezo"
            )
        if loss.numel() != 1:
            raise EvaluationError(
                f"the closure returned a tensor of shape {tuple(loss.shape)}; return one loss, for example its mean"
            )
        return loss

    def _finite(self, value: float, what: str) -> float:
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"{what} {value} in step {self.step_number}; the weights are as before this step. A smaller lr, or "
                "fp32 weights, may help"
            )
        return value


class FTSGD(FirstOrder, torch.optim.SGD):
    """Fine-tuning by SGD with gradients: theta <- (1 - lr weight_decay) theta - lr g, without momentum.

    A baseline: it needs a backward pass, whose gradients and activations are what zeroth-order methods do without.
    """

    name = "ft-sgd"
    Fields = FirstOrderFields


class FTAdamW(FirstOrder, torch.optim.AdamW):
    """Fine-tuning by AdamW with gradients: the usual first-order baseline, two states, bias-corrected.

    Besides the gradient and the activations of the backward pass it keeps two averages of the weights' size.
    """

    name = "ft-adamw"
    Fields = FTAdamWFields
    state_names = ("exp_avg", "exp_avg_sq")

    def _options(self) -> dict[str, Any]:
        fields = self.fields
        return {**super()._options(), "betas": (fields.beta1, fields.beta2), "eps": fields.adam_eps}


def _decaying_apart(params: Params) -> list[dict[str, Any]]:
    """torch parameter groups: of each given one the matrices, then the vectors, which do not decay."""
    members = list(params.parameters()) if isinstance(params, nn.Module) else list(params)
    given = members if members and isinstance(members[0], dict) else [{"params": members}]
    groups = []
    for group in given:
        inside = _trainable(group["params"])
        matrices, vectors = [p for p in inside if p.dim() >= 2], [p for p in inside if p.dim() < 2]
        groups += [{**group, "params": matrices}] if matrices else []
        groups += [{**group, "params": vectors, "weight_decay": 0.0}] if vectors else []
    return groups


def _trainable(members: Tensor | Iterable[Any]) -> list[Tensor]:
    members = [members] if isinstance(members, Tensor) else members
    unnamed = [member[1] if isinstance(member, tuple) else member for member in members]
    return [parameter for parameter in unnamed if parameter.requires_grad]
