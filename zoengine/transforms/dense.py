"""Directions with one number per parameter: z itself, and z scaled, masked or divided by a root elementwise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoengine import ops
from zoengine.arena import ALIGNMENT, Arena, Span
from zoengine.directions import Fold, Noise, State, Term
from zoengine.transforms.states import States


class Dense:
    """T(z) = z: what most methods use, and the base of the others.

    A transform knows how to carry out one pass, over one span of the arena, and how states are stored for it.

    Args:
        arena: the weights.
        noise: distribution of z, as in :func:`zoengine.ops.add_noise_`.
        states: where the method's states will be; terms refer to them by name.
    """

    fuses = True  #: whether a fold and an update can share a pass

    def __init__(self, arena: Arena, noise: str, states: States) -> None:
        self.arena = arena
        self.noise = noise
        self.states = states
        self._valid = [_valid(arena, b) for b in range(len(arena.buffers))]

    def spans(self, by_group: bool) -> Sequence[Span]:
        """What one pass is split into: as few launches as possible, or one per parameter group and kind."""
        return self.arena.group_spans if by_group else self.arena.spans

    def new_state(self) -> list[Tensor]:
        """Zeros for one state."""
        return self.arena.new_state()

    def operand(self, span: Span) -> dict[str, Tensor]:
        """The transform's argument to :func:`zoengine.ops.add_noise_` over a span."""
        return {}

    def add(
        self,
        span: Span,
        source: Sequence[Tensor],
        terms: Sequence[Term],
        *,
        keep: float = 1.0,
        target: Sequence[Tensor] | None = None,
        sr_seed: int | None = None,
    ) -> None:
        """target (or source) = keep source + sum(terms) over one span, in one pass."""
        where = slice(span.start, span.stop)
        noises, states = split(terms)
        if target is None and not noises and not states and keep == 1.0:
            return
        ops.add_noise_(
            source[span.buffer][where],
            [t.seed for t in noises],
            [t.coeff for t in noises],
            offset=span.index,
            stream=[t.stream for t in noises],
            noise=self.noise,
            **self.operand(span),
            states=[self._slice(t.name, span) for t in states],
            state_coeffs=self.states.coefficients(states),
            decay=1.0 - keep,
            out=None if target is None else target[span.buffer][where],
            rounding=rounding(sr_seed),
            sr_seed=sr_seed or 0,
        )

    def fold(self, fold: Fold) -> None:
        """state <- keep state + sum(terms), and its norm if the fold asks for it."""
        squares = [self.fold_span(span, fold) for span in self.arena.spans]
        self.set_norm(fold, squares)

    def fold_span(
        self,
        span: Span,
        fold: Fold,
        *,
        theta: Sequence[Tensor] | None = None,
        keep: float = 1.0,
        terms: Sequence[Term] = (),
        fold_first: bool = True,
        sr_seed: int | None = None,
    ) -> Tensor | None:
        """One span of a fold; with ``theta``, also theta <- keep theta + sum(terms) in the same pass.

        Terms of theta that are the folded state mean its new values if ``fold_first``, else the old ones.

        Raises:
            ValueError: the directions are not z itself, and the pass would fold z.
        """
        if self.operand(span):
            raise ValueError(f"{type(self).__name__} cannot fold directions into a state; methods that fold are dense")
        noises, own = split(fold.terms)
        moves, old = split(terms)
        merged_noises = list({(t.seed, t.stream): None for t in [*noises, *moves]})
        weight = {(t.seed, t.stream): t.coeff for t in noises}
        x_weight = {(t.seed, t.stream): t.coeff for t in moves}
        along: float | Tensor = 0.0
        for term in old:
            along = along + self.states.coefficient(term)
        self_keep: float | Tensor = fold.keep
        for term in own:
            self_keep = self_keep + self.states.coefficient(term)
        where, options = slice(span.start, span.stop), {}
        if theta is not None and (moves or old or keep != 1.0):
            ends = [0.0, along] if fold_first else [along, 0.0]
            device = theta[span.buffer].device
            options = {
                "x": theta[span.buffer][where],
                "x_keep": keep,
                "x_coeffs": _stacked([*(x_weight.get(key, 0.0) for key in merged_noises), *ends], device),
                "rounding": rounding(sr_seed),
                "sr_seed": sr_seed or 0,
            }
        first = span.start // ALIGNMENT
        return ops.state_fold_(
            self._slice(fold.name, span),
            [seed for seed, _ in merged_noises],
            [weight.get(key, 0.0) for key in merged_noises],
            keep=self_keep,
            offset=span.index,
            stream=[stream for _, stream in merged_noises],
            noise=self.noise,
            valid=self._valid[span.buffer][first : -(-span.stop // ALIGNMENT)] if fold.norm else None,
            **options,
        )

    def set_norm(self, fold: Fold, squares: Sequence[Tensor | None]) -> None:
        """Record the norm of a state from the sums of squares of its spans."""
        if fold.norm:
            total = squares[0]
            for square in squares[1:]:
                total = total + square.to(total.device)
            self.states.squares[fold.name] = total

    def _slice(self, name: str, span: Span) -> Tensor:
        return self.states.tensors[name][span.buffer][span.start : span.stop]


class Diagonal(Dense):
    """T(z) = z / sqrt(h), with h the state called ``name``."""

    def __init__(self, arena: Arena, noise: str, states: States, name: str) -> None:
        super().__init__(arena, noise, states)
        self._name = name

    def operand(self, span: Span) -> dict[str, Tensor]:
        return {"diag": self._slice(self._name, span)}


class Scaled(Dense):
    """T(z) = s z with one factor per segment, :meth:`set_scales`; all 1 at first."""

    def __init__(self, arena: Arena, noise: str, states: States) -> None:
        super().__init__(arena, noise, states)
        self._segment = [_segment_of_tile(arena, b) for b in range(len(arena.buffers))]
        self._factors = [torch.ones(len(s), dtype=torch.float32, device=s.device) for s in self._segment]

    def set_scales(self, scales: Tensor) -> None:
        """One factor per segment of the arena, in its order; rounded to fp32."""
        for factors, segment in zip(self._factors, self._segment, strict=True):
            factors.copy_(scales.to(factors.device, torch.float32)[segment])

    def operand(self, span: Span) -> dict[str, Tensor]:
        return {"scale": self._factors[span.buffer][span.start // ALIGNMENT : -(-span.stop // ALIGNMENT)]}


class Masked(Dense):
    """T(z) = z where |theta| is at most its segment's threshold; elsewhere theta keeps its value, decay included.

    The mask is stored, one bit per parameter, and only changes by :meth:`refresh`: it must be that of theta itself, not
    of the perturbed weights, or L+ and L- would be measured on different sets of parameters.

    Args:
        thresholds: fp32, one per segment of the arena.
    """

    def __init__(self, arena: Arena, noise: str, states: States, thresholds: Tensor) -> None:
        super().__init__(arena, noise, states)
        self.thresholds = thresholds
        self._segment = [_segment_of_tile(arena, b) for b in range(len(arena.buffers))]
        self._tiles: list[Tensor] = []
        self._bits = [torch.zeros(b.numel() // 8, dtype=torch.uint8, device=b.device) for b in arena.buffers]
        self.place_thresholds()
        self.refresh()

    def place_thresholds(self) -> None:
        """Take over what ``thresholds`` holds now."""
        self._tiles = [
            self.thresholds.to(buffer.device)[segment]
            for buffer, segment in zip(self.arena.buffers, self._segment, strict=True)
        ]

    def refresh(self) -> None:
        """Take the mask from theta as it is."""
        for buffer, tiles, bits in zip(self.arena.buffers, self._tiles, self._bits, strict=True):
            ops.mask_below(buffer, tiles, out=bits)

    @property
    def bits(self) -> list[Tensor]:
        """The mask, per buffer, as :func:`zoengine.ops.mask_below` writes it."""
        return self._bits

    def operand(self, span: Span) -> dict[str, Tensor]:
        return {"mask": self._bits[span.buffer][span.start // 8 : span.stop // 8]}


def split(terms: Sequence[Term]) -> tuple[list[Noise], list[State]]:
    """Noise terms and state terms.

    Terms whose coefficient is 0 are dropped, not multiplied: -0.0 + 0 z would become +0.0.
    """
    noises = [t for t in terms if isinstance(t, Noise) and t.coeff != 0.0]
    return noises, [t for t in terms if isinstance(t, State) and t.coeff != 0.0]


def rounding(sr_seed: int | None) -> str:
    """How a pass rounds, by whether it has a seed for it."""
    return "nearest" if sr_seed is None else "stochastic"


def _stacked(values: Sequence[float | Tensor], device: torch.device) -> Tensor | list[float]:
    if not any(isinstance(v, Tensor) for v in values):
        return list(values)
    parts = [v if isinstance(v, Tensor) else torch.full((1,), v, dtype=torch.float64, device=device) for v in values]
    return torch.cat(parts)


def _valid(arena: Arena, buffer: int) -> Tensor:
    """int32 per tile of a buffer: how many of its elements are parameters and not padding."""
    counts = torch.full((arena.buffers[buffer].numel() // ALIGNMENT,), ALIGNMENT, dtype=torch.int32)
    for s in arena.segments:
        if s.buffer == buffer and s.numel % ALIGNMENT:
            counts[(s.start + s.numel) // ALIGNMENT] = s.numel % ALIGNMENT
    return counts.to(arena.buffers[buffer].device)


def _segment_of_tile(arena: Arena, buffer: int) -> Tensor:
    """int64 per tile of a buffer: the segment it belongs to."""
    result = torch.empty(arena.buffers[buffer].numel() // ALIGNMENT, dtype=torch.int64)
    for k, s in enumerate(arena.segments):
        if s.buffer == buffer:
            result[s.start // ALIGNMENT : -(-(s.start + s.numel) // ALIGNMENT)] = k
    return result.to(arena.buffers[buffer].device)
