"""Covariance with one rank-1 term for a whole matrix: the directions of LOREN's published code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoengine import ops
from zoengine.arena import Arena, Segment, Span
from zoengine.directions import Fold, Noise, Term
from zoengine.transforms.dense import split
from zoengine.transforms.kron import Vectors
from zoengine.transforms.states import States
from zoengine.transforms.structured import Part, Place, Structured, matrix_shape

_SCRATCH = 1 << 20  # elements of noise that are drawn at once for a projection


class KronTiled(Structured):
    """The noise u of a tensor becomes w = u - kappa (b . u) b, where b is a vector a repeated in each of its m rows.

    With Sigma = (rho I + b b')^-1, t = sqrt(rho + |b|^2), |b|^2 = m |a|^2 and kappa = (t + sqrt(rho)) / (|b|^2 t), w is
    sqrt(rho) Sigma^(1/2) u with the root that is not positive definite: Sigma^(1/2) b = -b / t. Vectors are matrices of
    one row, with an a as long as they are.

    kappa has no limit at a = 0, where w would be u mirrored at whatever a last pointed to. Here kappa |b|^2 = 1 +
    sqrt(rho) / t is what is computed, so nothing overflows, and at a = 0 itself w is u.

    A fold of a state also computes the score of its noise terms, which :meth:`learn` uses; vectors keep nothing of
    their state in a fold.

    This is for comparison, and slower than :class:`Kron`. A pass is one over all of the noise and one of rank 1 (16-bit
    weights are rounded in both). b . u takes the sum of the rows of u, for which the noise is drawn a second time, some
    rows at a time: at most 2^20 numbers, or one row if that is longer, in fp32 and once more in fp64.

    Args:
        damping: rho > 0.
        name: of the state that holds the vectors a, packed per part, drawn as :class:`Kron` draws them.
    """

    def __init__(self, arena: Arena, noise: str, states: States, damping: float, name: str, seed: int) -> None:
        super().__init__(arena, noise, states, _shape)
        self.damping = damping
        self._vectors: dict[Span, Vectors] = {}
        self._batches: dict[Span, list[_Batch]] = {}
        for part in self.parts:
            if part.segments:
                device = arena.buffers[part.span.buffer].device
                starts = [s.start - part.span.start for s in part.segments]
                table = ops.Matrices.for_lowrank(starts, part.shapes, 1, device)
                self._vectors[part.span] = Vectors.drawn(part, table, seed)
                self._batches[part.span] = list(_batches(part, device))
        states.tensors[name] = [v.a for v in self._vectors.values()]

    def matrix_state(self, part: Part) -> int:
        return part.span.stop - part.span.start

    def add_matrices(self, part: Part, terms: Sequence[Term], at: Place, keep: float) -> None:
        noises, states = split(terms)
        x, out, how = at
        ops.add_noise_(
            x, [t.seed for t in noises], [t.coeff for t in noises], stream=[t.stream for t in noises],
            noise=self.noise, states=[self.states.tensors[t.name][part.slot] for t in states],
            state_coeffs=self.states.coefficients(states), decay=1.0 - keep, out=out, **how,
        )  # fmt: skip
        if noises:
            covariance = self._covariance(part)
            along = sum(t.coeff * self._along(part, covariance, self._row_sums(part, t)) for t in noises)
            self._add_rank_one(part, covariance, x if out is None else out, along, **how)

    def fold_matrices(self, part: Part, fold: Fold) -> None:
        noises, _ = split(fold.terms)
        state, vectors = self.states.tensors[fold.name][part.slot], self._vectors[part.span]
        ops.state_fold_(
            state, [t.seed for t in noises], [t.coeff for t in noises], keep=fold.keep if part.span.decays else 0.0,
            offset=part.span.index, stream=[t.stream for t in noises], noise=self.noise,
        )  # fmt: skip
        vectors.score.zero_()
        if not noises:
            return
        covariance, total = self._covariance(part), 0.0
        for term in noises:
            sums = self._row_sums(part, term)
            along = self._along(part, covariance, sums)
            total = total + term.coeff * along
            vectors.score.add_(self._score(part, covariance, sums, along), alpha=term.coeff)
        self._add_rank_one(part, covariance, state, total, offset=part.span.index)

    def learn(self, lr: float, decays: Sequence[float]) -> None:
        """a <- (1 - decay) a - lr sum_k coeff_k score_k, with the coefficients and the noise of the last fold.

        The score of a matrix, the gradient of log N(w; 0, Sigma) by a, is that by b summed over the rows:
        (v - kappa (b . v) b) / (sqrt(rho) t) with v = (b . u) u - b; its sign is that of this root. The sqrt(rho) is
        left out, as in w. For vectors it is summed over the elements too, as the published code does, which takes them
        for rows: all of their a moves by the same number.

        Args:
            decays: one per parameter group.
        """
        for span, vectors in self._vectors.items():
            vectors.a.copy_((1.0 - decays[span.group]) * vectors.a.double() - lr * vectors.score.double())

    def _score(self, part: Part, covariance: _Covariance, sums: Tensor, along: Tensor) -> Tensor:
        """fp64, packed like a; ``sums`` are u over the rows and ``along`` is b . u / |b|."""
        vectors, c = self._vectors[part.span], covariance
        own = c.rows * (1.0 + c.bend * (along * along - 1.0))
        score = (along * c.length)[vectors.matrix] * sums.double() - own[vectors.matrix] * vectors.a.double()
        score = score / c.t[vectors.matrix]
        if part.span.decays:
            return score
        total = ops.segment_stats(score.float(), vectors.starts, vectors.lengths)[:, 0]
        return total[vectors.matrix]

    def _add_rank_one(self, part: Part, covariance: _Covariance, x: Tensor, along: Tensor, **how) -> None:
        """x <- x - kappa |b| along b for all matrices."""
        vectors, c = self._vectors[part.span], covariance
        left = torch.repeat_interleave((-c.bend * along).float(), c.rows, output_size=vectors.table.sizes[0])
        right = (vectors.a.double() * c.inverse[vectors.matrix]).float()
        ops.lowrank_add_(x, left, right, vectors.table, 1.0, rank=1, **how)

    def _along(self, part: Part, covariance: _Covariance, sums: Tensor) -> Tensor:
        """b . u / |b| per matrix, float64; 0 where a is."""
        vectors = self._vectors[part.span]
        return ops.segment_dot(vectors.a, vectors.starts, vectors.lengths, y=sums) * covariance.inverse

    def _covariance(self, part: Part) -> _Covariance:
        vectors = self._vectors[part.span]
        rows = vectors.table.table[:, 1]
        square = rows * ops.segment_stats(vectors.a, vectors.starts, vectors.lengths)[:, 1]
        t = (self.damping + square).sqrt()
        inverse = torch.where(square > 0, square.rsqrt(), 0.0)
        return _Covariance(rows, square.sqrt(), inverse, t, 1.0 + self.damping**0.5 / t)

    def _row_sums(self, part: Part, term: Noise) -> Tensor:
        """The noise of a term summed over the rows of each matrix, packed like a; fp64 sums, rounded to fp32."""
        a = self._vectors[part.span].a
        sums = torch.zeros(a.numel(), dtype=torch.float64, device=a.device)
        for batch in self._batches[part.span]:
            scratch = torch.empty(batch.size, device=a.device)
            ops.segment_noise_fill_(
                scratch, term.seed, batch.starts, batch.lengths, batch.indices, stream=term.stream, noise=self.noise
            )
            for start, rows, columns, first in batch.pieces:
                drawn = scratch[start : start + rows * columns].view(rows, columns)
                sums[first : first + columns] += drawn.sum(0, dtype=torch.float64)
        return sums.float()


@dataclass(frozen=True)
class _Covariance:
    """Of each matrix as a is now: m, |b|, 1 / |b| (0 where b is), t and kappa |b|^2; all but m in float64."""

    rows: Tensor
    length: Tensor
    inverse: Tensor
    t: Tensor
    bend: Tensor


@dataclass(frozen=True)
class _Batch:
    """Rows of some matrices whose noise is drawn together.

    Attributes:
        size: elements of all of them.
        starts, lengths, indices: of every piece, in the scratch and in the arena, on the device.
        pieces: (start in the scratch, rows, columns, first column in the packed a).
    """

    size: int
    starts: Tensor
    lengths: Tensor
    indices: Tensor
    pieces: tuple[tuple[int, int, int, int], ...]


def _batches(part: Part, device: torch.device) -> Iterator[_Batch]:
    """All rows of a part's matrices, each batch within the scratch unless a row alone is longer."""
    waiting: list[tuple[int, int, int, int]] = []
    indices: list[int] = []
    used = 0

    def batch() -> _Batch:
        starts, lengths = [p[0] for p in waiting], [p[1] * p[2] for p in waiting]
        return _Batch(used, *(torch.tensor(v, device=device) for v in (starts, lengths, indices)), tuple(waiting))

    first = 0
    for segment, (rows, columns) in zip(part.segments, part.shapes, strict=True):
        most = max(1, _SCRATCH // columns)
        for row in range(0, rows, most):
            count = min(most, rows - row)
            if waiting and used + count * columns > _SCRATCH:
                yield batch()
                waiting, indices, used = [], [], 0
            waiting.append((used, count, columns, first))
            indices.append(segment.index + row * columns)
            used += count * columns
        first += columns
    yield batch()


def _shape(segment: Segment) -> tuple[int, int]:
    """That of a matrix; a vector is one row."""
    return matrix_shape(segment) or (1, segment.numel)
