"""LOZO, SubZero, HiZOO, Sparse-MeZO and LOREN: the structure of their directions, and what they learn."""

import math

import pytest
import torch
from torch import nn
from toys import Curved, Linear, Problem, Transformer, assert_mean, directions, flat

from zoengine import methods, ops
from zoengine.directions import Fold, Noise, Step
from zoengine.methods.spsa import advantages

pytestmark = pytest.mark.usefixtures("one_thread")


# LOZO, SubZero.


def test_lozo_moves_by_rank_r_in_the_columns_of_one_v():
    toy = Problem()
    start = toy.weights()["0.weight"].double()
    optimizer = toy.optimizer("lozo", mode="shadow", lr=1e-1, rank=2, step_interval=3)
    seen = []
    for step in range(6):
        if step == 3:
            start = toy.weights()["0.weight"].double()
        optimizer.step(toy)
        values = torch.linalg.svdvals(toy.weights()["0.weight"].double() - start)
        assert values[2] < 1e-5 * values[0] < values[1]
        seen.append(next(iter(optimizer.transform.right.values())).clone())
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[3], seen[5]) and not torch.equal(seen[2], seen[3])
    segment = optimizer.arena.segments[0]
    drawn = ops.noise_fill((20, 2), Step(3, 3).seed(), offset=segment.index, stream=3)
    assert torch.equal(seen[3].view(20, 2), drawn)


def test_lozo_scales_the_update_and_draws_the_noise_it_is_told():
    moved = []
    for scale in ("none", "1/r"):
        toy = Problem()
        start = toy.weights()["0.weight"]
        optimizer = toy.optimizer("lozo", mode="shadow", rank=4, lr=1e-1, lozo_scale=scale, noise="rademacher")
        optimizer.replay([1.002, 1.0])
        moved.append(toy.weights()["0.weight"] - start)
    assert torch.allclose(moved[0], 4 * moved[1], rtol=0, atol=1e-6)
    (part, *_) = [p for p in optimizer.transform.parts if p.segments]
    assert (optimizer.transform.left(part, Noise(3, 1.0)).abs() == 1).all()


@pytest.mark.parametrize("transport", ["mean", "exact"])
def test_lozo_momentum_is_carried_to_the_new_columns(transport):
    toy = Problem()
    fields = {"rank": 2, "step_interval": 3, "transport": transport, "beta1": 0.75, "lr": 1e-1}
    optimizer = toy.optimizer("lozo-m", mode="shadow", **fields)
    offset = optimizer.arena.segments[0].index
    state = optimizer.states["momentum"][0]
    n, m = torch.zeros(40, 2).double(), {}
    for step in range(8):
        before = toy.weights()
        optimizer.step(toy)
        plus, minus = optimizer.last_losses
        c, seed = (plus - minus) / 2e-3, Step(3, step).seed()
        old, new = (
            ops.noise_fill((20, 2), Step(3, s - s % 3).seed(), offset=offset, stream=3).double()
            for s in (max(step - 1, 0), step)
        )
        if step and step % 3 == 0:
            change = old.T @ new
            n = n @ (change / 20 if transport == "mean" else change @ torch.linalg.inv(new.T @ new))
        n = 0.75 * n + 0.25 * c * ops.noise_fill((40, 2), seed, offset=offset, stream=2).double()
        assert (state.view(40, 2).double() - n).norm() < 1e-5 * n.norm()
        moved = before["0.weight"].double() - toy.weights()["0.weight"].double()
        assert (moved - 1e-1 * n @ new.T).norm() < 1e-4 * moved.norm()
        vector = directions(optimizer, step)["2.weight"].double()
        m = 0.75 * m + 0.25 * c * vector if step else 0.25 * c * vector
        moved = before["2.weight"].double() - toy.weights()["2.weight"].double()
        assert (moved - 1e-1 * m).norm() < 1e-4 * moved.norm() + 1e-6


def test_exact_transport_to_the_same_columns_changes_nothing():
    toy = Problem()
    optimizer = toy.optimizer("lozo-m", mode="shadow", rank=2, step_interval=100)
    optimizer.step(toy)
    before = optimizer.states["momentum"][0].clone()
    optimizer.transform.transport("momentum", Step(3, 0).seed(), exact=True)
    assert torch.allclose(optimizer.states["momentum"][0], before, rtol=1e-5, atol=1e-7)


def test_subzero_bases_are_orthonormal_and_the_update_lies_within():
    toy = Transformer()
    optimizer = toy.optimizer("subzero", mode="shadow", rank=3, update_interval=4, lr=1e-1)
    start = toy.weights()
    for _ in range(4):
        optimizer.step(toy)
    (part, *_) = [p for p in optimizer.transform.parts if p.segments]
    u, v = (optimizer.transform.batches(optimizer.states[f"basis_{k}"][0], part, i) for i, k in enumerate("uv"))
    position = 0
    for left, right in zip(u, v, strict=True):
        for a, b in zip(left.double(), right.double(), strict=True):
            s, position = part.segments[position], position + 1
            for q in (a, b):
                assert (q.T @ q - torch.eye(3)).abs().max() < 1e-5
            moved = toy.weights()[s.name].double() - start[s.name].double()
            assert (moved - a @ a.T @ moved).norm() < 1e-5 * moved.norm()
            assert (moved - moved @ b @ b.T).norm() < 1e-5 * moved.norm()
    assert position == len(part.segments) == 9
    kept = optimizer.states["basis_u"][0].clone()
    optimizer.step(toy)  # the first of the next interval
    assert not torch.equal(kept, optimizer.states["basis_u"][0])


@pytest.mark.parametrize(("name", "factor"), [("subzero", 1), ("lozo", 2), ("mezo", 1)])
def test_the_size_of_a_direction(name, factor):
    """E|P|^2 is m n for subzero as for a dense direction, r m n for lozo."""
    toy = Problem()
    optimizer = toy.optimizer(name, mode="shadow", zo_eps=1.0, lr=0.0, **({"rank": 2} if name != "mezo" else {}))
    if name != "mezo":
        optimizer.fields.__dict__["update_interval" if name == "subzero" else "step_interval"] = 1
    squares, start = [], toy.weights()["0.weight"]

    def closure():
        squares.append((toy.model[0].weight.double() - start.double()).square().sum())
        return 1.0

    for _ in range(400):
        optimizer.step(closure)
    squares = torch.stack(squares[::2])
    assert abs(squares.mean() - factor * 800) < 4 * squares.std() / 20 < 0.3 * factor * 800


def test_lora_factors_are_reshaped_to_their_most_square_form():
    model = nn.ModuleDict({"lora_A": nn.Linear(48, 4, bias=False), "plain": nn.Linear(64, 8, bias=False)})
    optimizer = methods.create("subzero", model, lr=1e-3, rank=8)
    (part,) = optimizer.transform.parts
    shapes = {s.name: shape for s, shape in zip(part.segments, part.shapes, strict=True)}
    assert shapes == {"lora_A.weight": (16, 12), "plain.weight": (8, 64)}


# HiZOO.


@pytest.mark.parametrize("centre", [True, False])
def test_hizoo_learns_the_curvature(centre):
    """The centred estimate has mean diag(G); the other tr(G / h) h / 2 more."""
    toy, a = Curved((2, 2), (2,)), 0.05
    optimizer = toy.optimizer(
        "hizoo", mode="shadow", lr=0.0, zo_eps=0.1, n_queries=32, hessian_smooth=a, hess_center=centre, h_min=1e-9
    )  # fmt: skip
    h = torch.linspace(0.5, 2.0, 2048)
    estimates = []
    for _ in range(60):
        optimizer.states["hessian"][0].copy_(h)
        optimizer.step(toy)
        new = optimizer.states["hessian"][0]
        estimates.append((new.double() - (1 - a) * h.double()) / a)
    estimates = torch.stack(estimates)
    estimates = torch.cat([estimates[:, :4], estimates[:, 1024:1026]], 1)
    h = torch.cat([h[:4], h[1024:1026]]).double()
    curvature = flat(toy.curvature)
    expected = curvature + (0.0 if centre else 0.5 * (curvature / h).sum() * h)
    assert_mean(estimates, expected)


@pytest.mark.parametrize(("centre", "least"), [(True, 0.3), (False, 0.25)])
def test_hizoo_keeps_the_centred_curvature_above_its_floor(centre, least):
    optimizer = Problem().optimizer("hizoo", hessian_smooth=0.5, hess_center=centre, h_min=0.3)
    optimizer.states["hessian"][0].fill_(0.5)
    optimizer.replay([1.0, 1.0, 1.0])
    assert torch.allclose(optimizer.states["hessian"][0], torch.tensor(least))


def test_hizoo_steps_with_the_old_curvature_or_the_new():
    for order in ("step_then_hess", "hess_then_step"):
        toy = Problem()
        optimizer = toy.optimizer("hizoo", mode="shadow", lr=1e-2, hessian_smooth=0.3, hizoo_order=order)
        optimizer.states["hessian"][0].fill_(4.0)
        before = toy.weights()
        optimizer.replay([1.0, 1.004, 1.001])
        c, curve = 0.003 / 2e-3, 0.3 * 0.005 / 2e-6
        for n, z in directions(optimizer, 0).items():
            z = z.double()
            new = 0.7 * 4 + curve * 4 * z**2
            root = 2.0 if order == "step_then_hess" else new.sqrt()
            moved = before[n].double() - toy.weights()[n].double()
            assert (moved - 1e-2 * c * z / root).abs().max() < 1e-6


# Sparse-MeZO.


def test_masked_weights_never_move_and_their_set_only_grows():
    toy = Problem()
    optimizer = toy.optimizer("sparse-mezo", mode="shadow", lr=3e-2, sparsity=0.75, mask_interval=1, weight_decay=0.1)
    start = toy.weights()["0.weight"]
    tau = start.abs().flatten().sort().values[199]  # the 200th of 800
    assert optimizer.states["thresholds"][0][0] == tau
    masked, sizes = start.abs() > tau, []
    assert masked.sum() == 600
    for _ in range(12):
        held = toy.weights()["0.weight"]
        optimizer.step(toy)
        now = toy.weights()["0.weight"]
        assert torch.equal(now[masked], held[masked])
        grown = now.abs() > tau
        assert (grown | ~masked).all()
        masked = grown
        sizes.append(int(masked.sum()))
    assert sizes[-1] > 600
    assert not torch.equal(toy.weights()["2.weight"], Problem().weights()["2.weight"])


@pytest.mark.parametrize("mode", ["inplace", "shadow"])
def test_the_mask_is_that_of_the_weights_and_not_of_the_query(mode):
    """With a perturbation far above the weights, both queries still differ from theta in the same elements."""
    toy = Problem()
    optimizer = toy.optimizer("sparse-mezo", mode=mode, lr=0.0, zo_eps=10.0, mask_interval=1)
    start, changed = toy.weights()["0.weight"], []

    def closure():
        changed.append((toy.model[0].weight - start).abs() > 1e-3)
        return 1.0

    for _ in range(3):
        optimizer.step(closure)
        assert torch.equal(changed[-1], changed[-2]) and 0 < changed[-1].sum() < 800
        optimizer.arena.buffers[0][:800] = start.flatten()  # inplace drifts by rounding


def test_the_mask_is_taken_every_interval():
    toy, taken = Problem(), []
    optimizer = toy.optimizer("sparse-mezo", mask_interval=3)
    optimizer.transform.refresh = lambda: taken.append(optimizer.step_number)
    for _ in range(7):
        optimizer.replay([1.0, 1.0])
    assert taken == [0, 3, 6]


def test_loaded_thresholds_are_those_of_the_mask():
    """In weights of another size than those the thresholds were taken from."""
    saved, loaded = Problem(), Problem()
    for parameter in loaded.model.parameters():
        parameter.data.mul_(2.0)
    one, two = saved.optimizer("sparse-mezo", mask_interval=1), loaded.optimizer("sparse-mezo", mask_interval=1)
    two.load_state_dict(one.state_dict())
    two.transform.refresh()
    s = one.arena.segments[0]
    below = (loaded.weights()[s.name].abs() <= one.states["thresholds"][0][0]).flatten()
    i = torch.arange(s.numel)
    assert torch.equal(two.transform.bits[0][i >> 3].long() >> (i & 7) & 1, below.long())


def test_adapters_are_not_masked():
    model = nn.ModuleDict({"lora_A": nn.Linear(64, 16, bias=False), "plain": nn.Linear(64, 16, bias=False)})
    optimizer = methods.create("sparse-mezo", model, lr=1e-3, sparsity=0.5)
    adapter, plain = optimizer.transform.bits[0].split(128)
    assert (adapter == 255).all() and not (plain == 255).all()


# LOREN.


def test_loren_starts_from_normals_of_the_run_seed():
    optimizer = Linear().optimizer("loren", seed=11)
    drawn = ops.noise_fill((5,), Step(11, 0).seed(), offset=optimizer.arena.segments[0].index, stream=5)
    assert torch.equal(optimizer.states["curvature"][0], drawn)


def test_loren_learns_by_the_score():
    """a moves along the gradient of the log density, by autograd in float64; the root is the positive definite one."""
    toy, rho = Linear(), 0.3
    optimizer = toy.optimizer("loren", mode="shadow", damping=rho, n_queries=2)
    a = optimizer.states["curvature"][0].double()
    weights = {11: 0.7, 12: -1.3}
    optimizer.transform.fold(Fold("momentum", 0.0, [Noise(s, w) for s, w in weights.items()]))
    variable = a.clone().requires_grad_(True)
    precision = rho * torch.eye(5, dtype=torch.float64) + torch.outer(variable, variable)
    values, vectors = torch.linalg.eigh(precision.detach().inverse())
    root = vectors @ values.sqrt().diag() @ vectors.T
    density, momentum = 0.0, 0.0
    for seed, weight in weights.items():
        w = ops.noise_fill((6, 5), seed, offset=0).double() @ root
        density = density + weight * (3 * torch.logdet(precision) - 0.5 * torch.einsum("ij,jk,ik->", w, precision, w))
        momentum = momentum + weight * math.sqrt(rho) * w
    density.backward()
    assert (optimizer.states["momentum"][0][:30].view(6, 5).double() - momentum).norm() < 1e-5 * momentum.norm()
    optimizer.transform.learn(0.1)
    expected = -0.1 * math.sqrt(rho) * variable.grad
    assert (optimizer.states["curvature"][0].double() - a - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("adv", ["rloo", "standardised"])
def test_loren_weighs_the_score_by_the_advantages(adv):
    toy = Linear()
    optimizer = toy.optimizer("loren", mode="shadow", n_queries=3, lr_cov=0.01, zo_eps=1e-2, loren_adv_a=adv)
    twin = Linear().optimizer("loren", mode="shadow", n_queries=3)
    losses = [1.0, 1.3, 0.9]
    shift = [loss - sum(losses) / 3 for loss in losses]
    spread = math.sqrt(sum(s * s for s in shift) / 3) if adv == "standardised" else 1.0
    twin.transform.fold(Fold("momentum", 0.0, [Noise(Step(3, 0).seed(k), s / 2 / spread) for k, s in enumerate(shift)]))
    twin.transform.learn(0.01)
    before = optimizer.states["curvature"][0].clone()
    optimizer.replay(losses)
    assert not torch.equal(before, optimizer.states["curvature"][0])
    assert torch.allclose(optimizer.states["curvature"][0], twin.states["curvature"][0], rtol=1e-5, atol=1e-6)


def test_loren_momentum_is_heavy_ball_and_vectors_have_none():
    toy = Linear()
    optimizer = toy.optimizer("loren", mode="shadow", n_queries=3, beta1=0.5, lr=1e-2, lr_cov=0.0)
    twin = Linear().optimizer("loren", mode="shadow", n_queries=3, beta1=0.0, lr=1e-2, lr_cov=0.0)
    matrix = 0.0
    for _ in range(4):
        start, other = flat(toy.model), flat(twin.arena.parameters)
        optimizer.step(toy)
        twin.replay(optimizer.last_losses)
        moved, plain = start - flat(toy.model), other - flat(twin.arena.parameters)
        matrix = 0.5 * matrix + plain[:30]
        assert (moved[:30] - matrix).norm() < 1e-4 * matrix.norm()
        assert (moved[30:] - plain[30:]).norm() < 1e-4 * plain[30:].norm()


def test_advantages():
    losses = [0.3, 0.7, 0.1, 0.4]
    weights = advantages(losses, 1e-3)
    assert abs(sum(weights)) < 1e-9
    assert advantages([x + 8 for x in losses], 1e-3) == pytest.approx(weights, abs=1e-9)
    others = [(x - (sum(losses) - x) / 3) / (4 * 1e-3) for x in losses]  # each against the mean of the others
    assert weights == pytest.approx(others)
    assert advantages([0.5, 0.2], 0.1) == pytest.approx([1.5, -1.5])
    fitness = advantages(losses, 1e-3, fitness=True)
    assert fitness == pytest.approx(advantages([10 * x + 3 for x in losses], 7.0, fitness=True))
    assert sum(f * f for f in fitness) == pytest.approx(1 / 4)
    assert advantages([2.0, 2.0], 1e-3, fitness=True) == [0.0, 0.0]
