"""ConMeZO, MeZO-GV and MeZO-Greedy, and the fields that every method refuses."""

import math

import pytest
import torch
from torch import nn
from toys import Linear, Problem, Quadratic, directions, distance, flat, same

from zoengine import ArenaError, FieldError, methods
from zoengine.directions import Fold, Noise
from zoengine.methods.conmezo import ConMeZOFields, momentum_beta
from zoengine.methods.mezo_gv import guide

pytestmark = pytest.mark.usefixtures("one_thread")


# ConMeZO.


def test_cone_schedule():
    fields = ConMeZOFields(lr=1e-3, steps=20_000)
    table = {0: 0.1, 200: 0.1, 300: 0.208, 500: 0.601, 1000: 0.952, 1500: 0.985, 2000: 0.989, 2001: 0.99, 19_999: 0.99}
    for step, beta in table.items():
        assert momentum_beta(step, fields) == pytest.approx(beta, abs=5e-4), step
    assert momentum_beta(2000, fields) == pytest.approx(0.99 - 0.89 / 729, abs=1e-12)
    assert momentum_beta(0, ConMeZOFields(lr=1e-3)) == 0.99
    halved = ConMeZOFields(lr=1e-3, steps=10_000)
    assert momentum_beta(250, halved) == momentum_beta(500, fields)
    assert momentum_beta(0, ConMeZOFields(lr=1e-3, steps=1000, cone_beta=0.05)) == 0.05  # warm-up only raises it


def test_the_cone_waits_for_a_momentum():
    """While every slope was 0 there is none, and the direction is z itself; the first step folds with 0.1."""
    toy = Linear()
    optimizer = toy.optimizer("conmezo", mode="shadow", steps=20)
    optimizer.replay([1.0, 1.0])
    assert optimizer._direction(5) == [Noise(5, 1.0)]
    optimizer.memory["started"] = True
    optimizer.replay([1.0, 1.0])  # and a momentum of norm 0 adds nothing
    assert all(buffer.isfinite().all() for buffer in optimizer.arena.buffers)
    other = Linear().optimizer("conmezo", mode="shadow", steps=20)
    other.replay([1.002, 1.0])
    z = directions(other, 0)["0"].double().reshape(-1)
    assert torch.allclose(other.states["momentum"][0][:30].double(), 0.9 * z, rtol=1e-5)
    assert other.memory["started"] and len(other._direction(5)) == 2


@pytest.mark.parametrize("toy", [Problem, Quadratic])
def test_the_cone_is_around_the_momentum(toy):
    """Query, update and fold written out in float64, with the norm over all parameters and none of the padding."""
    toy = toy()
    if isinstance(toy, Quadratic):
        toy.model[1] = nn.Parameter(toy.model[1].detach().to(torch.bfloat16))  # a second buffer
    theta, eps = 1.2, 2.0**-6
    fields = {"cone_theta": theta, "cone_beta": 0.6, "steps": 0, "lr": 1e-3, "zo_eps": eps, "weight_decay": 0.1}
    optimizer = toy.optimizer("conmezo", mode="shadow", **fields)
    d, m = optimizer.arena.numel, None
    for step in range(4):
        z = flat(directions(optimizer, step).values())
        u = z if m is None else math.sin(theta) * z + math.sqrt(d) * math.cos(theta) * m / m.norm()
        points = []

        def closure(points=points):
            points.append(flat(optimizer.arena.parameters))
            return toy()

        optimizer.step(closure)
        asked = (points[0] - points[1]) / (2 * eps)
        exact = torch.cat([torch.full((s.numel,), p.dtype == torch.float32) for s, p in _segments(optimizer)])
        assert (asked - u)[exact].abs().max() < 1e-4
        plus, minus = optimizer.last_losses
        c = (plus - minus) / (2 * eps)
        m = 0.4 * c * u + (0.0 if m is None else 0.6 * m)
        state = torch.cat(
            [optimizer.states["momentum"][s.buffer][s.start : s.start + s.numel] for s, _ in _segments(optimizer)]
        )
        assert (state.double() - m).norm() < 1e-5 * m.norm()
        square = optimizer._states.squares["momentum"].item()
        assert square == pytest.approx(state.double().square().sum().item(), rel=1e-12)


def _segments(optimizer):
    return list(zip(optimizer.arena.segments, optimizer.arena.parameters, strict=True))


def test_the_norm_counts_no_padding_of_a_matrix_longer_than_a_tile():
    optimizer = Linear((40, 30), (7,)).optimizer("conmezo", mode="shadow")
    optimizer.replay([1.002, 1.0])
    (state,) = optimizer.states["momentum"]
    m = torch.cat([state[s.start : s.start + s.numel] for s in optimizer.arena.segments]).double()
    assert optimizer._states.squares["momentum"].item() == pytest.approx(m.square().sum().item(), rel=1e-12)


def test_directions_of_the_cone_have_the_size_of_normals():
    toy = Linear()
    optimizer = toy.optimizer("conmezo", mode="shadow", lr=0.0, zo_eps=1.0, cone_theta=1.2, cone_beta=0.9, steps=0)
    start, squares = flat(toy.model), []

    def closure():
        squares.append((flat(toy.model) - start).square().sum())
        return toy()

    for _ in range(600):
        optimizer.step(closure)
    squares = torch.stack(squares[2::2])
    assert abs(squares.mean() - 37) < 4 * squares.std() / math.sqrt(len(squares)) < 5


def test_a_closed_cone_is_a_line_search_along_the_momentum():
    toy = Linear()
    optimizer = toy.optimizer("conmezo", mode="shadow", lr=1e-3, cone_theta=0.0, cone_beta=0.9, steps=0)
    first = flat(directions(optimizer, 0).values())
    optimizer.step(toy)
    for _ in range(3):
        before = flat(toy.model)
        optimizer.step(toy)
        moved = before - flat(toy.model)
        cosine = moved @ first / (moved.norm() * first.norm())
        assert abs(abs(cosine) - 1) < 1e-6 and moved.norm() > 1e-4


def test_the_length_of_the_momentum_does_not_matter_for_the_next_move():
    results = []
    for factor in (1.0, 8.0):
        toy = Problem()
        optimizer = toy.optimizer("conmezo", mode="shadow", lr=1e-2)
        optimizer.step(toy)
        optimizer.states["momentum"][0].mul_(factor)
        optimizer._states.squares["momentum"].mul_(factor**2)
        optimizer.step(toy)
        results.append(toy.weights())
    assert same(*results)


# Candidates.


def test_guide_ranks():
    assert guide([3.0, 1.0, 2.0, 4.0], 2, False) == [-0.5, 0.5, 0.5, -0.5]
    assert guide([1.0, 1.0, 1.0, 0.0], 2, False) == [0.5, -0.5, -0.5, 0.5]  # ties: the lower index is elite
    assert guide([5.0, 4.0, 3.0], 1, False) == [-0.5, -0.5, 1.0]
    for m, elite in ((4, 2), (12, 6), (5, 1)):
        losses = [math.sin(k) for k in range(m)]
        assert abs(sum(guide(losses, elite, False))) < 1e-12
        assert sum(w * w for w in guide(losses, elite, True)) == pytest.approx(1.0)
        assert sum(w * w for w in guide(losses, elite, False)) == pytest.approx(1 / elite + 1 / (m - elite))


def test_gv_moves_along_the_guide():
    toy = Linear()
    start = flat(toy.model)
    optimizer = toy.optimizer("mezo-gv", mode="shadow", lr=1e-2, gv_m=5, gv_alpha=0.5)
    optimizer.replay([3.0, 1.0, 2.0, 5.0, 4.0, 1.004, 1.0])
    z = [flat(directions(optimizer, 0, k).values()) for k in range(5)]
    v = (z[1] + z[2]) / 2 - (z[0] + z[3] + z[4]) / 3
    assert (start - flat(toy.model) - 1e-2 * 2.0 * v).abs().max() < 1e-6


def test_reversed_ranks_give_the_same_move_if_half_are_elite():
    results = []
    for losses in ([3.0, 1.0, 2.0, 5.0, 1.5, 1.0], [-3.0, -1.0, -2.0, -5.0, 1.0, 1.5]):
        toy = Problem()
        toy.optimizer("mezo-gv", mode="shadow", lr=1e-2, gv_m=4).replay(losses)
        results.append(toy.weights())
    assert same(*results)


def test_the_best_seed_is_carried_over():
    toy = Linear()
    optimizer = toy.optimizer("mezo-gv", mode="shadow", gv_history=True, lr=1e-2)
    z = {(t, k): flat(directions(optimizer, t, k).values()) for t in range(4) for k in range(2)}
    best = (0, 1)
    for t, (old, new) in enumerate([(1.0, 2.0), (1.0, 2.0), (2.0, 1.0), (5.0, 6.0)]):
        start = flat(toy.model)
        optimizer.replay([old, new, 1.002, 1.0])
        v = (z[best] - z[t, 0]) * (1 if old < new else -1)
        assert (start - flat(toy.model) - 1e-2 * v).abs().max() < 1e-6
        best = best if old < new else (t, 0)
        assert optimizer.memory["best"] == list(best)


def test_greedy_takes_the_lowest_candidate_and_its_loss():
    toy = Linear()
    start = flat(toy.model)
    optimizer = toy.optimizer("mezo-greedy", mode="shadow", lr=1e-2, gv_m=4)
    points = []

    def closure():
        points.append(flat(toy.model))
        return [3.0, 1.0, 2.0, 1.0, 5.0][len(points) - 1]

    optimizer.step(closure)
    z = flat(directions(optimizer, 0, 1).values())
    assert (points[4] - start + 1e-3 * z).abs().max() < 1e-6
    assert (start - flat(toy.model) - 1e-2 * (1.0 - 5.0) / 2e-3 * z).abs().max() < 1e-4


# Refused before any forward.


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("loren", {"n_queries": 1}, "n_queries must be at least 2: a query's baseline is the mean of the others"),
        ("loren", {"two_sided": True}, "two_sided must be false"),
        ("loren", {"damping": 0.0}, "damping must be greater than 0"),
        ("mezo", {"weighting": "rloo"}, "at least 2 with weighting=rloo"),
        ("mezo-gv", {"gv_m": 2}, "at least 3: with 2 candidates the guide is .* the step is MeZO's at twice the cost"),
        ("subzero-gv", {"gv_m": 2}, "at least 3"),
        ("mezo-gv", {"gv_m": 3, "gv_alpha": 0.2}, "at least one candidate"),
        ("mezo-gv", {"gv_alpha": 1.0}, r"gv_alpha must be in \(0, 1\)"),
        ("mezo-gv", {"gv_weights": "rloo", "gv_m": 1}, "gv_m must be at least 2"),
        ("mezo-greedy", {"gv_m": 0}, "gv_m must be at least 1"),
        ("subzero-greedy", {"gv_m": 0}, "gv_m must be at least 1"),
        ("mezo-momentum", {"beta1": 1.0}, r"beta1 must be in \[0, 1\)"),
        ("mezo-momentum", {"beta1": -0.1}, r"beta1 must be in \[0, 1\)"),
        ("lozo-m", {"beta1": 1.0}, r"beta1 must be in \[0, 1\)"),
        ("loren", {"beta1": 1.0}, r"beta1 must be in \[0, 1\)"),
        ("mezo-adam", {"beta1": 1.0}, r"beta1 must be in \[0, 1\)"),
        ("mezo-adam", {"beta2": 1.0}, r"beta2 must be in \[0, 1\)"),
        ("zo-adamm", {"beta2": -0.5}, r"beta2 must be in \[0, 1\)"),
        ("mezo-adam", {"moments": "recomputed", "n_queries": 2}, "use moments=stored"),
        ("mezo-adam", {"moments": "recomputed", "adam_window": 0}, "adam_window must be at least 1"),
        ("conmezo", {"cone_theta": 1.6}, r"cone_theta must be in \[0, pi/2\]"),
        ("conmezo", {"cone_theta": -0.1}, r"cone_theta must be in \[0, pi/2\]"),
        ("conmezo", {"cone_beta": 1.0}, r"cone_beta must be in \[0, 1\)"),
        ("zo-adamu", {"adamu_alpha": 0.0}, r"adamu_alpha must be in \(0, 1\]"),
        ("zo-adamu", {"adamu_schedule": "anneal"}, "steps must be the number of steps of the run"),
        ("hizoo", {"hess_center": True, "noise": "rademacher"}, "z\\^2 - 1 is 0 for rademacher noise"),
        ("hizoo", {"hessian_smooth": 1.0}, r"hessian_smooth must be in \[0, 1\)"),
        ("sparse-mezo", {"sparsity": 1.0}, r"sparsity must be in \[0, 1\)"),
        ("mezo-svrg", {"lr": 0.0, "lr_full": 1e-3}, "greater than 0 unless lr_full is 0 too"),
        ("mezo-svrg", {"lr_anneal": 1.5}, "anneal_epoch must be the steps of an epoch"),
        ("lozo", {"rank": 0}, "rank must be at least 1"),
        ("lozo", {"step_interval": 0}, "step_interval must be at least 1"),
        ("subzero", {"update_interval": 0}, "update_interval must be at least 1"),
    ],
)
def test_fields_that_make_no_sense_are_refused(name, fields, message):
    with pytest.raises(FieldError, match=message):
        Problem().optimizer(name, **fields)


@pytest.mark.parametrize("name", ["lozo", "lozo-m", "subzero", "subzero-gv", "subzero-greedy"])
def test_a_rank_above_every_matrix_is_refused(name):
    with pytest.raises(ArenaError, match=r"rank 21 is above min\(m, n\) of every matrix; choose rank <= 20"):
        Problem().optimizer(name, rank=21)
    with pytest.raises(ArenaError, match="all trainable parameters are vectors"):
        methods.create(name, nn.LayerNorm(5), lr=1e-3)


def test_svrg_without_all_the_data_stops_before_the_first_forward():
    toy = Problem()
    optimizer = toy.optimizer("mezo-svrg")
    optimizer.full_closure = None
    with pytest.raises(TypeError, match=r"set optimizer\.full_closure"):
        optimizer.step(lambda: pytest.fail("a forward"))
    assert distance(toy.weights(), Problem().weights()) == 0


def test_directions_that_are_not_plain_cannot_be_folded():
    """The pass of a fold draws z itself."""
    toy = Problem()
    optimizer = toy.optimizer("sparse-mezo")
    optimizer.states["extra"] = optimizer.transform.new_state()
    with pytest.raises(ValueError, match="Masked cannot fold"):
        optimizer.transform.fold(Fold("extra", 0.0, [Noise(1, 1.0)]))
