"""ZO-AdaMU, ZO-signSGD and MeZO-SVRG: formulas, bounds, what is removed and what is not."""

import math

import pytest
import torch
from toys import Curved, Linear, Problem, assert_mean, directions, flat, same

from zoengine import ops
from zoengine.directions import Step
from zoengine.methods.zo_adamu import AdaMUFields, annealed, coefficients

pytestmark = pytest.mark.usefixtures("one_thread")


# ZO-AdaMU, sign.


def test_adamu_is_its_formula_and_within_its_bound():
    toy = Problem()
    optimizer = toy.optimizer("zo-adamu", mode="shadow", lr=1e-2, adamu_alpha=0.3, adamu_b1=0.7, adamu_b2=0.1)
    bound = math.sqrt(0.7**2 / 0.1 + 0.3**2 / 0.9)
    h = {s.name: torch.zeros(s.shape, dtype=torch.float64) for s in optimizer.arena.segments}
    for t, (plus, minus) in enumerate([(1.002, 1.0), (1.0, 1.004), (1.003, 1.0)]):
        c, before, points = (plus - minus) / 2e-3, toy.weights(), []

        def closure(points=points, losses=(plus, minus)):
            points.append(toy.weights())
            return losses[len(points) - 1]

        optimizer.step(closure)
        seed = Step(3, t).seed()
        for s in optimizer.arena.segments:
            z1, z2 = (ops.noise_fill(s.shape, seed, offset=s.index, stream=k).double() for k in (0, 1))
            p, q = math.sqrt(0.3) * z1, h[s.name] + math.sqrt(0.7) * z2
            m, v = 0.7 * p + 0.3 * q, 0.1 * p**2 + 0.9 * q**2
            assert (points[0][s.name] - points[1][s.name] - 2e-3 * m).abs().max() < 1e-6
            u = m / (v + 1e-8).sqrt()
            assert u.abs().max() <= bound
            moved = before[s.name].double() - toy.weights()[s.name].double()
            assert (moved - 1e-2 * c * u).abs().max() < 1e-5 * abs(c)
            h[s.name] = math.copysign(1.0, c) * m


def test_adamu_with_fresh_noise_alone_steps_by_the_slope_along_signs():
    toy = Problem()
    before = toy.weights()
    optimizer = toy.optimizer("zo-adamu", mode="shadow", lr=1e-2, adamu_alpha=1.0, adamu_b1=1.0, adamu_b2=1.0)
    optimizer.replay([1.006, 1.0])
    for n, z in directions(optimizer, 0).items():
        moved, large = before[n].double() - toy.weights()[n].double(), z.abs() > 3e-3
        assert (moved - 1e-2 * 3.0 * z.sign())[large].abs().max() < 1e-3 * 3e-2


def test_adamu_schedule():
    """1 for a tenth of the run, a cosine, a plateau from 0.8 on, 0.05 at least; by the slope, as the speed says."""
    assert [annealed(t, 1000, 1.0) for t in (0, 99, 100)] == [1.0, 1.0, 1.0]
    assert annealed(350, 1000, 1.0) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.25)))
    assert annealed(800, 1000, 1.0) == annealed(999, 1000, 1.0) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.7)))
    assert annealed(999, 1000, 1.5) == 0.05
    assert annealed(999, 1000, 0.1) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.07)))
    assert annealed(1023, 10**6, 1.0) == 1.0 and annealed(2000, 10**6, 1.0) < 1.0
    fields = AdaMUFields(lr=1e-3, adamu_schedule="anneal", steps=1000)
    assert coefficients(fields, 500) == tuple(annealed(500, 1000, speed) for speed in (1.0, 0.1, 1.5))


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_sign_steps_have_one_length_and_one_pattern(noise):
    patterns = []
    for sign_mode in ("elementwise", "scalar"):
        toy = Linear()
        start = flat(toy.model)
        optimizer = toy.optimizer("zo-signsgd", mode="shadow", lr=2.0**-6, sign_mode=sign_mode, noise=noise)
        optimizer.step(toy)
        moved = (start - flat(toy.model)) * 64
        patterns.append(moved.sign())
        if sign_mode == "elementwise":
            assert (moved.abs() - 1).abs().max() < 1e-5
        z = flat(directions(optimizer, 0).values())
        slope = (z @ flat(toy.gradient)).sign()
        assert torch.equal(moved.sign(), (slope * z).sign())
        here = toy.weights()
        optimizer.replay([1.0, 1.0])
        assert same(here, toy.weights())  # sign(0) = 0
    assert torch.equal(*patterns)


def test_scalar_signs_count_every_query():
    toy = Linear()
    start = flat(toy.model)
    optimizer = toy.optimizer("zo-signsgd", mode="shadow", lr=1e-2, sign_mode="scalar", n_queries=3)
    optimizer.replay([1.0, 2.0, 5.0, 1.0, 1.0, 1.0])
    z = [flat(directions(optimizer, 0, k).values()) for k in range(3)]
    assert torch.allclose(start - flat(toy.model), 1e-2 / 3 * (-z[0] + z[1]), rtol=0, atol=1e-6)


# MeZO-SVRG.


def test_at_the_anchor_the_correction_is_nothing():
    toy = Problem()
    optimizer = toy.optimizer("mezo-svrg", mode="shadow", lr=1e-2, lr_full=0.0, svrg_q=3, n_queries=2)
    optimizer.step(toy)
    full = [(a - b) / 2e-3 / 2 for a, b in zip(optimizer.last_losses[::2], optimizer.last_losses[1::2], strict=True)]
    before = toy.weights()
    optimizer.step(lambda: (toy.model(toy.x[:4]) - toy.y[:4]).square().mean())
    losses = optimizer.last_losses
    assert losses[:4] == losses[4:]
    for n in directions(optimizer, 0):
        g = sum(c * directions(optimizer, 0, k)[n].double() for k, c in enumerate(full))
        moved = before[n].double() - toy.weights()[n].double()
        assert (moved - 1e-2 * g).abs().max() < 1e-6


def test_the_anchor_removes_the_noise_of_minibatches():
    """Two data points with different minima: the spread given the full gradient falls with the distance, squared."""
    spreads = {}
    for distance_ in (0.1, 0.01):
        toy = Curved()
        d = 37
        targets = torch.randn(2, d, generator=torch.Generator().manual_seed(8)).double()
        curvature = torch.rand(2, d, generator=torch.Generator().manual_seed(9)).double() + 0.5

        def loss(k, toy=toy, curvature=curvature, targets=targets):
            return 0.5 * (curvature[k] * (flat(toy.model) - targets[k]) ** 2).sum()

        optimizer = toy.optimizer("mezo-svrg", mode="shadow", lr=1.0, lr_full=0.0, svrg_q=10**6, zo_eps=0.1)
        optimizer.full_closure = lambda loss=loss: (loss(0) + loss(1)) / 2
        optimizer.step(lambda: None)
        offset = torch.randn(d, generator=torch.Generator().manual_seed(1))
        offset *= distance_ / offset.norm()
        buffer = optimizer.arena.buffers[0]
        buffer[:30] += offset[:30]
        buffer[1024:1031] += offset[30:]
        theta, found = buffer.clone(), []
        for k in range(200):
            start = flat(toy.model)
            optimizer.step(lambda k=k, loss=loss: loss(k % 2))
            found.append(start - flat(toy.model))
            buffer.copy_(theta)
        spreads[distance_] = torch.stack(found).var(0).sum().item()
    assert 80 < spreads[0.1] / spreads[0.01] < 125


def test_svrg_unbiased_over_fresh_full_directions():
    toy = Curved()
    optimizer = toy.optimizer("mezo-svrg", mode="shadow", lr=1.0, lr_full=0.0, svrg_q=2, zo_eps=0.1, n_queries=16)
    gradient = flat(toy.curvature) * flat(toy.model)
    theta, found = [b.clone() for b in optimizer.arena.buffers], []
    for _ in range(60):
        optimizer.step(toy)
        start = flat(toy.model)
        optimizer.step(toy)
        found.append(start - flat(toy.model))
        for buffer, value in zip(optimizer.arena.buffers, theta, strict=True):
            buffer.copy_(value)
    assert_mean(torch.stack(found), gradient)


def test_svrg_divides_its_rates_when_an_epoch_is_worse():
    toy = Linear()
    fields = {"lr": 1e-3, "lr_full": 1e-2, "svrg_q": 1000, "lr_anneal": 5.0, "anneal_epoch": 2}
    optimizer = toy.optimizer("mezo-svrg", mode="shadow", **fields)
    optimizer.full_closure = lambda: 1.0
    optimizer.step(lambda: 1.0)

    def epochs(*values):
        for value in values:
            for _ in range(2):
                optimizer.step(lambda value=value: value)
        return optimizer.memory["divided"]

    assert epochs(1.0, 1.0, 1.04) == 1.0
    assert epochs(1.06) == 5.0  # above 1.05 times that of two epochs before
    assert epochs(1.06) == 5.0  # against 1.04
    assert epochs(2.0) == 25.0
    full, mini = optimizer._rates()
    assert full * 1e-3 == pytest.approx(1e-2 / 25) and mini * 1e-3 == pytest.approx(1e-3 / 25)
    optimizer.memory["divided"] = 1e9
    assert [rate * 1e-3 for rate in optimizer._rates()] == pytest.approx([1e-5, 1e-6])


def test_the_forwards_of_a_loss_over_all_the_data_are_counted():
    toy = Problem()
    optimizer = toy.optimizer("mezo-svrg", svrg_q=2)
    optimizer.full_closure = lambda: toy()
    optimizer.full_closure.forwards = 5
    optimizer.step(toy)
    assert optimizer.forward_passes == 10
    optimizer.step(toy)
    assert optimizer.forward_passes == 14


def test_the_anchor_is_where_the_full_gradient_was_measured():
    """Neither a query nor what the step over all the data leads to."""
    toy = Problem()
    optimizer = toy.optimizer("mezo-svrg", mode="inplace", lr_full=1e-2, zo_eps=1e-1)
    before = toy.weights()
    optimizer.step(toy)
    for s in optimizer.arena.segments:
        anchor = optimizer.copies["anchor"][s.buffer][s.start : s.start + s.numel].view(s.shape)
        assert (anchor - before[s.name]).abs().max() < 1e-6
        assert (toy.weights()[s.name] - before[s.name]).abs().max() > 1e-4
