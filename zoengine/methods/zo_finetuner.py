"""ZO Fine-tuner: perturbation strengths per block, from networks learned once per model.

"Learning a Zeroth-Order Optimizer for Fine-Tuning LLMs" (anonymous, under review), Algorithm 1.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, Literal

import torch

from zoengine import pertnn
from zoengine.directions import Call, Evaluate, Step, Update
from zoengine.methods import spsa
from zoengine.methods.base import Run, ZOOptimizer
from zoengine.methods.fields import Fields
from zoengine.transforms import Scaled

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZOFinetunerFields(Fields):
    """Fields of MeZO plus the networks and how their sigma is read."""

    zoft_file: str = dataclasses.field(
        default="", metadata={"help": "networks that `zoengine meta-train` wrote; none: untrained ones, which is MeZO"}
    )
    zoft_reading: Literal["std", "alg1"] = dataclasses.field(
        default="std", metadata={"help": "sigma as standard deviation, or Algorithm 1 literally (as variance)"}
    )
    feed_normalised: bool = dataclasses.field(
        default=True, metadata={"help": "the networks see their last sigma normalised (bounded), or as it came"}
    )


class ZOFinetuner(ZOOptimizer):
    """MeZO with learned strengths: block i is perturbed by s_i z_i, and moves by lr c s_i z_i.

    sigma_i = PertNN_i(L+, L-, sigma_i, mean(theta_i), var(theta_i)), with losses and sigma of the previous step and the
    weights of this one; s_i = sigma_i sqrt(d / sum_j d_j sigma_j^2), so E |u|^2 = d whatever the networks say, and
    c = (L(theta + eps s z) - L(theta - eps s z)) / (2 eps). A block thus has the effective learning rate lr s_i^2. With
    a sigma common to all blocks, s is exactly 1 and this is MeZO bit for bit. :mod:`zoengine.pertnn` has the networks,
    the readings of sigma, and where the paper leaves a choice open.

    The learning rate has to be looked for anew. A large block that the loss hardly feels, such as an embedding most of
    whose rows no batch uses, gets a small s, and since sum_i d_i s_i^2 = d the others then get more than 1. Where such
    a block has half of the elements, begin at half of MeZO's rate.

    At first sigma is 1 and both losses are L(theta), which the first step measures: one forward more, that step. Over
    several queries the networks see the means of L+ and L-; where there is no L-, the slope is followed to it.

    State: sigma (one number per block), the networks (so that a checkpoint is whole), the two losses. The weights'
    means and variances take one launch a step, and nothing waits for the device.
    """

    name = "zo-finetuner"
    Fields = ZOFinetunerFields

    def make_transform(self) -> Scaled:
        return Scaled(self.arena, self.fields.noise, self._states)

    def new_memory(self) -> dict[str, Any]:
        return {"losses": None}

    def start(self) -> None:
        blocks = pertnn.blocks_of(self.arena.segments)
        file, device = self.fields.zoft_file, self.arena.buffers[0].device
        networks = pertnn.load(file, blocks) if file else pertnn.PertNN(blocks)
        for name in ("zoft_reading", "feed_normalised"):
            learnt, used = networks.about.get(name), str(getattr(self.fields, name))
            if learnt is not None and learnt != used:
                logger.warning("%s: networks trained with %s=%s are used with %s", file, name, learnt, used)
        self.networks = networks.to(device).requires_grad_(False)
        self._statistics = pertnn.Statistics(self.arena)
        self.states["sigma"] = [torch.ones(len(blocks), device=device)]
        self.states["networks"] = [parameter.data for parameter in self.networks.parameters()]

    def run(self, step: Step) -> Run:
        losses = self.memory["losses"]
        if losses is None:
            losses = 2 * (yield [Evaluate()])
        yield Call(lambda: self._scale(losses), prepares=True)
        estimate = yield from spsa.estimate(step, self.fields)
        yield Update(estimate.terms)
        half = self.fields.zo_eps * sum(estimate.weights)
        self.memory["losses"] = [estimate.loss + half, estimate.loss - half]
        self.states["sigma"][0].copy_(self._sigma)
        return estimate.loss

    def _scale(self, losses: list[float]) -> None:
        """Let the networks set this step's strengths. The state keeps its sigma until the step is done."""
        mean, var = self._statistics.moments(self.arena.buffers)
        sigma = self.networks(pertnn.features(losses, self.states["sigma"][0].double(), mean, var))
        normalised = pertnn.normalise(sigma, self._statistics.numels)
        self._sigma = normalised if self.fields.feed_normalised else sigma
        self.transform.set_scales(pertnn.scales(normalised, self.fields.zoft_reading))
