"""Row-wise Kronecker rank-1 covariance: the directions of LOREN, and the learning of its vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoengine import ops
from zoengine.arena import Arena
from zoengine.directions import Fold, Term
from zoengine.noise.table import STREAM_STATE
from zoengine.transforms.dense import split
from zoengine.transforms.states import States
from zoengine.transforms.structured import Part, Place, Structured, matrix_shape


@dataclass(frozen=True)
class Vectors:
    """The vectors a of a part's matrices: packed values, where each starts, and which matrix each element is of."""

    a: Tensor
    score: Tensor
    table: ops.Matrices
    starts: Tensor
    lengths: Tensor
    matrix: Tensor

    @classmethod
    def drawn(cls, part: Part, table: ops.Matrices, seed: int) -> Vectors:
        """a ~ N(0, 1), one element per column, on stream 5 at the first indices of each segment."""
        device = table.table.device
        lengths = torch.tensor([n for _, n in part.shapes])
        starts = lengths.cumsum(0) - lengths
        a = torch.empty(int(lengths.sum()), device=device)
        indices = [s.index for s in part.segments]
        ops.segment_noise_fill_(a, seed, starts, lengths, indices, stream=STREAM_STATE)
        matrix = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        return cls(a, torch.zeros_like(a), table, starts.to(device), lengths.to(device), matrix.to(device))


class Kron(Structured):
    """Every row u of a matrix becomes w = u - kappa (a . u) a; vectors stay dense.

    With Sigma = (rho I + a a')^-1, t = sqrt(rho + |a|^2) and kappa = 1 / (t (t + sqrt(rho))), w is sqrt(rho)
    Sigma^(1/2) u with the positive definite root. The paper prints the other root, kappa = (t + sqrt(rho)) / (|a|^2 t),
    which is indefinite and has no limit as a goes to 0.

    A fold of a state also computes the score sums of its noise terms, which :meth:`learn` uses.

    Args:
        damping: rho > 0.
        name: of the state that holds the vectors a, packed per part. It is made here, a ~ N(0, 1) drawn with ``seed``
            on stream 5 at the first indices of each segment.
    """

    def __init__(self, arena: Arena, noise: str, states: States, damping: float, name: str, seed: int) -> None:
        super().__init__(arena, noise, states, matrix_shape)
        self.damping = damping
        self._vectors = {part.span: self._new_vectors(part, seed) for part in self.parts if part.segments}
        states.tensors[name] = [v.a for v in self._vectors.values()]

    def matrix_state(self, part: Part) -> int:
        return part.span.stop - part.span.start

    def add_matrices(self, part: Part, terms: Sequence[Term], at: Place, keep: float) -> None:
        noises, states = split(terms)
        x, out, how = at
        if noises or not states:
            vectors = self._vectors[part.span]
            ops.kron_rows_(
                x, vectors.a, self._kappa(vectors).float(), vectors.table, [t.seed for t in noises],
                [t.coeff for t in noises], keep=keep, noise=self.noise, out=out, **how,
            )  # fmt: skip
            x, out, keep = x if out is None else out, None, 1.0
        if states:  # a momentum is a sum of directions already; beside noise only where a perturbation is undone
            ops.add_noise_(
                x, [], [], states=[self.states.tensors[t.name][part.slot] for t in states],
                state_coeffs=self.states.coefficients(states), decay=1.0 - keep, out=out, **how,
            )  # fmt: skip

    def fold_matrices(self, part: Part, fold: Fold) -> None:
        vectors = self._vectors[part.span]
        ops.kron_rows_(
            self.states.tensors[fold.name][part.slot], vectors.a, self._kappa(vectors).float(), vectors.table,
            [t.seed for t in fold.terms], [t.coeff for t in fold.terms], keep=fold.keep, offset=part.span.index,
            noise=self.noise, score=vectors.score,
        )  # fmt: skip

    def dense_keep(self, keep: float) -> float:
        """0: vectors take the plain estimate, without momentum."""
        return 0.0

    def learn(self, lr: float) -> None:
        """a <- a - lr sum_k coeff_k score_k, with the coefficients and the noise of the last fold.

        The score, the gradient of log N(w; 0, Sigma) by a summed over the rows of a matrix, is
        -(v - kappa (a . v) a) / (sqrt(rho) t) with v = sum_i (a . u_i) u_i - m a. The sqrt(rho) is left out, as in w.
        """
        for vectors in self._vectors.values():
            a, v = vectors.a, vectors.score
            along = ops.segment_dot(a, vectors.starts, vectors.lengths, y=v)
            kappa, t = self._kappa(vectors), self._root(vectors)
            score = -(v.double() - (kappa * along)[vectors.matrix] * a.double()) / t[vectors.matrix]
            a.copy_(a.double() - lr * score)

    def _root(self, vectors: Vectors) -> Tensor:
        """t = sqrt(rho + |a|^2) per matrix, float64."""
        return (self.damping + ops.segment_stats(vectors.a, vectors.starts, vectors.lengths)[:, 1]).sqrt()

    def _kappa(self, vectors: Vectors) -> Tensor:
        t = self._root(vectors)
        return 1.0 / (t * (t + self.damping**0.5))

    def _new_vectors(self, part: Part, seed: int) -> Vectors:
        device = self.arena.buffers[part.span.buffer].device
        table = ops.Matrices.for_kron([s.start - part.span.start for s in part.segments], part.shapes, device)
        return Vectors.drawn(part, table, seed)
