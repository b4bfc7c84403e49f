"""The adapters of a model as points: where they start, directions at them, and steps from them.

All arithmetic is float64 on copies of the factors, rounded once where they are kept. States shaped like the arena hold
factor coordinates: dB where B stands, dA where A stands, 0 everywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from zoengine import ops
from zoengine.arena import Arena
from zoengine.noise import table
from zoengine.rozo.manifold import Point
from zoengine.rozo.pairs import AdapterError, Factors, stacks
from zoengine.rozo.precondition import scaled

START_STD = 0.02


class Adapters:
    """The LoRA pairs that make up an arena.

    Args:
        arena: fp32 segments, all of them LoRA factors.
        states: buffers laid out like the arena's, by the names that the methods here take; never replaced.
        offset: whether the second half of each adapter is a constant, see :meth:`start`.
        retracts: whether steps end with :meth:`retract`, which limits the rank.

    Raises:
        AdapterError: the arena holds something else, or an adapter does not suit.
    """

    def __init__(self, arena: Arena, states: Mapping[str, list[Tensor]], *, offset: bool, retracts: bool) -> None:
        self._arena = arena
        self._states = states
        self._offset = offset
        self._stacks = stacks(arena.segments, offset, retracts)
        for segment in arena.segments:
            if arena.buffers[segment.buffer].dtype != torch.float32:
                raise AdapterError(
                    f"{segment.name!r} is {arena.buffers[segment.buffer].dtype}; RoZO keeps adapters in float32, over "
                    "a base of any dtype: convert them (peft does it by itself with autocast_adapter_dtype=True)"
                )
        self._theta = self._factors(arena.buffers)
        self._of_state = {name: self._factors(buffers) for name, buffers in states.items()}
        self._points: list[Point] | None = None

    def start(self, seed: int) -> list[str]:
        """Give adapters whose product is 0 a start of full rank; returns the modules of the others, left as they are.

        B = 0, the usual start of LoRA, is no point of the manifold: of B dA + dB A only dB A is left. B and A become
        N(0, 0.02^2) from the stream of initial states. With an offset the second half of the adapter is set to
        (-B, A), so that the whole of it is zero again.
        """
        noise = self._arena.new_state()
        self._fill(noise, seed, table.STREAM_STATE, "gaussian")
        views, normals = (self._arena.views(buffers) for buffers in (self._arena.buffers, noise))
        others = []
        for stack in self._stacks:
            for pair in stack.pairs:
                B, A, r = views[pair.B], views[pair.A], stack.rank
                if B.any() and A.any():
                    others.append(pair.module)
                    continue
                for factor, normal in ((B, normals[pair.B]), (A, normals[pair.A])):
                    factor.copy_(normal * START_STD)
                if self._offset:
                    B[:, r:] = -B[:, :r]
                    A[r:] = A[:r]
        return others

    def stand(self, base: str | None = None) -> None:
        """Take the tangent spaces at the weights, or at the factors in the state ``base``."""
        self._points = [Point.of(*each.read()) for each in (self._of_state[base] if base else self._theta)]

    @property
    def stands(self) -> bool:
        """Whether there are tangent spaces, from :meth:`stand`."""
        return self._points is not None

    def forget(self) -> None:
        """Drop the tangent spaces, for when what they were taken at has been replaced."""
        self._points = None

    def draw(self, name: str, seed: int, noise: str, tangent: bool) -> None:
        """Write a random (dB, dA) to the state ``name``: unit noise, or coordinates of an isotropic tangent vector.

        N1 is the direction noise on segment B and N2 that on segment A.
        """
        self._fill(self._states[name], seed, table.STREAM_DIRECTION, noise)
        drawn = [each.read() for each in self._of_state[name]]
        torch._foreach_zero_(self._states[name])
        if tangent:
            drawn = [p.to_factors(p.sample(*noises)) for p, noises in zip(self._points, drawn, strict=True)]
        for each, coordinates in zip(self._of_state[name], drawn, strict=True):
            each.write(*coordinates)

    def precondition(self, name: str) -> None:
        """Replace (dB, dA) by (dB (A A')^-1, (B'B)^-1 dA)."""
        for moves, theta in zip(self._of_state[name], self._theta, strict=True):
            moves.write(*scaled(*theta.read(), *moves.read()))

    def move(self, name: str, lrs: Sequence[float], keeps: Sequence[float]) -> None:
        """B <- keep^(1/2) B - lr dB and A <- keep^(1/2) A - lr dA, so that Y decays by keep.

        lrs, keeps: one per parameter group. Where lr is 0, no bit changes.
        """
        for stack, theta, moves in zip(self._stacks, self._theta, self._of_state[name], strict=True):
            lr = lrs[stack.group]
            if lr:
                keep = keeps[stack.group] ** 0.5
                theta.write(*(keep * x - lr * dx for x, dx in zip(theta.read(), moves.read(), strict=True)))

    def retract(self, name: str, lrs: Sequence[float], keeps: Sequence[float], carried: str | None = None) -> None:
        """Replace the weights by the retraction of keep Y - lr (B dA + dB A), Y = B A where the tangent spaces are.

        Args:
            name: state of the coordinates (dB, dA).
            lrs, keeps: one per parameter group. Where lr is 0, no bit changes.
            carried: state of a tangent vector's coordinates (a momentum), transported in place.
        """
        for k, (stack, point) in enumerate(zip(self._stacks, self._points, strict=True)):
            lr = lrs[stack.group]
            if not lr:
                continue
            xi = point.from_factors(*self._of_state[name][k].read())
            new = point.retract(-lr * xi, keeps[stack.group])
            self._theta[k].write(*new)
            if carried is not None:
                vector, there = self._of_state[carried][k], Point.of(*new)
                vector.write(*there.to_factors(there.transport(point.from_factors(*vector.read()), point)))

    def _factors(self, buffers: Sequence[Tensor]) -> list[Factors]:
        views = self._arena.views(buffers)
        return [stack.of(views) for stack in self._stacks]

    def _fill(self, buffers: Sequence[Tensor], seed: int, stream: int, noise: str) -> None:
        for span in self._arena.spans:
            where = buffers[span.buffer][span.start : span.stop]
            ops.noise_fill_(where, seed, offset=span.index, stream=stream, noise=noise)
