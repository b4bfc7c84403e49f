"""The arena: every trainable parameter of a model in one flat buffer per device and dtype.

Parameters become views of the buffers, so the model runs, saves and loads as before, while one kernel launch covers
all of them. Segments (one per parameter) start at multiples of 1024 elements, the noise tile. A segment's ``index``
is its offset in the arena as a whole, over all buffers, and is what the noise stream is indexed by: moving part of a
model to another device changes no random number.

Order: by parameter group, then matrices (ndim >= 2) before vectors, then the order of the model. Weight decay, which
matrices take and vectors do not, thus needs two launches and no table.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALIGNMENT = 1024
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ArenaError(ValueError):
    """The parameters cannot live in an arena, or no longer do; the message names the parameter and the remedy."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One parameter: ``numel`` elements of ``shape`` at ``start`` of ``buffers[buffer]``, at ``index`` of the noise."""

    name: str
    shape: tuple[int, ...]
    group: int
    buffer: int
    start: int
    index: int

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: matrices decay; biases and norm gains, which are vectors, do not."""
        return self.ndim >= 2


@dataclass(frozen=True, slots=True)
class Span:
    """A contiguous stretch ``[start, stop)`` of one buffer whose noise indices start at ``index``."""

    buffer: int
    start: int
    stop: int
    index: int
    group: int
    decays: bool


class Arena:
    """Flat storage of trainable parameters.

    Args:
        groups: one sequence of (name, parameter) pairs per parameter group. A parameter that occurs twice (tied
            weights) is stored once; parameters with ``requires_grad=False`` are left alone.
        module: the model they belong to. With it, a parameter that is replaced later is noticed.
        device: where to put the buffers; ``None`` keeps every parameter's own device. Each parameter is copied
            and its old storage released before the next, so a host model reaches a device with one copy there.

    Raises:
        ArenaError: nothing to train, a parameter on the meta device, of another dtype than fp32, bf16 or fp16, not
            a plain dense tensor, or sharing memory with a different parameter. Nothing has been changed then.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[tuple[str, nn.Parameter]]],
        *,
        module: nn.Module | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        trainable = _trainable(groups)
        _refuse_unfit(trainable, [] if module is None else list(module.named_parameters()))
        target = None if device is None else torch.empty(0, device=device).device
        self.segments, sizes = _lay_out(trainable, target)
        self.buffers = [torch.empty(size, dtype=dtype, device=where) for (where, dtype), size in sizes.items()]
        self.parameters = [trainable[segment.name][1] for segment in self.segments]
        for segment, parameter in zip(self.segments, self.parameters, strict=True):
            stop = segment.start + segment.numel
            view = self.buffers[segment.buffer][segment.start : stop].view(segment.shape)
            view.copy_(parameter.data)
            self.buffers[segment.buffer][stop : stop + -stop % ALIGNMENT].zero_()
            parameter.data = view
        self._own_views = self.views(self.buffers)
        self._pointers = [view.data_ptr() for view in self._own_views]
        self._slots = _slots(module, self.parameters)
        self.spans = _spans(self.segments, by_group=False)
        self.group_spans = _spans(self.segments, by_group=True)

    @classmethod
    def from_module(cls, module: nn.Module, device: torch.device | str | None = None) -> Arena:
        """All trainable parameters of ``module`` as one group; with ``device``, the whole module is moved there."""
        arena = cls([list(module.named_parameters())], module=module, device=device)
        if device is not None:
            module.to(device)  # the frozen rest; parameters already there are not touched
        return arena

    @property
    def numel(self) -> int:
        """Trainable elements, padding not counted."""
        return sum(segment.numel for segment in self.segments)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, padding included."""
        return sum(buffer.nbytes for buffer in self.buffers)

    @property
    def half_precision(self) -> bool:
        """Whether any buffer holds 16-bit weights."""
        return any(buffer.dtype != torch.float32 for buffer in self.buffers)

    def new_state(self) -> list[Tensor]:
        """fp32 zeros, one per buffer and of its length: the storage of one optimizer state."""
        return [torch.zeros(b.numel(), dtype=torch.float32, device=b.device) for b in self.buffers]

    def views(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """``buffers`` (shaped like the arena's) as one tensor per segment, in the order of ``segments``."""
        return [buffers[s.buffer][s.start : s.start + s.numel].view(s.shape) for s in self.segments]

    @contextmanager
    def reading(self, views: Sequence[Tensor]) -> Iterator[None]:
        """Let the model read ``views`` (see :meth:`views`) instead of the arena; undone on leaving in any case."""
        try:
            for parameter, view in zip(self.parameters, views, strict=True):
                parameter.data = view
            yield
        finally:
            for parameter, view in zip(self.parameters, self._own_views, strict=True):
                parameter.data = view

    def check(self) -> None:
        """Verify that the model still reads the arena.

        Raises:
            ArenaError: a parameter was re-assigned, moved or re-allocated since the arena was built.
        """
        for segment, parameter, pointer in zip(self.segments, self.parameters, self._pointers, strict=True):
            if parameter.data_ptr() != pointer or parameter.dtype != self.buffers[segment.buffer].dtype:
                raise _replaced(segment.name, "points to other memory")
        for name, slots, key, parameter in self._slots:
            if slots.get(key) is not parameter:
                raise _replaced(name, "is another Parameter object")


def _replaced(name: str, what: str) -> ArenaError:
    return ArenaError(
        f"parameter {name!r} {what} than when the optimizer was built (model.to(), load_state_dict(assign=True) and "
        "plain assignment do that); finish such changes first and build the optimizer after them"
    )


def _trainable(groups: Sequence[Sequence[tuple[str, nn.Parameter]]]) -> dict[str, tuple[int, nn.Parameter]]:
    found: dict[str, tuple[int, nn.Parameter]] = {}
    seen: set[int] = set()
    for group, members in enumerate(groups):
        for name, parameter in members:
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                found[name] = (group, parameter)
    if not found:
        raise ArenaError(
            "there is nothing to train: no floating-point parameter has requires_grad=True; unfreeze some, or add "
            "adapters to a quantised model"
        )
    return found


def _refuse_unfit(
    trainable: dict[str, tuple[int, nn.Parameter]], everything: Iterable[tuple[str, nn.Parameter]]
) -> None:
    for name, (_, parameter) in trainable.items():
        if parameter.is_meta:
            raise ArenaError(f"parameter {name!r} is on the meta device and has no data; materialise the model first")
        if parameter.layout != torch.strided:
            raise ArenaError(f"parameter {name!r} is {parameter.layout}; only dense parameters can be trained")
        if parameter.dtype not in DTYPES:
            raise ArenaError(
                f"parameter {name!r} is {parameter.dtype}; trainable parameters must be float32, bfloat16 or float16: "
                "convert it, or freeze it with requires_grad_(False)"
            )
    rest = {name: p for name, p in everything if not p.is_meta and p.layout == torch.strided}
    members = {id(p): (name, p) for name, p in rest.items()}
    members |= {id(p): (name, p) for name, (_, p) in trainable.items()}
    occupied = sorted((p.data_ptr(), p.data_ptr() + p.nbytes, name) for name, p in members.values() if p.nbytes)
    for (_, end, first), (begin, _, second) in itertools.pairwise(occupied):
        if begin < end and (first in trainable or second in trainable):
            raise ArenaError(
                f"parameters {first!r} and {second!r} share memory but are different Parameter objects; tie weights "
                "by assigning the same Parameter, or clone one of them"
            )


def _lay_out(
    trainable: dict[str, tuple[int, nn.Parameter]], device: torch.device | None
) -> tuple[list[Segment], dict[tuple[torch.device, torch.dtype], int]]:
    ordered = sorted(trainable.items(), key=lambda item: (item[1][0], item[1][1].dim() < 2))
    sizes: dict[tuple[torch.device, torch.dtype], int] = {}
    segments, index = [], 0
    for name, (group, parameter) in ordered:
        key = (device or parameter.device, parameter.dtype)
        start = sizes.setdefault(key, 0)
        segments.append(Segment(name, tuple(parameter.shape), group, list(sizes).index(key), start, index))
        padded = parameter.numel() + -parameter.numel() % ALIGNMENT
        sizes[key] += padded
        index += padded
    return segments, sizes


def _spans(segments: Sequence[Segment], by_group: bool) -> list[Span]:
    spans: list[Span] = []
    for s in segments:
        stop = s.start + s.numel + -s.numel % ALIGNMENT
        group, decays = (s.group, s.decays) if by_group else (0, False)
        last = spans[-1] if spans else None
        if (
            last is not None
            and (last.buffer, last.group, last.decays, last.stop) == (s.buffer, group, decays, s.start)
            and last.index + last.stop - last.start == s.index
        ):
            spans[-1] = Span(last.buffer, last.start, stop, last.index, group, decays)
        else:
            spans.append(Span(s.buffer, s.start, stop, s.index, group, decays))
    return spans


def _slots(module: nn.Module | None, parameters: Sequence[nn.Parameter]) -> list[tuple[str, dict, str, nn.Parameter]]:
    """Where the model keeps each parameter (tied ones several times), to notice a replaced object."""
    if module is None:
        return []
    ours = {id(p) for p in parameters}
    return [
        (f"{prefix}.{key}".lstrip("."), child._parameters, key, parameter)
        for prefix, child in module.named_modules()
        for key, parameter in child._parameters.items()
        if id(parameter) in ours
    ]
