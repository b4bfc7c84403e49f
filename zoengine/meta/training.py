"""The meta-training step of ZO Fine-tuner.

"Learning a Zeroth-Order Optimizer for Fine-Tuning LLMs" (anonymous, under review), section 3.3 and appendix C.3. Its
Algorithm 2 is printed as a figure; what the text leaves open (who owns eta_1, the trajectory's optimizer, when weights
are reset) is a field here, and the defaults say what was chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoengine import ops
from zoengine.arena import Arena
from zoengine.directions import Noise, Step
from zoengine.evaluation import Closure, EvaluationError
from zoengine.evaluation.base import call, read
from zoengine.methods.fields import FieldError, build, check_types, require
from zoengine.noise.seeds import check_seed
from zoengine.pertnn import PertNN, Statistics, blocks_of, features, gradient_of_sigma, normalise, scales
from zoengine.transforms import Scaled, States

Row = dict[str, Any]

_EMA = 0.9
_TINY = 1e-300


def _field(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaFields:
    """Hyperparameters of meta-training; ``help`` metadata says what each is."""

    fo_lr: float = dataclasses.field(
        metadata={"help": "SGD rate of the first-order trajectory; has no default: the loss should fall within a cycle"}
    )
    zo_lr: float = _field(1e-6, "eta_1: rate of the zeroth-order step that is judged")
    zo_eps: float = _field(1e-3, "perturbation size")
    meta_lr: float = _field(1e-2, "eta_2: SGD rate of the networks")
    meta_normalise: bool = _field(True, "divide the meta-gradient by its scale, zo_lr E[c^2]; false: as it is")
    zoft_reuse_grad: bool = _field(False, "walk along the gradient after the judged step: one backward less a step")
    zoft_reading: Literal["std", "alg1"] = _field("std", "sigma as standard deviation, or Algorithm 1 literally")
    feed_normalised: bool = _field(True, "the networks see their last sigma normalised (bounded), or as it came")
    hidden: int = _field(64, "width of the networks' hidden layers")
    hidden_layers: int = _field(1, "number of the networks' hidden layers")
    cycle_epochs: int = _field(5, "epochs after which the weights are reset")
    reset_loss: float = _field(
        0.3, "reset as well when the smoothed loss is below this part of the cycle's first; 0: no"
    )
    noise: Literal["gaussian", "rademacher"] = _field("gaussian", "distribution of z")
    seed: int = _field(0, "run seed, 64 bits")

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("fo_lr", "zo_lr", "zo_eps", "meta_lr"):
            require(getattr(self, name) > 0, self, name, "greater than 0")
        for name in ("hidden", "hidden_layers", "cycle_epochs"):
            require(getattr(self, name) >= 1, self, name, "at least 1")
        require(0 <= self.reset_loss < 1, self, "reset_loss", "in [0, 1)")
        try:
            check_seed(self.seed)
        except ValueError as error:
            raise FieldError(str(error)) from None


class MetaTrainer:
    """Trains one network per parameter of ``model`` on steps whose batches the caller supplies.

    A step, at weights theta with losses and sigma remembered from the step before:

    1. sigma = networks(...), s as in :mod:`zoengine.pertnn`, z fresh, u = s z;
    2. c = (L(theta + eps u) - L(theta - eps u)) / (2 eps), a constant from here on (the paper stops gradients there);
    3. J = L(theta - zo_lr c u), with gradient G by one backward pass. Then dJ/ds_i = -zo_lr c <G_i, z_i>, which one
       launch over the gradient buffer gives, and the rest of the chain is a formula and the small networks' backward:
       no autograd graph reaches from the losses to the networks;
    4. networks <- networks - meta_lr dJ/dw;
    5. theta <- theta - fo_lr grad L(theta): the trajectory that shows the networks weights of all stages of training.

    dJ/ds has the unit of zo_lr c^2, which varies by orders of magnitude along a trajectory and between models; SGD with
    one meta_lr cannot follow that. With ``meta_normalise`` (default) it is divided by zo_lr times the mean of c^2 over
    z, sum_i s_i^2 |G_i|^2, or times c^2 if that is larger (a step far too long can end where G is small). What is left
    is, by block, the share of the slope that the direction caught, less what curvature takes back: a number of order 1
    whatever the unit of the loss.

    theta goes back to the weights it had at first after ``cycle_steps`` steps, or when the smoothed loss has fallen
    below ``reset_loss`` of the cycle's first; sigma and the remembered losses then start anew, as they will in
    deployment.

    Theta itself is never perturbed: the three points are formed in a copy. 16-bit weights take the trajectory's step
    with stochastic rounding. Memory: weights three times (one copy on the host where the model is not), the gradient
    in fp32, activations.

    Args:
        model: in eval mode; its trainable parameters become an :class:`~zoengine.arena.Arena`.
        cycle_steps: see above; None: no reset by count.
        networks: to go on with, instead of fresh ones.
        **fields: see :class:`MetaFields`.

    Use it as a context manager: on leaving, in whatever way, the weights are those from the beginning, bit for bit.

    Attributes:
        networks: the :class:`~zoengine.pertnn.PertNN`.
        last_scales: s of every block in the last step, float64 (S,).

    Raises:
        FieldError: an unknown field or a bad value.
        ArenaError: the parameters cannot be trained this way.
    """

    def __init__(
        self, model: nn.Module, *, cycle_steps: int | None = None, networks: PertNN | None = None, **fields: Any
    ) -> None:
        self.fields: MetaFields = build(MetaFields, fields, "meta-training")
        if cycle_steps is not None and cycle_steps < 1:
            raise FieldError(f"cycle_steps must be at least 1 or None, got {cycle_steps}")
        self.model, self.cycle_steps = model, cycle_steps
        self.arena = Arena.from_module(model)
        blocks = blocks_of(self.arena.segments)
        if networks is None:
            f = self.fields
            networks = PertNN(blocks, hidden=f.hidden, hidden_layers=f.hidden_layers, seed=f.seed)
        elif networks.blocks != blocks:
            raise FieldError("the networks given are for other blocks; load them with pertnn.load(path, blocks)")
        self.networks = networks.to(self.arena.buffers[0].device)
        self.statistics = Statistics(self.arena)
        self._transform = Scaled(self.arena, self.fields.noise, States())
        self._start = [buffer.to("cpu", copy=True) for buffer in self.arena.buffers]
        self._point = [torch.zeros_like(buffer) for buffer in self.arena.buffers]
        self._point_views = self.arena.views(self._point)
        self._gradient = self.arena.new_state()
        self._hooks = self._collect_gradients()
        self.last_scales = torch.ones_like(self.statistics.numels)
        self.step_number = 0
        self.forward_passes = self.backward_passes = 0
        self._begin_cycle()

    def __enter__(self) -> MetaTrainer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Put the weights back and take the gradient hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._reset_weights()

    def step(self, closure: Closure) -> Row:
        """One step of meta-training.

        Args:
            closure: runs the model on one batch and returns its loss, a tensor that autograd can differentiate. It
                is called three to five times and must see the same batch each time.

        Returns:
            What happened: ``step`` (from 1), ``loss`` (mean of the two perturbed ones), ``change`` of the loss by the
            judged step, ``projected_gradient`` c, ``meta_gradient`` |dJ/dsigma|, ``scale_min`` and ``scale_max`` of s,
            ``reset`` (whether the weights start anew), ``forward_passes``, ``backward_passes``.

        Raises:
            NonFiniteLossError: a loss or a gradient is NaN or infinite; networks and weights are as before the step.
            EvaluationError: the closure did not return one number that depends on the weights.
            ArenaError: a parameter was replaced.
        """
        self.arena.check()
        fields, step = self.fields, Step(self.fields.seed, self.step_number)
        if self._losses is None:
            (loss,) = read([call(closure)], step)
            self.forward_passes += 1
            self._losses, self._first = (loss, loss), loss
        mean, var = self.statistics.moments(self.arena.buffers)
        sigma = self.networks(features(self._losses, self._sigma, mean, var))
        constant = sigma.detach()
        normalised = normalise(constant, self.statistics.numels)
        s, seed = scales(normalised, fields.zoft_reading), step.seed()
        self._transform.set_scales(s)

        points = (fields.zo_eps, -fields.zo_eps)
        plus, minus = read([self._loss(self._moved(seed, eps), closure) for eps in points], step)
        c = (plus - minus) / (2 * fields.zo_eps)
        after = self._backward(closure, self._moved(seed, -fields.zo_lr * c))
        dots = self.statistics.dots(self._gradient, seed, fields.noise)
        d_scales = -fields.zo_lr * c * dots
        if fields.meta_normalise:
            mean_square = (s.square() * self.statistics.squares(self._gradient)).sum()
            d_scales = d_scales / (fields.zo_lr * mean_square.clamp(min=max(c * c, _TINY)))
        d_sigma = gradient_of_sigma(d_scales, constant, self.statistics.numels, fields.zoft_reading)
        before = None if fields.zoft_reuse_grad else self._backward(closure, None)
        watched = [after, d_sigma.norm(), self._gradient_norm(), s.min(), s.max()]
        after, size, _, smallest, largest = read(watched, step)

        self.last_scales = s
        self._learn(sigma, d_sigma)
        self._walk(step)
        self._losses, self._sigma = (plus, minus), normalised if fields.feed_normalised else constant
        self.step_number += 1
        loss = (plus + minus) / 2
        return {
            "step": self.step_number, "loss": loss,
            "change": after - (loss if before is None else float(before)),
            "projected_gradient": c, "meta_gradient": size, "scale_min": smallest, "scale_max": largest,
            "reset": self._end_of_cycle(loss), "forward_passes": self.forward_passes,
            "backward_passes": self.backward_passes,
        }  # fmt: skip

    def _moved(self, seed: int, coeff: float) -> Sequence[Tensor]:
        """The copy, holding theta + coeff s z."""
        for span in self.arena.spans:
            self._transform.add(span, self.arena.buffers, [Noise(seed, coeff)], target=self._point)
        return self._point_views

    def _loss(self, views: Sequence[Tensor], closure: Closure) -> Tensor | float:
        self.forward_passes += 1
        with self.arena.reading(views):
            return call(closure)

    def _backward(self, closure: Closure, views: Sequence[Tensor] | None) -> Tensor:
        """The loss at theta or ``views``, and its gradient in the gradient buffer."""
        for buffer in self._gradient:
            buffer.zero_()  # parameters that the loss does not reach keep this
        self.forward_passes += 1
        self.backward_passes += 1
        with nullcontext() if views is None else self.arena.reading(views), torch.enable_grad():
            loss = closure()
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise EvaluationError(
                    "meta-training needs the gradient of the loss: the closure must return a one-element tensor that "
                    "depends on the trainable parameters, without torch.no_grad() and .item()"
                )
            loss.reshape(()).backward()
        return loss.detach()

    def _collect_gradients(self) -> list[Any]:
        """Have autograd leave every gradient in the flat fp32 buffers instead of ``.grad``."""
        hooks = []
        for parameter, target in zip(self.arena.parameters, self.arena.views(self._gradient), strict=True):

            def move(parameter: Tensor, target: Tensor = target) -> None:
                target.copy_(parameter.grad)
                parameter.grad = None

            parameter.grad = None
            hooks.append(parameter.register_post_accumulate_grad_hook(move))
        return hooks

    def _gradient_norm(self) -> Tensor:
        return torch.stack([buffer.norm().to(self.statistics.device) for buffer in self._gradient]).norm()

    def _learn(self, sigma: Tensor, d_sigma: Tensor) -> None:
        self.networks.zero_grad(set_to_none=True)
        sigma.backward(d_sigma)
        with torch.no_grad():
            for weight in self.networks.parameters():
                weight -= self.fields.meta_lr * weight.grad

    def _walk(self, step: Step) -> None:
        for span in self.arena.spans:
            where = slice(span.start, span.stop)
            ops.add_noise_(
                self.arena.buffers[span.buffer][where], (), (), offset=span.index, rounding="stochastic",
                sr_seed=step.rounding_seed(), states=[self._gradient[span.buffer][where]],
                state_coeffs=-self.fields.fo_lr,
            )  # fmt: skip

    def _end_of_cycle(self, loss: float) -> bool:
        self._cycle_step += 1
        self._smooth = loss if self._smooth is None else _EMA * self._smooth + (1 - _EMA) * loss
        fallen = self._smooth < self.fields.reset_loss * self._first
        if not fallen and self._cycle_step != self.cycle_steps:
            return False
        self._reset_weights()
        self._begin_cycle()
        return True

    def _begin_cycle(self) -> None:
        self._sigma = torch.ones_like(self.statistics.numels)
        self._losses: tuple[float, float] | None = None
        self._smooth: float | None = None
        self._cycle_step = 0

    def _reset_weights(self) -> None:
        for buffer, start in zip(self.arena.buffers, self._start, strict=True):
            buffer.copy_(start)
