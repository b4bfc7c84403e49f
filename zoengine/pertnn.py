"""The networks of ZO Fine-tuner: one per block (segment), which say how strongly to perturb it.

"Learning a Zeroth-Order Optimizer for Fine-Tuning LLMs" (anonymous, under review), section 3.2. Block i of d_i
elements gets sigma_i = PertNN_i(two losses of the previous step, previous sigma_i, mean and variance of theta_i), and
the direction is u_i = s_i z_i with

    s_i = sigma_i sqrt(d / sum_j d_j sigma_j^2),  so that  E |u|^2 = sum_i d_i s_i^2 = d  whatever the networks say:

only ratios of sigmas are learned, the step size stays with the learning rate. The paper leaves the output map and the
scaling of the inputs open. Here sigma = softplus(5 tanh(x / 5) + b) / softplus(b) with softplus(b) = 1 and a last layer
that starts at zero, so untrained networks say sigma = 1, which is MeZO. The bound is there because the objective looks
one step ahead: for it alone, a stiff block is best not perturbed at all, and for a small learning rate the best is to
perturb nothing but the block of the steepest slope. The inputs are clipped, see :func:`features`.

All networks are evaluated at once, as batched matrix products over the blocks.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoengine import ops
from zoengine.arena import Segment
from zoengine.noise import table

INPUTS = 5
READINGS = ("std", "alg1")

_FORMAT = "zoengine-pertnn"
_VERSION = "1"
_CLIP = 10.0
_VAR_FLOOR = 1e-8
_LIMIT = 5.0  # of the outputs: sigma stays within [0.011, 5.5], and no block is frozen for good
_ONE = math.log(math.e - 1.0)  # softplus(_ONE) = 1
_SHOWN = 3  # differing blocks that an error names


class PertNNError(ValueError):
    """Networks that cannot be used: a damaged file, or one for a model with other blocks."""


class Block(NamedTuple):
    """What a network belongs to."""

    name: str
    shape: tuple[int, ...]


def blocks_of(segments: Sequence[Segment]) -> list[Block]:
    """The blocks of an arena in its order, under names that wrapping the model does not change.

    A prefix that all names share and that only a wrapper adds (``module.``, PEFT's ``base_model.model.``) is left out,
    and so is ``_orig_mod``, torch.compile's. Names and shapes must agree for networks to be loaded, so this cannot
    confuse two models that were different before.

    Raises:
        PertNNError: two blocks have the same name then.
    """
    names = [".".join(part for part in s.name.split(".") if part != "_orig_mod") for s in segments]
    for prefix in ("module.", "base_model.model."):
        if all(name.startswith(prefix) for name in names):
            names = [name.removeprefix(prefix) for name in names]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PertNNError(f"two parameters are called {twice!r}; give them different names")
    return [Block(name, s.shape) for name, s in zip(names, segments, strict=True)]


class PertNN(nn.Module):
    """One multilayer perceptron per block, 5 inputs, tanh, one output, held as stacked tensors.

    Args:
        blocks: what the networks are for; S of them.
        hidden: width of the hidden layers (the paper says 64 in one place and 32 in another).
        hidden_layers: how many; 1 with width 64 fits the size that the paper gives.
        seed: of the hidden layers' initial weights, N(0, 1 / inputs). The last layer starts at zero.

    Attributes:
        weights: per layer, (S, inputs, outputs); biases: per layer, (S, 1, outputs).
        about: what the file they came from says about them, see :func:`save`.

    Raises:
        PertNNError: no blocks, or a width or number of layers below 1.
    """

    def __init__(self, blocks: Sequence[Block], *, hidden: int = 64, hidden_layers: int = 1, seed: int = 0) -> None:
        super().__init__()
        if not blocks or hidden < 1 or hidden_layers < 1:
            raise PertNNError(
                "expected at least one block, hidden and hidden_layers of at least 1, got "
                f"{len(blocks)} blocks, hidden {hidden}, hidden_layers {hidden_layers}"
            )
        self.blocks = list(blocks)
        self.about: dict[str, str] = {}
        self.hidden, self.hidden_layers = hidden, hidden_layers
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        drawn = 0
        for inputs, outputs in itertools.pairwise([INPUTS, *[hidden] * hidden_layers, 1]):
            shape = (len(blocks), inputs, outputs)
            if outputs == 1 and len(self.weights) == hidden_layers:
                weight = torch.zeros(shape)
            else:  # from the noise stream: the same on every device and with every torch
                weight = ops.noise_fill(shape, seed, offset=drawn, stream=table.STREAM_STATE) / math.sqrt(inputs)
                drawn += weight.numel()
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(torch.zeros(len(blocks), 1, outputs)))

    def forward(self, inputs: Tensor) -> Tensor:
        """sigma, float64 (S,), positive, from :func:`features` (S, 5); untrained networks give exactly 1.

        The map to sigma is taken in float64: equal outputs must give equal scales, and vectorised fp32 functions may
        differ in the last bit between the elements of one tensor.
        """
        x = inputs.to(self.weights[0].dtype).unsqueeze(1)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = torch.tanh(torch.baddbmm(bias, x, weight))
        x = torch.baddbmm(self.biases[-1], x, self.weights[-1]).reshape(-1).double()
        one = torch.full_like(x, _ONE)
        return F.softplus(_LIMIT * torch.tanh(x / _LIMIT) + one) / F.softplus(one)


def features(losses: Sequence[float], sigma: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Inputs (S, 5), float64: L+, L-, log sigma, mean / sqrt(var + 1e-8), log(var + 1e-8), each clipped to [-10, 10].

    Args:
        losses: the two losses of the previous step.
        sigma: float64 (S,), the previous step's.
        mean, var: float64 (S,), of the weights. A norm's gain starts with mean 1 and variance 0: hence the clipping.
    """
    plus, minus = (torch.full_like(sigma, loss) for loss in losses)
    floored = var + _VAR_FLOOR
    return torch.stack((plus, minus, sigma.log(), mean / floored.sqrt(), floored.log()), dim=1).clamp(-_CLIP, _CLIP)


def normalise(sigma: Tensor, numels: Tensor) -> Tensor:
    """sigma_i sqrt(d / sum_j d_j sigma_j^2), float64 (S,), for blocks of ``numels`` elements (float64, (S,)).

    A common sigma gives 1 to within 1e-12, which is exactly 1 once rounded to fp32.
    """
    return sigma * (numels.sum() / (numels * sigma.square()).sum()).sqrt()


def scales(normalised: Tensor, reading: str = "std") -> Tensor:
    """The factors s of z from :func:`normalise`, float64 (S,).

    ``"std"``: sigma is a standard deviation, u_i = s_i z_i, and E |u|^2 = d. ``"alg1"``: Algorithm 1 of the paper read
    literally, where the normalised sigma_i is the variance of block i. Then E |u|^2 <= d, with equality only for a
    common sigma; the text, the appendix and the proof all need the first reading.
    """
    return normalised if reading == "std" else normalised.sqrt()


def gradient_of_sigma(d_scales: Tensor, sigma: Tensor, numels: Tensor, reading: str = "std") -> Tensor:
    """dJ/dsigma from dJ/ds through :func:`scales` and :func:`normalise`, in closed form; float64 (S,).

    With kappa = sqrt(d / sum_k d_k sigma_k^2):
    dJ/dsigma_j = kappa (dJ/ds_j - d_j sigma_j (sum_i sigma_i dJ/ds_i) / (sum_k d_k sigma_k^2)).
    It is orthogonal to sigma, because s does not change with sigma's length.
    """
    total = (numels * sigma.square()).sum()
    kappa = (numels.sum() / total).sqrt()
    if reading == "alg1":
        d_scales = d_scales / (2 * (kappa * sigma).sqrt())
    return kappa * (d_scales - numels * sigma * (sigma * d_scales).sum() / total)


class Statistics:
    """Per-block sums over an arena's buffers, for blocks in the arena's order, without a synchronisation.

    Args:
        arena: whose ``segments``, ``spans`` and ``buffers`` are meant (:class:`zoengine.arena.Arena`).
    """

    def __init__(self, arena) -> None:
        self.device = arena.buffers[0].device
        self.numels = torch.tensor([s.numel for s in arena.segments], dtype=torch.float64, device=self.device)
        self._count = self.numels.clamp(min=1)
        self._spans = []
        for span in arena.spans:  # one per buffer, unless buffers interleave in the arena
            inside = [
                (k, s.start - span.start, s.numel)
                for k, s in enumerate(arena.segments)
                if s.numel and s.buffer == span.buffer and span.start <= s.start < span.stop
            ]
            where = arena.buffers[span.buffer].device
            positions, starts, lengths = torch.tensor(inside, dtype=torch.int64).reshape(-1, 3).t().contiguous()
            self._spans.append((span, positions.to(self.device), starts.to(where), lengths.to(where)))

    def moments(self, buffers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and variance of every block, float64 (S,) each: one launch per span."""
        found = self._gather(buffers, lambda x, span, starts, lengths: ops.segment_stats(x, starts, lengths)[:, :2])
        mean, square = (found / self._count.unsqueeze(1)).unbind(1)
        return mean, (square - mean.square()).clamp(min=0)

    def dots(self, buffers: Sequence[Tensor], seed: int, noise: str) -> Tensor:
        """<x_i, z_i(seed)> of every block, float64 (S,)."""
        return self._gather(
            buffers,
            lambda x, span, starts, lengths: ops.segment_dot(
                x, starts, lengths, seed=seed, offset=span.index, noise=noise
            ),
        )

    def squares(self, buffers: Sequence[Tensor]) -> Tensor:
        """|x_i|^2 of every block, float64 (S,)."""
        return self._gather(buffers, lambda x, span, starts, lengths: ops.segment_dot(x, starts, lengths, y=x))

    def _gather(self, buffers: Sequence[Tensor], reduce) -> Tensor:
        parts = [
            (positions, reduce(buffers[span.buffer][span.start : span.stop], span, starts, lengths).to(self.device))
            for span, positions, starts, lengths in self._spans
        ]
        result = parts[0][1].new_zeros((self.numels.numel(), *parts[0][1].shape[1:]))
        for positions, values in parts:
            result[positions] = values  # empty blocks keep 0
        return result


def save(networks: PertNN, path: str | Path, about: Mapping[str, str] | None = None) -> Path:
    """Write networks and the blocks they are for into one safetensors file, fp32; replaces the file in one move.

    Args:
        about: further metadata, such as what they were trained on.

    Raises:
        OSError: it cannot be written; an earlier file of that name is still there then.
    """
    from safetensors.torch import save_file

    path = Path(path)
    tensors = {name: p.detach().float().cpu().contiguous() for name, p in networks.named_parameters()}
    metadata = {
        **(about or {}), "format": _FORMAT, "version": _VERSION, "hidden": str(networks.hidden),
        "hidden_layers": str(networks.hidden_layers), "blocks": json.dumps(networks.blocks),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.incomplete")
    try:
        save_file(tensors, partial, metadata=metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def load(path: str | Path, blocks: Sequence[Block]) -> PertNN:
    """The networks in a file of :func:`save`, in the order of ``blocks`` and on the host.

    Raises:
        PertNNError: no such file, not such a file, of another version, damaged, or made for other blocks; names the
            first few blocks that differ.
    """
    path = Path(path)
    tensors, metadata = _read(path)
    if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
        found = f"format {metadata.get('format')!r} version {metadata.get('version')!r}"
        raise PertNNError(
            f"{path} is no file of ZO Fine-tuner networks: expected {_FORMAT!r} {_VERSION!r}, got {found}"
        )
    try:
        there = [Block(name, tuple(shape)) for name, shape in json.loads(metadata["blocks"])]
        networks = PertNN(there, hidden=int(metadata["hidden"]), hidden_layers=int(metadata["hidden_layers"]))
        networks.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise PertNNError(f"{path} is damaged: {error}") from error
    if not all(bool(p.isfinite().all()) for p in networks.parameters()):
        raise PertNNError(f"{path} holds NaN or infinite weights; meta-train again, with a smaller meta_lr")
    _compare(path, there, blocks)
    position = {block.name: k for k, block in enumerate(there)}
    order = [position[block.name] for block in blocks]
    for parameter in networks.parameters():
        parameter.data = parameter.data[order]
    networks.blocks, networks.about = list(blocks), metadata
    return networks


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise PertNNError("reading networks needs safetensors: pip install 'zoengine[hf]'") from error
    if not path.is_file():
        raise PertNNError(f"there is no file {path}; `zoengine meta-train CONFIG` writes one")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise PertNNError(f"{path} is no readable safetensors file: {error}") from error


def _compare(path: Path, there: Sequence[Block], here: Sequence[Block]) -> None:
    old, new = dict(there), dict(here)
    differing = [f"{name!r} is {shape} here and not in the file" for name, shape in here if name not in old]
    differing += [f"{name!r} is {shape} in the file and not here" for name, shape in there if name not in new]
    differing += [
        f"{name!r} is {shape} here and {old[name]} in the file" for name, shape in here if old.get(name, shape) != shape
    ]
    if differing:
        shown = "; ".join(differing[:_SHOWN]) + ("; ..." if len(differing) > _SHOWN else "")
        raise PertNNError(
            f"{path} is for a model or tuning with other blocks ({len(there)} there, {len(here)} here, "
            f"{len(differing)} differences): {shown}. Networks serve checkpoints of the architecture and tuning they "
            "were trained on; meta-train them for this one"
        )
