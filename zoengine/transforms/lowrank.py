"""Low-rank directions of matrices, U V': fresh noise in a slowly changing subspace (LOZO, SubZero)."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zoengine import ops
from zoengine.arena import Arena, ArenaError, Segment, Span
from zoengine.directions import Fold, Noise, Term
from zoengine.noise.table import STREAM_DIRECTION, STREAM_FACTOR_U, STREAM_FACTOR_V
from zoengine.transforms.dense import split
from zoengine.transforms.states import States
from zoengine.transforms.structured import Part, Place, Structured, matrix_shape

logger = logging.getLogger(__name__)


class LowRank(Structured):
    """T(z) of a matrix is L(z) R' with rank r; vectors, and matrices with a side below r, stay dense.

    A state of the matrices is stored as a left factor, (rows, r) each: N of N R'. A pass adds up left factors, so it
    costs one product however many terms it has.

    Args:
        shape_of: as in :class:`Structured`; the rank must not be above the smaller side.

    Raises:
        ArenaError: no matrix is large enough for the rank.
    """

    def __init__(
        self,
        arena: Arena,
        noise: str,
        states: States,
        rank: int,
        shape_of: Callable[[Segment], tuple[int, int] | None] = matrix_shape,
    ) -> None:
        _check_rank(arena, rank, shape_of)
        super().__init__(arena, noise, states, lambda s: _fitting(shape_of(s), rank))
        self.rank = rank
        self._tables: dict[Span, ops.Matrices] = {}
        self._indices: dict[Span, Tensor] = {}
        self._places: dict[tuple[Span, int], tuple[Tensor, Tensor]] = {}  # of packed factors, by span and side
        for part in self.parts:
            if part.segments:
                device = arena.buffers[part.span.buffer].device
                starts = [s.start - part.span.start for s in part.segments]
                self._tables[part.span] = ops.Matrices.for_lowrank(starts, part.shapes, rank, device)
                self._indices[part.span] = torch.tensor([s.index for s in part.segments], device=device)
                for side in (0, 1):
                    self._places[part.span, side] = _packing([shape[side] * rank for shape in part.shapes], device)
        self.right: dict[Span, Tensor] = {
            span: torch.zeros(table.sizes[1], device=table.table.device) for span, table in self._tables.items()
        }

    @abstractmethod
    def left(self, part: Part, term: Noise) -> Tensor:
        """The packed left factors of T(z) for one noise term, without its coefficient."""

    def matrix_state(self, part: Part) -> int:
        return self._tables[part.span].sizes[0]

    def add_matrices(self, part: Part, terms: Sequence[Term], at: Place, keep: float) -> None:
        (x, out, how), table = at, self._tables[part.span]
        if len(terms) == 1:
            left, coeff = self._factor(part, terms[0]), terms[0].coeff
        else:
            left, coeff = torch.zeros(table.sizes[0], device=table.table.device), 1.0
            for term in terms:
                left.add_(self._factor(part, term), alpha=term.coeff)
        ops.lowrank_add_(
            x, left, self.right[part.span], table, coeff, rank=self.rank, keep=keep, out=out, **how
        )  # fmt: skip

    def fold_matrices(self, part: Part, fold: Fold) -> None:
        state = self.states.tensors[fold.name][part.slot]
        state.mul_(fold.keep)
        for term in split(fold.terms)[0]:
            state.add_(self.left(part, term), alpha=term.coeff)

    def batches(self, packed: Tensor, part: Part, side: int) -> list[Tensor]:
        """Packed factors as one view (matrices, rows, r), or (matrices, columns, r) for ``side`` 1, per shape."""
        groups = [(count, shape[side], self.rank) for shape, count in part.groups()]
        return [v.view(size) for v, size in zip(packed.split([a * b * c for a, b, c in groups]), groups, strict=True)]

    def _factor(self, part: Part, term: Term) -> Tensor:
        return self.left(part, term) if isinstance(term, Noise) else self.states.tensors[term.name][part.slot]

    def _drawn(self, part: Part, seed: int, side: int, stream: int, noise: str = "gaussian") -> Tensor:
        """Packed factors of noise; element [i, k] of a matrix stands at its segment's index + i r + k."""
        table = self._tables[part.span]
        packed = torch.empty(table.sizes[side], device=table.table.device)
        starts, lengths = self._places[part.span, side]
        indices = self._indices[part.span]
        return ops.segment_noise_fill_(packed, seed, starts, lengths, indices, stream=stream, noise=noise)


class Lozo(LowRank):
    """P = U V' with U fresh for every direction (N(0, 1) or what ``noise`` says) and V ~ N(0, 1) until :meth:`redraw`.

    LOZO, section 3.
    """

    def left(self, part: Part, term: Noise) -> Tensor:
        return self._drawn(part, term.seed, 0, STREAM_FACTOR_U, self.noise)

    def redraw(self, seed: int) -> None:
        """Make the V of ``seed`` the current one."""
        for part in self.parts:
            if part.segments:
                self.right[part.span].copy_(self._drawn(part, seed, 1, STREAM_FACTOR_V))

    def transport(self, name: str, seed: int, exact: bool) -> None:
        """Carry the state N of N V_old' over to the current V, where V_old is that of ``seed``.

        N <- N (V_old' V) / n, or with ``exact`` the least-squares N (V_old' V)(V' V)^-1.
        """
        for part in self.parts:
            if not part.segments:
                continue
            old = self._drawn(part, seed, 1, STREAM_FACTOR_V)
            state = self.states.tensors[name][part.slot]
            triples = zip(
                self.batches(state, part, 0), self.batches(old, part, 1), self.batches(self.right[part.span], part, 1),
                strict=True,
            )  # fmt: skip
            for n, before, after in triples:
                change = before.mT.double() @ after.double()
                gram = after.mT.double() @ after.double()
                change = torch.linalg.solve(gram, change, left=False) if exact else change / after.shape[1]
                n.copy_(n.double() @ change)


class Subspace(LowRank):
    """P = s U Z V' with orthonormal U, V until :meth:`redraw`, and Z (r x r) ~ N(0, 1) fresh: SubZero.

    s = sqrt(m n) / r makes E||P||^2 = m n, as for a dense direction. U and V are states (``names``), because a QR
    need not repeat bit for bit on another machine.
    """

    def __init__(
        self,
        arena: Arena,
        noise: str,
        states: States,
        rank: int,
        shape_of: Callable[[Segment], tuple[int, int] | None],
        names: tuple[str, str] = ("basis_u", "basis_v"),
    ) -> None:
        super().__init__(arena, noise, states, rank, shape_of)
        self._u = {span: torch.zeros(table.sizes[0], device=table.table.device) for span, table in self._tables.items()}
        self._cores = {
            part.span: _packing([rank * rank] * len(part.segments), self._tables[part.span].table.device)
            for part in self.parts
            if part.segments
        }
        states.tensors[names[0]] = list(self._u.values())
        states.tensors[names[1]] = list(self.right.values())

    def left(self, part: Part, term: Noise) -> Tensor:
        """s U Z: one batched product per distinct shape of the model."""
        r, table = self.rank, self._tables[part.span]
        count = len(part.segments)
        core = torch.empty(count * r * r, device=table.table.device)
        ops.segment_noise_fill_(
            core, term.seed, *self._cores[part.span], self._indices[part.span], stream=STREAM_DIRECTION,
            noise=self.noise,
        )  # fmt: skip
        packed = torch.empty(table.sizes[0], device=table.table.device)
        groups = part.groups()
        z = core.view(count, r, r).split([members for _, members in groups])
        u, out = self.batches(self._u[part.span], part, 0), self.batches(packed, part, 0)
        for k, ((m, n), _) in enumerate(groups):
            torch.bmm(u[k], z[k] * ((m * n) ** 0.5 / r), out=out[k])
        return packed

    def redraw(self, seed: int) -> None:
        """Orthonormal bases from the QR of normals: U on stream 2, V on stream 3."""
        for part in self.parts:
            if not part.segments:
                continue
            for side, stream, target in (
                (0, STREAM_FACTOR_U, self._u[part.span]),
                (1, STREAM_FACTOR_V, self.right[part.span]),
            ):
                drawn = self.batches(self._drawn(part, seed, side, stream), part, side)
                for bases, normals in zip(self.batches(target, part, side), drawn, strict=True):
                    bases.copy_(torch.linalg.qr(normals.double()).Q)


def square_shape(segment: Segment) -> tuple[int, int] | None:
    """The matrix shape of a segment; that of adapters and prefixes is the most square one with as many elements.

    SubZero, section 4: a LoRA factor or a prefix has a side too small for a subspace, so it is reshaped, row-major.
    """
    if segment.ndim < 2 or not is_adapter(segment.name):
        return matrix_shape(segment)
    side = next(k for k in range(int(segment.numel**0.5), 0, -1) if segment.numel % k == 0)
    return segment.numel // side, side


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to a LoRA adapter or a prefix, by peft's names."""
    return "lora_" in name or "prompt_encoder" in name or "prefix" in name


def _fitting(shape: tuple[int, int] | None, rank: int) -> tuple[int, int] | None:
    return shape if shape is not None and rank <= min(shape) else None


def _packing(sizes: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each of several packed pieces starts, and its length."""
    lengths = torch.tensor(sizes)
    return (lengths.cumsum(0) - lengths).to(device), lengths.to(device)


def _check_rank(arena: Arena, rank: int, shape_of: Callable[[Segment], tuple[int, int] | None]) -> None:
    shapes = [(s.name, shape_of(s)) for s in arena.segments if s.numel]
    matrices = [(name, shape) for name, shape in shapes if shape is not None]
    small = [(name, shape) for name, shape in matrices if min(shape) < rank]
    if not matrices:
        raise ArenaError("a low-rank method needs matrices, and all trainable parameters are vectors")
    if len(small) == len(matrices):
        largest = max(min(shape) for _, shape in matrices)
        raise ArenaError(f"rank {rank} is above min(m, n) of every matrix; choose rank <= {largest}")
    if small:
        logger.warning(
            "rank %d is above min(m, n) of %d of %d matrices (%s %s, for example); these take dense directions",
            rank, len(small), len(matrices), small[0][0], "x".join(map(str, small[0][1])),
        )  # fmt: skip
