"""Geometry of RoZO in float64, against m x n matrices written out: tangent spaces, transport, retraction, gauges."""

import json
import math

import pytest
import torch

from zoengine.rozo import (
    FLOOR,
    Point,
    Tangent,
    TrustRegion,
    adam_,
    balance,
    product_svd,
    scaled,
)

G, M, N, R = 3, 9, 12, 2


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(seed=1, m=M, n=N, r=R):
    return randn(G, m, r, seed=seed), randn(G, r, n, seed=seed + 1000)


def point(seed=1, **sizes):
    return Point.of(*factors(seed, **sizes))


def sampled(at, seed=2):
    return at.sample(randn(*at.B.shape, seed=seed), randn(*at.A.shape, seed=seed + 1000))


def dense(at, xi):
    return at.U @ xi.R + xi.Up @ at.V.mT


def projected(at, X):
    left, right = at.U @ at.U.mT, at.V @ at.V.mT
    return left @ X + X @ right - left @ X @ right


def close(a, b, tolerance=1e-12):
    return (a - b).norm() <= tolerance * (1 + b.norm())


def orthogonal(seed, r=R):
    return torch.linalg.qr(randn(G, r, r, seed=seed))[0]


def invertible(seed, r=R):
    return (
        orthogonal(seed, r) @ torch.diag_embed(torch.linspace(0.5, 2.0, r, dtype=torch.float64)) @ orthogonal(seed + 1)
    )


def test_polar_form():
    at = point()
    identity = torch.eye(R, dtype=torch.float64).expand(G, R, R)
    assert close(at.U @ at.H, at.B) and close(at.K @ at.V.mT, at.A)
    assert close(at.U.mT @ at.U, identity) and close(at.V.mT @ at.V, identity)
    for S, inverse in ((at.H, at.H_inverse), (at.K, at.K_inverse)):
        assert close(S, S.mT) and (torch.linalg.eigvalsh(S) > 0).all() and close(S @ inverse, identity)


def test_inverses_are_floored():
    B, A = factors()
    B[..., 1] = B[..., 0] + 1e-9 * B[..., 1]  # nearly of rank 1
    at = Point.of(B, A)
    largest = torch.linalg.matrix_norm(at.H_inverse, 2) * torch.linalg.matrix_norm(at.H, 2)
    assert torch.allclose(largest, torch.full_like(largest, FLOOR**-0.5))


def test_product_svd_from_factors():
    B, A = factors()
    U, S, V = product_svd(B, A)
    assert close(U * S.unsqueeze(-2) @ V.mT, B @ A)
    assert close(S, torch.linalg.svdvals(B @ A)[:, :R])


def test_sampled_vectors_are_tangent():
    at = point()
    N1, N2 = randn(G, M, R, seed=5), randn(G, R, N, seed=6)
    xi = at.sample(N1, N2)
    X = dense(at, xi)
    assert close(projected(at, X), X)
    assert close(at.U.mT @ xi.Up, torch.zeros(G, R, R, dtype=torch.float64))
    # R and Up as the formulas have them
    outside = torch.eye(M, dtype=torch.float64) - at.U @ at.U.mT
    beside = torch.eye(N, dtype=torch.float64) - at.V @ at.V.mT
    assert close(xi.Up, outside @ N1) and close(xi.R, at.U.mT @ N1 @ at.V.mT + N2 @ beside)


def test_sampled_vectors_are_isotropic():
    """Mean of <xi, G> xi is P_T(G) and of ||xi||^2 is r (m + n - r), within 5 standard errors; any gauge."""
    draws, m, n, r = 40_000, 5, 6, 2
    B, A = randn(1, m, r, seed=1) @ torch.diag(torch.tensor([3.0, 0.2], dtype=torch.float64)), randn(1, r, n, seed=2)
    at = Point.of(B, A)
    xi = at.sample(randn(draws, m, r, seed=3), randn(draws, r, n, seed=4))
    X, gradient = dense(at, xi), randn(m, n, seed=5)
    squares = X.square().sum(dim=(-2, -1))
    assert abs(squares.mean() - r * (m + n - r)) < 5 * squares.std() / math.sqrt(draws)
    assert torch.allclose(squares, xi.norm() ** 2)
    estimates = (X * gradient).sum(dim=(-2, -1), keepdim=True) * X
    error = estimates.mean(0) - projected(at, gradient)[0]
    assert (error.abs() < 5 * estimates.std(0) / math.sqrt(draws)).all()


def test_factor_coordinates():
    """B dA + dB A is the tangent vector, both ways, for factors in any gauge."""
    at = point()
    xi = sampled(at)
    dB, dA = at.to_factors(xi)
    assert close(at.B @ dA + dB @ at.A, dense(at, xi)) and close(at.U.mT @ dB, torch.zeros_like(at.H))
    dB, dA = randn(G, M, R, seed=7), randn(G, R, N, seed=8)
    again = at.from_factors(dB, dA)
    assert close(dense(at, again), at.B @ dA + dB @ at.A)
    assert close(at.U.mT @ again.Up, torch.zeros_like(at.H))


def test_vector_space():
    at = point()
    xi, eta = sampled(at, 2), sampled(at, 3)
    X, Y = dense(at, xi), dense(at, eta)
    assert close(dense(at, xi + 0.5 * eta), X + 0.5 * Y)
    assert close(xi.inner(eta), (X * Y).sum(dim=(-2, -1))) and close(xi.norm(), X.flatten(1).norm(dim=1))


def test_averaged_estimates_are_the_projected_gradient():
    """c = <xi, grad_Y loss> from autograd on a toy layer, averaged over directions."""
    draws, m, n, r = 40_000, 5, 6, 2
    B, A, x, y = randn(1, m, r, seed=1), randn(1, r, n, seed=2), randn(n, 7, seed=3), randn(m, 7, seed=4)
    W0, Y = randn(m, n, seed=5), (B @ A)[0].requires_grad_()
    (torch.tanh((W0 + Y) @ x) - y).square().mean().backward()
    at = Point.of(B, A)
    xi = at.sample(randn(draws, m, r, seed=6), randn(draws, r, n, seed=7))
    slopes = (dense(at, xi) * Y.grad).sum(dim=(-2, -1), keepdim=True)
    X = slopes * dense(at, xi)
    error = X.mean(0) - projected(at, Y.grad)[0]
    assert (error.abs() < 5 * X.std(0) / math.sqrt(draws)).all()


def test_project_low_rank_factors():
    at = point()
    left, right = randn(G, M, 3, seed=3), randn(G, N, 3, seed=4)
    assert close(dense(at, at.project(left, right)), projected(at, left @ right.mT))


def test_transport():
    source, target = point(1), point(9)
    xi, eta = sampled(source, 2), sampled(source, 3)
    moved = target.transport(xi, source)
    assert close(dense(target, moved), projected(target, dense(source, xi)))
    assert close(target.U.mT @ moved.Up, torch.zeros_like(target.H))
    linear = target.transport(xi + 0.3 * eta, source)
    assert close(dense(target, linear), dense(target, moved + 0.3 * target.transport(eta, source)))
    same = source.transport(xi, source)
    assert close(same.Up, xi.Up) and close(same.R, xi.R)
    assert (moved.norm() <= xi.norm()).all() and (moved.norm() < 0.99 * xi.norm()).any()


def test_a_change_of_gauge_moves_momentum_with_the_factors():
    """Y the same, B2 = B Q, A2 = Q^-1 A: the transport of (dB, dA) is the vector with (dB Q, Q^-1 dA)."""
    at, Q = point(), invertible(4)
    other = Point.of(at.B @ Q, torch.linalg.solve(Q, at.A))
    dB, dA = randn(G, M, R, seed=7), randn(G, R, N, seed=8)
    moved = other.transport(at.from_factors(dB, dA), at)
    turned = other.from_factors(dB @ Q, torch.linalg.solve(Q, dA))
    assert close(dense(other, moved), at.B @ dA + dB @ at.A) and close(dense(other, turned), dense(other, moved))


def test_bases_turn_with_an_orthogonal_gauge():
    at, Q = point(), orthogonal(4)
    turned = Point.of(at.B @ Q, Q.mT @ at.A)
    assert close(turned.U, at.U @ Q) and close(turned.V, at.V @ Q)


def test_retraction_is_the_best_approximation_of_the_step():
    """The 2r x 2r core is keep Y + xi exactly: its truncation is that of the matrix written out."""
    at = point()
    xi, keep = 0.3 * sampled(at), 0.9
    wanted = keep * at.B @ at.A + dense(at, xi)
    B, A = at.retract(xi, keep)
    U, S, Vt = torch.linalg.svd(wanted, full_matrices=False)
    assert close(B @ A, (U[..., :R] * S[..., None, :R]) @ Vt[:, :R], 1e-11)
    assert close(B.mT @ B, A @ A.mT)  # balanced
    assert torch.linalg.matrix_rank(B @ A).tolist() == [R] * G
    # with room for rank 2r nothing is cut: the core reproduces the whole matrix
    full = torch.linalg.svdvals(wanted)
    assert (full[:, 2 * R :] < 1e-12).all() and (full[:, 2 * R - 1] > 1e-3).all()


def test_retraction_is_of_second_order():
    at = point()
    xi = sampled(at)
    sizes = (1e-3, 5e-4)

    def error(t):
        B, A = at.retract(-t * xi)
        return (B @ A - (at.B @ at.A - t * dense(at, xi))).norm()

    slope = math.log(error(sizes[0]) / error(sizes[1])) / math.log(2)
    assert 1.9 < slope < 2.1


def test_rank_stays_through_many_steps():
    B, A = factors()
    for step in range(50):
        at = Point.of(B, A)
        B, A = at.retract(-0.05 * sampled(at, 10 + step), keep=0.99)
    singular = torch.linalg.svdvals(B @ A)
    assert (singular[:, R - 1] > 1e-3).all() and (singular[:, R] < 1e-12 * singular[:, 0]).all()


def test_factors_move_no_more_than_the_point():
    """Crossing and equal singular values: the nearest gauge stays put where sorted singular vectors would jump."""
    B, A = balance(*factors())
    U, V = Point.of(B, A).U, Point.of(B, A).V
    B, A = U, V.mT  # all singular values 1: the SVD's basis is arbitrary
    at = Point.of(B, A)
    xi = 1e-6 * sampled(at)
    stepped = at.retract(xi)
    assert (stepped[0] - B).norm() < 3 * xi.norm().norm() and (stepped[1] - A).norm() < 3 * xi.norm().norm()


def test_balancing_is_idempotent_and_keeps_the_product():
    B, A = factors()
    first = balance(B, A)
    assert close(first[0] @ first[1], B @ A) and close(first[0].mT @ first[0], first[1] @ first[1].mT)
    second = balance(*first)
    assert close(second[0], first[0]) and close(second[1], first[1])


def test_a_zero_step_does_not_move_fp32_factors_held_in_fp64():
    """What fp64 inside is for: balanced fp32 factors come back as the same bits, so rounding is that of one update."""
    B, A = (x.float() for x in balance(*factors()))
    at = Point.of(B.double(), A.double())
    zero = Tangent(torch.zeros_like(at.B), torch.zeros_like(at.A))
    again = [x.float() for x in at.retract(zero)]
    moved = torch.cat([(a != b).flatten() for a, b in zip(again, (B, A), strict=True)]).double().mean()
    assert moved < 0.1 and close(again[0].double(), B.double(), 1e-7)


def test_a_step_without_one_half():
    """Up = 0 (only the row space turns): the QR of a zero block is no trouble."""
    at = point()
    xi = Tangent(torch.zeros_like(at.B), sampled(at).R)
    B, A = at.retract(xi)
    assert close(B @ A, at.B @ at.A + dense(at, xi), 1e-11)  # still of rank r


def test_scaled_step_is_the_same_in_every_gauge():
    B, A = factors()
    gradient, Q = randn(G, M, N, seed=5), invertible(6)

    def move(B, A):
        dB, dA = scaled(B, A, gradient @ A.mT, B.mT @ gradient)
        return dB @ A + B @ dA

    assert close(move(B @ Q, torch.linalg.solve(Q, A)), move(B, A), 1e-10)
    at = Point.of(B, A)
    assert close(move(B, A), at.U @ at.U.mT @ gradient + gradient @ at.V @ at.V.mT, 1e-10)


def test_adam_against_its_formula():
    beta2, adam_eps, second, v = 0.9, 1e-8, torch.zeros(5, dtype=torch.float64), 0
    for t in range(1, 5):
        gradient, direction = randn(5, seed=t), randn(5, seed=50 + t)
        v = beta2 * v + (1 - beta2) * gradient**2
        wanted = direction / ((v / (1 - beta2**t)).sqrt() + adam_eps)
        assert close(adam_(direction, gradient, second, t, beta2, adam_eps), wanted) and close(second, v)


def test_trust_region_follows_the_agreement_of_halves():
    state, window = TrustRegion.start(1e-3, 5), 5
    for _ in range(4):
        state = state.after_halves(0.0, window)
        assert (state.eps, state.lr_factor) == (1e-3, 1.0)
    assert state.agreement == pytest.approx(0.65 * 0.9**4)
    state = state.after_halves(0.0, window)
    assert (state.eps, state.lr_factor, state.wait) == (5e-4, 0.5, window)
    for _ in range(4):
        state = state.after_halves(0.0, window)
    assert state.eps == 5e-4
    for _ in range(60):
        state = state.after_halves(0.0, window)
    assert (state.eps, state.lr_factor) == (1e-5, 1 / 16)
    for _ in range(200):
        state = state.after_halves(1.0, window)
    assert (state.eps, state.lr_factor) == (1e-3, 1.0) and state.agreement == pytest.approx(1.0)


def test_trust_region_between_the_thresholds_stays():
    state = TrustRegion.start(1e-4, 1)
    for k in range(50):
        state = state.after_halves(1.0 if k % 3 else 0.0, 1)
        assert state.eps == 1e-4 and 0.5 <= state.agreement <= 0.8


def test_trust_region_follows_the_kl_divergence():
    state = TrustRegion.start(1e-3, 2)
    state = state.after_kl(0.06, 2)
    assert state.eps == 1e-3  # not before the window has passed
    state = state.after_kl(0.06, 2)
    assert state.eps == 5e-4
    assert state.after_kl(0.01, 2).after_kl(0.01, 2).eps == 5e-4
    assert state.after_kl(0.001, 2).after_kl(0.001, 2).eps == 1e-3


def test_trust_region_range_holds_the_start_and_survives_json():
    state = TrustRegion.start(1e-2, 1).after_kl(0.001, 1)
    assert state.eps == 1e-2
    assert TrustRegion(**json.loads(json.dumps(state.to_dict()))) == state
