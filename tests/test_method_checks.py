"""What theory says of estimates: their first and second moments, slopes, moving averages."""

import math

import pytest
import torch
from torch import nn
from toys import Curved, Linear, Problem, Transformer, assert_mean, directions, flat, same

from zoengine import methods

pytestmark = pytest.mark.usefixtures("one_thread")


def moves(toy, optimizer, steps: int) -> torch.Tensor:
    """-1 / lr of the way of each of ``steps`` steps from the same weights and states, (steps, d)."""
    theta = [b.clone() for b in optimizer.arena.buffers]
    kept = {name: [t.clone() for t in tensors] for name, tensors in optimizer.states.items()}
    squares = dict(optimizer._states.squares)
    start, found = flat(toy.model), []
    for _ in range(steps):
        optimizer.step(toy)
        found.append((start - flat(toy.model)) / optimizer.fields.lr)
        for buffer, value in zip(optimizer.arena.buffers, theta, strict=True):
            buffer.copy_(value)
        for name, tensors in kept.items():
            for target, value in zip(optimizer.states[name], tensors, strict=True):
                target.copy_(value)
        optimizer._states.squares = dict(squares)
    return torch.stack(found)


def _expected(case: str, toy, optimizer) -> torch.Tensor:
    """E[c u] for the gradient of ``toy``."""
    matrix, vector = toy.gradient
    g, states = flat(toy.gradient), optimizer.states
    if case == "sparse-mezo":
        bits = optimizer.transform.bits[0]
        i = torch.arange(30)
        return torch.cat([matrix.reshape(-1) * (bits[i >> 3] >> (i & 7) & 1), vector])
    if case == "hizoo":
        h = states["hessian"][0].double()
        return g / torch.cat([h[:30], h[1024:1031]])
    if case == "lozo":
        v = next(iter(optimizer.transform.right.values())).view(5, 2).double()
        return torch.cat([(matrix @ v @ v.T).reshape(-1), vector])
    if case == "subzero":
        u, v = (states[k][0].double().view(-1, 2) for k in ("basis_u", "basis_v"))
        return torch.cat([(30 / 4 * u @ u.T @ matrix @ v @ v.T).reshape(-1), vector])
    if case == "loren":
        a, rho = states["curvature"][0].double(), 0.1
        precision = rho * torch.eye(5, dtype=torch.float64) + torch.outer(a, a)
        return torch.cat([(rho * matrix @ precision.inverse()).reshape(-1), vector])
    if case == "conmezo":
        m = states["momentum"][0].double()
        m = torch.cat([m[:30], m[1024:1031]])
        m = m / m.norm()
        return 37 * math.cos(1.2) ** 2 * (m @ g) * m + math.sin(1.2) ** 2 * g
    return g


FIRST_MOMENTS = {
    "mezo": {}, "one-sided": {"two_sided": False}, "rloo": {"weighting": "rloo"}, "rademacher": {"noise": "rademacher"},
    "sparse-mezo": {"mask_interval": 0}, "hizoo": {"hessian_smooth": 0.5}, "lozo": {"step_interval": 10**6},
    "subzero": {"update_interval": 10**6}, "loren": {"beta1": 0.0, "lr_cov": 0.0},
    "conmezo": {"cone_theta": 1.2, "steps": 0},
}  # fmt: skip


@pytest.mark.parametrize("case", FIRST_MOMENTS)
def test_the_mean_of_the_estimate(case):
    toy = Linear()
    name = case if case in methods.available() else "mezo"
    optimizer = toy.optimizer(name, mode="shadow", lr=1.0, n_queries=20, **FIRST_MOMENTS[case])
    if case in ("conmezo", "subzero"):
        optimizer.step(toy)  # it has a momentum or a basis then
    if case == "hizoo":
        optimizer.states["hessian"][0].copy_(torch.linspace(0.2, 3.0, 2048))
    samples = moves(toy, optimizer, 45)
    assert_mean(samples, _expected(case, toy, optimizer))


def test_second_moment_of_one_query():
    """E|g|^2 = (d + 2)|grad|^2."""
    toy = Linear()
    samples = moves(toy, toy.optimizer(mode="shadow", lr=1.0), 600).square().sum(1)
    expected = 39 * flat(toy.gradient).square().sum()
    assert abs(samples.mean() - expected) < 4 * samples.std() / math.sqrt(600) < 0.25 * expected


def test_the_slope_of_a_quadratic_is_exact():
    """Two-sided: z'grad for any eps. One-sided: eps/2 z'Hz more."""
    for eps in (1.0, 0.1):
        toy = Curved()
        one, two = Curved(), toy.optimizer(mode="shadow", lr=0.0, zo_eps=eps)
        z = flat(directions(two, 0).values())
        two.step(toy)
        plus, minus = two.last_losses
        slope = (plus - minus) / (2 * eps)
        gradient = flat(toy.curvature) * flat(toy.model)
        assert slope == pytest.approx((z @ gradient).item(), rel=1e-5 / eps)
        other = one.optimizer(mode="shadow", lr=0.0, zo_eps=eps, two_sided=False)
        other.step(one)
        centre, plus = other.last_losses
        bend = (z * flat(toy.curvature)) @ z
        assert (plus - centre) / eps - slope == pytest.approx((eps / 2 * bend).item(), rel=1e-4)


def test_eight_queries_are_the_average_of_their_estimates():
    toy = Linear()
    optimizer = toy.optimizer(mode="shadow", lr=1.0, n_queries=8)
    start = flat(toy.model)
    optimizer.step(toy)
    losses = optimizer.last_losses
    slopes = [(losses[2 * k] - losses[2 * k + 1]) / 2e-3 for k in range(8)]
    expected = sum(c / 8 * flat(directions(optimizer, 0, k).values()) for k, c in enumerate(slopes))
    assert (start - flat(toy.model) - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("name", ["mezo", "hizoo", "lozo", "subzero", "loren", "sparse-mezo"])
def test_slopes_are_those_of_autograd(name):
    """On a transformer in float64: |c - u'grad| is O(eps^2) two-sided and O(eps) one-sided (loren)."""
    errors = []
    for eps in (0.01, 0.005):
        toy = Transformer()

        def loss(toy=toy):
            weights = {n: p.double() for n, p in toy.model.named_parameters()}
            logits = torch.func.functional_call(toy.model, weights, toy.inputs)
            return nn.functional.cross_entropy(logits.flatten(0, 1), toy.targets.flatten())

        loss().backward()
        gradient = {n: p.grad.double() for n, p in toy.model.named_parameters()}
        start, points = toy.weights(), []

        def closure(toy=toy, loss=loss, points=points):
            points.append(toy.weights())
            return loss()

        fields = {"n_queries": 2} if name == "loren" else {}
        optimizer = toy.optimizer(name, mode="shadow", lr=0.0, zo_eps=eps, **fields)
        optimizer.step(closure)
        first = {"hizoo": 1}.get(name, 0)
        plus, minus = points[first : first + 2]
        width = sum((gradient[n] * (plus[n].double() - minus[n].double())).sum() for n in gradient).item()
        difference = optimizer.last_losses[first] - optimizer.last_losses[first + 1]
        errors.append(abs(difference - width) / eps)
        assert not same(start, plus)
    order = 2.0 if name == "loren" else 4.0
    assert 0.87 * order < errors[0] / errors[1] < 1.13 * order


@pytest.mark.parametrize(
    ("name", "fields", "losses", "reported"),
    [
        ("mezo", {"n_queries": 2}, [1.0, 2.0, 3.0, 6.0], 3.0),
        ("mezo", {"n_queries": 2, "two_sided": False}, [1.0, 2.0, 6.0], 1.0),
        ("mezo", {"n_queries": 3, "weighting": "rloo"}, [1.0, 2.0, 6.0], 3.0),
        ("loren", {"n_queries": 3}, [1.0, 2.0, 6.0], 3.0),
        ("hizoo", {}, [4.0, 1.0, 2.0], 4.0),
        ("mezo-gv", {"gv_weights": "rloo", "gv_m": 3}, [1.0, 2.0, 6.0], 3.0),
        ("mezo-gv", {"gv_m": 3}, [1.0, 2.0, 6.0, 3.0, 5.0], 4.0),
        ("mezo-greedy", {"gv_m": 2}, [6.0, 1.0, 5.0], 3.0),
        ("mezo-svrg", {}, [1.0, 2.0], 1.5),
        ("zo-finetuner", {}, [9.0, 1.0, 2.0], 1.5),
    ],
)
def test_the_loss_that_is_reported(name, fields, losses, reported):
    """The mean over the queries, or that at theta where it is measured."""
    optimizer = Problem().optimizer(name, mode="shadow", **fields)
    assert optimizer.replay(losses) == reported
    if name == "mezo-svrg":
        assert optimizer.replay([1.0, 2.0, 5.0, 7.0]) == 1.5  # at theta, not at the anchor


# Momentum, Adam.


def test_momentum_is_the_sum_over_the_log():
    toy = Problem()
    optimizer = toy.optimizer("mezo-momentum", mode="shadow", beta1=0.8, lr=1e-2)
    slopes = []
    for _ in range(6):
        optimizer.step(toy)
        plus, minus = optimizer.last_losses
        slopes.append((plus - minus) / 2e-3)
    m = optimizer.states["momentum"][0]
    for s in optimizer.arena.segments:
        expected = sum(
            0.2 * 0.8 ** (5 - t) * c * directions(optimizer, t)[s.name].double() for t, c in enumerate(slopes)
        )
        actual = m[s.start : s.start + s.numel].view(s.shape).double()
        assert (actual - expected).norm() < 1e-6 * expected.norm()


def test_adam_with_signs_and_a_constant_slope_averages_signs():
    """c = 1 and z = +-1: the second moment is 1 at every step, so the step is lr times the mean of z."""
    toy = Problem()
    optimizer = toy.optimizer("mezo-adam", mode="shadow", noise="rademacher", lr=1e-2, zo_eps=1e-2, beta1=0.5)
    m = {n: 0.0 for n in toy.weights()}
    for t in range(5):
        before = toy.weights()
        optimizer.replay([1.02, 1.0])
        after = toy.weights()
        for n, z in directions(optimizer, t).items():
            m[n] = 0.5 * m[n] + 0.5 * z.double()
            step = 1e-2 * m[n] / (1 - 0.5 ** (t + 1))
            assert (before[n].double() - after[n].double() - step).abs().max() < 1e-6


def test_recomputed_moments_are_those_of_the_window():
    """Two steps count, and the bias corrections are those of two steps, however many there were."""
    toy = Problem()
    fields = {"moments": "recomputed", "adam_window": 2, "beta1": 0.5, "beta2": 0.5, "lr": 1e-2}
    optimizer = toy.optimizer("mezo-adam", mode="shadow", noise="rademacher", **fields)
    for c in (1.0, -2.0, 3.0, 0.5):
        before = toy.weights()
        optimizer.replay([1 + 2e-3 * c, 1.0])
    last, other = directions(optimizer, 3), directions(optimizer, 2)
    root = math.sqrt(0.5 * (0.5**2 + 0.5 * 3.0**2) / (1 - 0.5**2))
    for n, z in last.items():
        mean = 0.5 * (0.5 * z + 0.5 * 3.0 * other[n]) / (1 - 0.5**2)
        assert (before[n] - toy.weights()[n] - 1e-2 * mean / root).abs().max() < 1e-6


def test_the_largest_moment_only_grows():
    toy = Problem()
    optimizer = toy.optimizer("zo-adamm", mode="shadow", lr=1e-3, beta2=0.5)
    largest = optimizer.states["largest_moment"][0]
    fell = False
    for _ in range(8):
        before, v = largest.clone(), optimizer.states["second_moment"][0].clone()
        optimizer.step(toy)
        now = optimizer.states["second_moment"][0]
        assert (largest >= before).all() and torch.equal(largest, torch.maximum(before, now))
        fell |= bool((now < v).any())
    assert fell
