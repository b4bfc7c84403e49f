"""The manifold of m x n matrices of rank r, as LoRA stores them: Y = B A with B m x r and A r x n.

Everything is batched over G pairs of one shape, B (G, m, r) and A (G, r, n), and costs O((m + n) r^2) per pair: no
m x n matrix is ever formed. Results have the dtype of the factors. With float64 inputs a step that is rounded to fp32
once at its end moves the stored factors as exactly as an update in place would; in fp32 throughout, the rounding of
the decompositions is of the size of a small step.

Write U and V for orthonormal bases of the columns of B and the rows of A. A tangent vector at Y is any

    xi = U R + Up V',    R = U' xi (r x n),    Up = (I - U U') xi V (m x r),

so the pair (Up, R), shaped like (B, A), determines it, and <xi, eta> = <R, R_eta> + <Up, Up_eta>. In the notation
xi = U M V' + Up V' + U Vp' common in the literature, M = R V and Vp = (I - V V') R'.

Sources: RoZO (Song and Li), equations 6 to 9, names tangent perturbations, retraction by thin SVD and transport; the
formulas are those of fixed-rank matrix manifolds (Vandereycken 2013, "Low-rank matrix completion by Riemannian
optimization"). The paper retracts "W": read literally that truncates the pretrained weight. The point here is Y = B A.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Singular values of Y below FLOOR times the largest count as that in S^(-1/2); else one that is nearly 0 would turn a
# unit tangent vector into an unbounded step of the factors.
FLOOR = 1e-3


@dataclass(frozen=True, slots=True)
class Point:
    """A batch of points Y = B A in polar form, B = U H and A = K V', with H and K symmetric positive (G, r, r).

    U and V follow B and A continuously and turn with them: (B Q, Q' A) has (U Q, V Q). The factors may be in any
    gauge; for balanced ones (B'B = A A') H = K is the square root of Y's singular values in that basis.

    ``H_inverse`` and ``K_inverse`` have singular values floored at sqrt(FLOOR) of their largest.
    """

    B: Tensor
    A: Tensor
    U: Tensor
    V: Tensor
    H: Tensor
    K: Tensor
    H_inverse: Tensor
    K_inverse: Tensor

    @classmethod
    def of(cls, B: Tensor, A: Tensor) -> Point:
        """The point with factors B (G, m, r) and A (G, r, n), floating point; r <= min(m, n)."""
        U, H, H_inverse = _polar(B)
        V, K, K_inverse = _polar(A.mT)
        return cls(B, A, U, V, H, K, H_inverse, K_inverse)

    def sample(self, N1: Tensor, N2: Tensor) -> Tangent:
        """The tangent vector made of noise N1 (G, m, r) and N2 (G, r, n): the projection of N1 V' + U N2, counted once.

        For entries of mean 0 and covariance 1 it is isotropic in the tangent space: E xi <xi, G> = P_T(G) and
        E ||xi||^2 = r (m + n - r), in whatever gauge.
        """
        inner = self.U.mT @ N1
        return Tangent(N1 - self.U @ inner, inner @ self.V.mT + N2 - (N2 @ self.V) @ self.V.mT)

    def from_factors(self, dB: Tensor, dA: Tensor) -> Tangent:
        """The tangent vector B dA + dB A."""
        inner = self.U.mT @ dB
        return Tangent((dB - self.U @ inner) @ self.K, self.H @ dA + inner @ self.K @ self.V.mT)

    def to_factors(self, xi: Tangent) -> tuple[Tensor, Tensor]:
        """(dB, dA) with B dA + dB A = xi and U' dB = 0: dB = Up K^-1, dA = H^-1 R (floored inverses)."""
        return xi.Up @ self.K_inverse, self.H_inverse @ xi.R

    def project(self, left: Tensor, right: Tensor) -> Tangent:
        """The orthogonal projection onto the tangent space of left right', left (G, m, k) and right (G, n, k).

        P_T(X) = U U' X + X V V' - U U' X V V'.
        """
        columns = left @ (right.mT @ self.V)
        return Tangent(columns - self.U @ (self.U.mT @ columns), (self.U.mT @ left) @ right.mT)

    def transport(self, xi: Tangent, source: Point) -> Tangent:
        """A tangent vector of ``source`` brought here by orthogonal projection, which never lengthens it.

        This is the vector transport the RoZO paper describes ("projects"), not an isometric parallel transport.
        """
        left = torch.cat((source.U, xi.Up), dim=-1)
        right = torch.cat((xi.R.mT, source.V), dim=-1)
        return self.project(left, right)

    def retract(self, xi: Tangent, keep: float = 1.0) -> tuple[Tensor, Tensor]:
        """Balanced factors of the best rank-r approximation of keep Y + xi, in the gauge nearest to (B, A).

        keep Y + xi = [U Qu] C [V Qv]' with thin QRs Up = Qu Ru, Vp = Qv Rv and the 2r x 2r core
        C = [[keep H K + M, Rv'], [Ru, 0]], whose SVD is cut to r. Second order in xi. Needs 2 r <= min(m, n): a step
        from Y has rank 2 r. ``keep`` is where decoupled weight decay of Y enters: S <- keep S.
        """
        M = xi.R @ self.V
        Qu, Ru = torch.linalg.qr(xi.Up)
        Qv, Rv = torch.linalg.qr(xi.R.mT - self.V @ M.mT)
        top = torch.cat((keep * (self.H @ self.K) + M, Rv.mT), dim=-1)
        bottom = torch.cat((Ru, torch.zeros_like(Ru)), dim=-1)
        P, S, Qt = torch.linalg.svd(torch.cat((top, bottom), dim=-2))
        r = self.H.shape[-1]
        U = self.U @ P[..., :r, :r] + Qu @ P[..., r:, :r]
        V = self.V @ Qt.mT[..., :r, :r] + Qv @ Qt.mT[..., r:, :r]
        return _nearest_gauge(U, S[..., :r], V, self.B, self.A)


@dataclass(frozen=True, slots=True)
class Tangent:
    """Tangent vectors xi = U R + Up V' of a batch of points: Up (G, m, r) with U' Up = 0, and R (G, r, n)."""

    Up: Tensor
    R: Tensor

    def __add__(self, other: Tangent) -> Tangent:
        return Tangent(self.Up + other.Up, self.R + other.R)

    def __mul__(self, factor: float) -> Tangent:
        return Tangent(self.Up * factor, self.R * factor)

    __rmul__ = __mul__

    def inner(self, other: Tangent) -> Tensor:
        """<self, other> of each pair, float64 (G,). Both must belong to the same point."""
        parts = ((self.Up, other.Up), (self.R, other.R))
        return sum((a.double() * b.double()).sum(dim=(-2, -1)) for a, b in parts)

    def norm(self) -> Tensor:
        """The Frobenius norm of each pair, float64 (G,)."""
        return self.inner(self).sqrt()


def product_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of B A from its factors: U (G, m, r), S (G, r) descending, V (G, n, r) with B A = U diag(S) V'.

    Two thin QRs and the SVD of an r x r matrix.
    """
    Qb, Rb = torch.linalg.qr(B)
    Qa, Ra = torch.linalg.qr(A.mT)
    P, S, Qt = torch.linalg.svd(Rb @ Ra.mT)
    return Qb @ P, S, Qa @ Qt.mT


def balance(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The balanced factors (B'B = A A') of the same product that are nearest to (B, A)."""
    return _nearest_gauge(*product_svd(B, A), B, A)


def _nearest_gauge(U: Tensor, S: Tensor, V: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """(U S^(1/2) Q, Q' S^(1/2) V') with the orthogonal Q that brings both factors nearest to (B, A) together.

    Elementwise second moments belong to a basis. A fixed rule for the basis ("singular vectors in descending order")
    jumps when singular values cross or a sign flips; the nearest one, a Procrustes problem in both factors at once,
    moves as little as the point does.
    """
    root = S.sqrt().unsqueeze(-2)
    left, right = U * root, V * root
    P, _, Qt = torch.linalg.svd(left.mT @ B + right.mT @ A.mT)
    Q = P @ Qt
    return left @ Q, (right @ Q).mT


def _polar(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """X = U H with U orthonormal and H symmetric positive; also the floored inverse of H."""
    Q, R = torch.linalg.qr(X)
    P, s, Wt = torch.linalg.svd(R)
    floored = torch.maximum(s, FLOOR**0.5 * s[..., :1])
    return Q @ (P @ Wt), Wt.mT @ (s.unsqueeze(-1) * Wt), Wt.mT @ (Wt / floored.unsqueeze(-1))
