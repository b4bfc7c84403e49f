"""The methods rozo and rozo-m: steps against matrices written out, limits in which they are MeZO, saving with peft."""

import dataclasses
import json
import logging
import math

import pytest
import torch
from torch import nn

from zoengine import FieldError, ops
from zoengine.methods.mezo import MeZO
from zoengine.methods.mezo_momentum import MeZOMomentum
from zoengine.methods.rozo import RoZO, RoZOMomentum
from zoengine.noise.seeds import query_seeds
from zoengine.rozo import AdapterError, Point, TrustRegion

PLAIN = {"rozo_sampling": "factor", "rozo_retract": "factor", "rozo_precond": "none", "rozo_offset": False}
SPECIES = (RoZO, RoZOMomentum)

pytestmark = pytest.mark.usefixtures("one_thread")


class LoRALinear(nn.Module):
    """y = (W0 + s B A) x with peft's names."""

    def __init__(self, n, m, rank, generator):
        super().__init__()
        self.base_layer = nn.Parameter(torch.randn(m, n, generator=generator) * 0.3, requires_grad=False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(n, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, m, bias=False)})
        with torch.no_grad():
            self.lora_A["default"].weight.copy_(torch.randn(rank, n, generator=generator))
            self.lora_B["default"].weight.zero_()

    def delta(self):
        return 2.0 * self.lora_B["default"].weight @ self.lora_A["default"].weight

    def forward(self, x):
        return x @ (self.base_layer + self.delta()).T


class Problem:
    """Three adapted layers, two of one shape, and a regression that only low-rank changes of the weights solve."""

    def __init__(self, rank=4, trained=False):
        generator = torch.Generator().manual_seed(5)
        sizes = ((16, 20), (20, 20), (20, 20))
        self.model = nn.Sequential(*(LoRALinear(n, m, rank, generator) for n, m in sizes))
        self.x = torch.randn(32, 16, generator=generator)
        with torch.no_grad():
            weights = [layer.base_layer + torch.randn(20, 1, generator=generator) * 0.1 for layer in self.model]
            self.y = self.x @ weights[0].T @ weights[1].T @ weights[2].T
            if trained:
                for layer in self.model:
                    layer.lora_B["default"].weight.normal_(generator=generator).mul_(0.1)
                    layer.lora_A["default"].weight.mul_(0.1)

    def __call__(self):
        return (self.model(self.x) - self.y).square().mean()

    def half(self, k):
        rows = slice(16 * k, 16 * (k + 1))
        return lambda: (self.model(self.x[rows]) - self.y[rows]).square().mean()

    def weights(self):
        return [p.detach().clone() for p in self.model.parameters() if p.requires_grad]

    def products(self):
        return [layer.delta().detach().double() / 2 for layer in self.model]

    def optimizer(self, kind=RoZO, **fields):
        return kind(self.model, **{"lr": 1e-3, "seed": 3, "mode": "shadow", **fields})


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def distance(a, b):
    return math.sqrt(sum((x.double() - y.double()).square().sum().item() for x, y in zip(a, b, strict=True)))


def run(problem, optimizer, steps, closure=None):
    losses = []
    for _ in range(steps):
        optimizer.step(closure or problem)
        losses.append(optimizer.last_losses)
    return losses


def noise(optimizer, query=0, step=0):
    """z of a query on every segment, by name, float64."""
    seed = query_seeds(optimizer.fields.seed, step, query).direction
    return {s.name: ops.noise_fill(s.shape, seed, offset=s.index).double() for s in optimizer.arena.segments}


def pairs(optimizer, rank=None):
    """(B, A, N1, N2) of every layer, float64, restricted to the first ``rank`` components."""
    z = noise(optimizer)
    for k, layer in enumerate(m for m in optimizer._module if isinstance(m, LoRALinear)):
        B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        N1, N2 = z[f"{k}.lora_B.default.weight"], z[f"{k}.lora_A.default.weight"]
        yield tuple(x.detach().double().clone() for x in (B[:, :rank], A[:rank], N1[:, :rank], N2[:rank]))


# start


@pytest.mark.parametrize("offset", [True, False])
def test_start(offset):
    problem = Problem()
    before = problem().item()
    problem.optimizer(rozo_offset=offset)
    A, B = (problem.model[1].get_submodule(f"lora_{f}.default").weight for f in "AB")
    r = 2 if offset else 4
    for factor in (A[:r], B[:, :r]):
        assert 0.01 < factor.std() < 0.03
    assert torch.linalg.matrix_rank(B[:, :r] @ A[:r]) == r
    if offset:
        assert torch.equal(B[:, 2:], -B[:, :2]) and torch.equal(A[2:], A[:2])
        assert problem().item() == pytest.approx(before, rel=1e-5)
    else:
        assert problem().item() != pytest.approx(before, rel=1e-5)


def test_a_trained_adapter_is_not_started_again(caplog):
    problem = Problem(trained=True)
    before = problem.weights()
    optimizer = problem.optimizer()
    assert same(problem.weights(), before)
    with caplog.at_level(logging.WARNING):
        run(problem, optimizer, 2)
    assert [r.message for r in caplog.records if "trained already" in r.message] != []
    assert len(caplog.records) == 1
    for after, start in zip(problem.weights(), before, strict=True):
        halves = [(w[2:], w[:2]) if len(w) == 4 else (w[:, 2:], w[:, :2]) for w in (after, start)]
        (kept, moved), (start_kept, start_moved) = halves
        assert torch.equal(kept, start_kept) and not torch.equal(moved, start_moved)


def test_refused_at_construction():
    problem = Problem()
    with pytest.raises(AdapterError, match="LoRA adapters only"):
        RoZO(nn.Linear(3, 3), lr=1e-3)
    with pytest.raises(AdapterError, match="found none among 'parameters"):
        RoZO([p for p in problem.model.parameters() if p.requires_grad], lr=1e-3)
    with pytest.raises(AdapterError, match="even rank"):
        Problem(rank=3).optimizer()
    with pytest.raises(AdapterError, match=r"'0.default' is 20 x 16 .* rank 9"):
        Problem(rank=18).optimizer()
    Problem(rank=18).optimizer(**PLAIN)
    with pytest.raises(AdapterError, match=r"bfloat16; RoZO keeps adapters in float32"):
        RoZO(Problem().model.bfloat16(), lr=1e-3)
    kl = {"tr_mode": "kl", "two_sided": False}
    for bad in ({"rozo_precond": "scaled"}, kl, {"step_interval": 0}, {"tr_window": 0}, {"beta2": 1.0}):
        with pytest.raises(FieldError, match=next(iter(bad))):
            Problem().optimizer(**bad)


# steps


@pytest.mark.parametrize("offset", [True, False])
def test_one_step_written_out(offset):
    """c from the two query points, Y <- truncated SVD of (1 - lr decay) Y - lr c xi, layer by layer in float64."""
    problem = Problem()
    fields = {"lr": 1e-2, "weight_decay": 0.5, "rozo_precond": "none", "rozo_offset": offset}
    optimizer = problem.optimizer(**fields)
    r = 2 if offset else 4
    before = list(pairs(optimizer, r))
    constant = [p - B @ A for p, (B, A, *_) in zip(problem.products(), before, strict=True)]
    wanted, moves = [], []
    for B, A, N1, N2 in before:
        U, S, Vt = torch.linalg.svd(B @ A)
        U, V = U[:, :r], Vt[:r].T
        # the bases RoZO uses: nearest to B and A themselves
        U, V = (Q @ torch.linalg.svd(Q.T @ X)[0] @ torch.linalg.svd(Q.T @ X)[2] for Q, X in ((U, B), (V, A.T)))
        R = U.T @ N1 @ V.T + N2 @ (torch.eye(16 if A.shape[1] == 16 else 20).double() - V @ V.T)
        Up = N1 - U @ U.T @ N1
        moves.append((torch.linalg.inv(U.T @ B) @ R, Up @ torch.linalg.inv(A @ V)))
        wanted.append((B @ A, U @ R + Up @ V.T))
        assert torch.allclose(B @ moves[-1][0] + moves[-1][1] @ A, wanted[-1][1])
    ((plus, minus),) = run(problem, optimizer, 1)
    for loss, sign in ((plus, 1), (minus, -1)):
        x = problem.x.double()
        for layer, extra, (B, A, *_), (dA, dB) in zip(problem.model, constant, before, moves, strict=True):
            eps = sign * optimizer.fields.zo_eps
            x = x @ (layer.base_layer.double() + 2 * ((B + eps * dB) @ (A + eps * dA) + extra)).T
        assert loss == pytest.approx((x - problem.y).square().mean().item(), rel=1e-5)
    c = (plus - minus) / (2 * optimizer.fields.zo_eps)
    for (Y, xi), extra, now in zip(wanted, constant, problem.products(), strict=True):
        U, S, Vt = torch.linalg.svd((1 - 1e-2 * 0.5) * Y - 1e-2 * c * xi)
        step = (U[:, :r] * S[:r]) @ Vt[:r] - Y
        assert (now - extra - Y - step).norm() < 1e-5 * step.norm()
        assert torch.linalg.matrix_rank(now - extra, rtol=1e-4) == r


def test_adam_coordinates():
    """The first step of adam moves every coordinate by lr, in the direction of -c (dB, dA), before the retraction."""
    fields = {"rozo_retract": "factor", "rozo_offset": False}
    problem = Problem()
    optimizer = problem.optimizer(**fields)
    before = list(pairs(optimizer))
    ((plus, minus),) = run(problem, optimizer, 1)
    for (B, A, N1, N2), (B2, A2, *_) in zip(before, pairs(optimizer), strict=True):
        at = Point.of(B[None], A[None])
        dB, dA = at.to_factors(at.sample(N1[None], N2[None]))
        sign = math.copysign(1.0, plus - minus)
        assert torch.allclose(B2, B - 1e-3 * sign * dB[0].sign(), atol=1e-6)
        assert torch.allclose(A2, A - 1e-3 * sign * dA[0].sign(), atol=1e-6)


def test_scaled_coordinates():
    """dB (A A')^-1 and (B'B)^-1 dA, stepped along in the factors."""
    problem = Problem()
    optimizer = problem.optimizer(**{**PLAIN, "rozo_precond": "scaled"}, lr=1e-4)
    before = list(pairs(optimizer))
    ((plus, minus),) = run(problem, optimizer, 1)
    rate = 1e-4 * (plus - minus) / (2 * optimizer.fields.zo_eps)
    for (B, A, N1, N2), (B2, A2, *_) in zip(before, pairs(optimizer), strict=True):
        assert torch.allclose(B2, B - rate * N1 @ torch.linalg.inv(A @ A.T), atol=1e-7)
        assert torch.allclose(A2, A - rate * torch.linalg.inv(B.T @ B) @ N2, atol=1e-7)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("two_sided", [True, False])
def test_without_geometry_it_is_mezo(queries, two_sided):
    shared = {"n_queries": queries, "two_sided": two_sided, "lr": 1e-2}
    ours, theirs = Problem(), Problem()
    optimizer = ours.optimizer(**PLAIN, **shared)
    for p, q in zip(theirs.model.parameters(), ours.model.parameters(), strict=True):
        p.data.copy_(q)
    start = ours.weights()
    losses = run(theirs, theirs.optimizer(MeZO, **shared), 3)
    assert run(ours, optimizer, 1) == losses[:1]  # the same query points, bit for bit
    for each in losses[1:]:
        optimizer.replay(each)  # its own losses would differ by an ulp, and slopes amplify that
    assert distance(ours.weights(), theirs.weights()) < 1e-6 * distance(ours.weights(), start)


def test_momentum_without_geometry_is_mezo_with_momentum():
    ours, theirs = Problem(), Problem()
    optimizer = ours.optimizer(RoZOMomentum, **PLAIN, lr=1e-2)
    for p, q in zip(theirs.model.parameters(), ours.model.parameters(), strict=True):
        p.data.copy_(q)
    start = ours.weights()
    for losses in run(theirs, theirs.optimizer(MeZOMomentum, lr=1e-2), 4):
        optimizer.replay(losses)
    assert distance(ours.weights(), theirs.weights()) < 1e-6 * distance(ours.weights(), start)


GEOMETRIES = (
    {},
    {"rozo_precond": "none", "n_queries": 2},
    {"rozo_precond": "scaled", "rozo_sampling": "factor", "weight_decay": 0.1},
    {"rozo_retract": "factor", "weight_decay": 0.1},
    {"step_interval": 3, "weight_decay": 0.1, "n_queries": 2, "weighting": "rloo"},
    {"tr_mode": "halves", "tr_window": 2, "two_sided": False},
    {"tr_mode": "kl", "tr_window": 2, "rozo_offset": False, "noise": "rademacher"},
)


class Offering(Problem):
    """A problem whose closure offers what the trust regions ask for."""

    @property
    def halves(self):
        return self.half(0), self.half(1)

    def kl(self):
        return self().item()


@pytest.mark.parametrize("fields", GEOMETRIES, ids=str)
def test_no_momentum_is_rozo(fields):
    plain, with_momentum = Offering(), Offering()
    run(plain, plain.optimizer(**fields), 4)
    run(with_momentum, with_momentum.optimizer(RoZOMomentum, beta1=0.0, **fields), 4)
    assert same(plain.weights(), with_momentum.weights())


@pytest.mark.parametrize("kind", SPECIES)
@pytest.mark.parametrize("fields", GEOMETRIES, ids=str)
def test_replay_and_resume(kind, fields):
    """Recorded losses rebuild the run bit for bit, also from the middle, through JSON, on another optimizer."""
    original = Offering()
    optimizer = original.optimizer(kind, **fields)
    losses = run(original, optimizer, 4)
    state = optimizer.state_dict()
    own = state["zoengine"]
    states = {name: [t.clone() for t in tensors] for name, tensors in own.pop("states").items()}
    assert not any(name.startswith("direction") for name in states)
    state["zoengine"] = {**json.loads(json.dumps(own)), "states": states}
    middle = original.weights()
    losses += run(original, optimizer, 4)
    replayed = Offering()
    again = replayed.optimizer(kind, **fields)
    for each in losses:
        again.replay(each)
    assert same(replayed.weights(), original.weights()) and again.forward_passes == optimizer.forward_passes
    resumed = Offering()
    other = resumed.optimizer(kind, **fields)
    run(resumed, other, 1)  # something to be forgotten
    for p, w in zip((p for p in resumed.model.parameters() if p.requires_grad), middle, strict=True):
        p.data.copy_(w)
    other.load_state_dict(state)
    assert run(resumed, other, 4) == losses[4:]
    assert same(resumed.weights(), original.weights())
    assert other.forward_passes == 8 * kind.forwards_per_step(other.fields)


@pytest.mark.parametrize("kind", SPECIES)
@pytest.mark.parametrize("fields", GEOMETRIES, ids=str)
def test_no_learning_rate_changes_no_bit(kind, fields):
    problem = Offering()
    optimizer = problem.optimizer(kind, **{**fields, "lr": 0.0})
    before = problem.weights()
    run(problem, optimizer, 3)
    assert same(problem.weights(), before)


@pytest.mark.parametrize("kind", SPECIES)
@pytest.mark.parametrize(
    ("fields", "lr"),
    [
        ({}, 2e-2),
        ({"step_interval": 5, "mode": "inplace"}, 2e-2),
        ({"rozo_precond": "none", "mode": "inplace"}, 1e-3),
        ({"rozo_precond": "scaled", "rozo_sampling": "factor"}, 1e-3),
    ],
    ids=str,
)
def test_a_quadratic_decreases(kind, fields, lr):
    """sum ||W0 + s B A - T||^2 over the layers, with T - W0 of rank 1."""
    problem, generator = Problem(), torch.Generator().manual_seed(9)
    targets = [
        layer.base_layer + 0.1 * torch.randn(20, 1, generator=generator) * torch.randn(width, generator=generator)
        for layer, width in zip(problem.model, (16, 20, 20), strict=True)
    ]

    def loss():
        distances = (m.base_layer + m.delta() - t for m, t in zip(problem.model, targets, strict=True))
        return sum(d.square().sum() for d in distances)

    optimizer = problem.optimizer(kind, lr=lr, n_queries=4, **fields)
    before = loss().item()
    run(problem, optimizer, 60, loss)
    assert loss().item() < 0.9 * before


def test_an_error_in_a_forward_leaves_the_weights():
    problem = Problem()
    optimizer = problem.optimizer(n_queries=2)
    run(problem, optimizer, 1)
    before, calls = problem.weights(), iter(range(10))

    def failing():
        if next(calls) == 2:
            raise KeyError("data")
        return problem()

    with pytest.raises(KeyError):
        optimizer.step(failing)
    assert same(problem.weights(), before)
    reference = Problem()
    run(reference, other := reference.optimizer(n_queries=2), 2)
    run(problem, optimizer, 1)
    assert same(problem.weights(), reference.weights()) and other.step_number == 2


def test_parameter_groups_bring_their_own_rate():
    problem = Problem()
    named = [[(n, p) for n, p in problem.model.named_parameters() if p.requires_grad and n[0] == k] for k in "012"]
    optimizer = RoZO(
        [{"params": named[0]}, {"params": named[1], "lr": 0.0}, {"params": named[2], "weight_decay": 0.1}],
        lr=1e-3, mode="shadow",
    )  # fmt: skip
    before = problem.products()
    run(problem, optimizer, 2)
    moved = [not torch.equal(a, b) for a, b in zip(before, problem.products(), strict=True)]
    assert moved == [True, False, True]


def test_lazy_windows():
    """Within a window theta moves in the coordinates of one tangent space; its end is one retraction of the sum."""
    problem = Problem()
    fields = {"rozo_precond": "none", "rozo_offset": False, "step_interval": 2, "weight_decay": 0.2, "lr": 1e-2}
    optimizer = problem.optimizer(**fields)
    before = list(pairs(optimizer))
    points = [Point.of(B[None], A[None]) for B, A, *_ in before]
    total = [point.from_factors(0 * point.B, 0 * point.A) for point in points]
    for step in range(2):
        z = noise(optimizer, step=step)
        ((plus, minus),) = run(problem, optimizer, 1)
        c = (plus - minus) / (2 * optimizer.fields.zo_eps)
        for k, point in enumerate(points):
            N1, N2 = (z[f"{k}.lora_{f}.default.weight"][None] for f in "BA")
            total[k] = total[k] + -1e-2 * c * point.sample(N1, N2)
        if step == 0:
            for (B, A, *_), xi, point, (B2, A2, *_) in zip(before, total, points, pairs(optimizer), strict=True):
                dB, dA = point.to_factors(xi)
                assert torch.allclose(B2, B + dB[0], atol=1e-6) and torch.allclose(A2, A + dA[0], atol=1e-6)
    for xi, point, now in zip(total, points, problem.products(), strict=True):
        B, A = point.retract(xi, (1 - 1e-2 * 0.2) ** 2)
        step = B @ A - point.B @ point.A
        assert (now - (B @ A)[0]).norm() < 1e-5 * step.norm()


def test_momentum_is_transported():
    """After the retraction it is the projection of m onto the new tangent space, in the coordinates there."""
    problem = Problem()
    optimizer = problem.optimizer(RoZOMomentum, rozo_precond="none", rozo_offset=False, lr=1e-2)
    before = list(pairs(optimizer))
    ((plus, minus),) = run(problem, optimizer, 1)
    c = (plus - minus) / (2 * optimizer.fields.zo_eps)
    views = optimizer.arena.views(optimizer.states["momentum"])
    stored = {segment.name: view for segment, view in zip(optimizer.arena.segments, views, strict=True)}
    for k, ((B, A, N1, N2), (B2, A2, *_)) in enumerate(zip(before, pairs(optimizer), strict=True)):
        old, new = Point.of(B[None], A[None]), Point.of(B2[None], A2[None])
        xi = old.sample(N1[None], N2[None])
        m = (0.1 * c * (old.U @ xi.R + xi.Up @ old.V.mT))[0]
        left, right = (Q[0] @ Q[0].T for Q in (new.U, new.V))
        wanted = left @ m + m @ right - left @ m @ right
        dB, dA = (stored[f"{k}.lora_{f}.default.weight"].double() for f in "BA")
        assert (B2 @ dA + dB @ A2 - wanted).norm() < 1e-5 * wanted.norm()
        assert (wanted - m).norm() > 1e-2 * m.norm()


def test_a_second_window_starts_where_the_first_ended():
    """Retractions at the ends of windows of 2, the momentum carried over: as steps taken by hand in float64."""
    problem = Problem()
    fields = {"rozo_precond": "none", "rozo_offset": False, "step_interval": 2, "weight_decay": 0.2, "lr": 1e-3}
    optimizer = problem.optimizer(RoZOMomentum, **fields)
    points = first = [Point.of(B[None], A[None]) for B, A, *_ in pairs(optimizer)]
    momenta = [point.from_factors(0 * point.B, 0 * point.A) for point in points]
    for step in range(4):
        if step % 2 == 0:
            total = [0.0 * m for m in momenta]
        z = noise(optimizer, step=step)
        ((plus, minus),) = run(problem, optimizer, 1)
        c = (plus - minus) / (2 * optimizer.fields.zo_eps)
        for k, point in enumerate(points):
            N1, N2 = (z[f"{k}.lora_{f}.default.weight"][None] for f in "BA")
            momenta[k] = 0.9 * momenta[k] + 0.1 * c * point.sample(N1, N2)
            total[k] = total[k] + -1e-3 * momenta[k]
        if step % 2:
            news = [Point.of(*p.retract(xi, (1 - 1e-3 * 0.2) ** 2)) for p, xi in zip(points, total, strict=True)]
            momenta = [n.transport(m, p) for n, m, p in zip(news, momenta, points, strict=True)]
            points = news
    for point, now, start in zip(points, problem.products(), first, strict=True):
        moved = point.B @ point.A - start.B @ start.A
        assert (now - (point.B @ point.A)[0]).norm() < 1e-4 * moved.norm()


def test_weight_decay_shrinks_the_product():
    """Also where the step is taken in the factors: Y <- (1 - lr weight_decay) Y."""
    problem = Problem(trained=True)
    optimizer = problem.optimizer(**PLAIN, weight_decay=2.0, lr=0.1)
    before = problem.products()
    optimizer.replay([1.0, 1.0])  # a slope of 0
    for Y, now in zip(before, problem.products(), strict=True):
        assert torch.allclose(now, 0.8 * Y, rtol=1e-5, atol=1e-7)


# trust region


def test_halves_measure_agreement():
    """Halves whose slopes always differ in sign halve eps and lr; their mean is what the step goes by."""
    problem = Problem()

    class Contrary:
        def __init__(self):
            self.halves = (lambda: 3 * problem(), lambda: -problem())

        def __call__(self):
            raise AssertionError("only the halves are needed")

    optimizer = problem.optimizer(tr_mode="halves", tr_window=4, rozo_precond="none")
    reference = Problem()
    other = reference.optimizer(rozo_precond="none")
    for losses in run(problem, optimizer, 4, Contrary()):
        means = [(a + b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True)]
        other.replay(means)
    assert same(problem.weights(), reference.weights())
    region = TrustRegion(**optimizer.memory["trust_region"])
    assert (region.eps, region.lr_factor) == (5e-4, 0.5) and region.agreement == pytest.approx(0.65 * 0.9**4)
    (losses,) = run(problem, optimizer, 1, Contrary())
    assert len(losses) == 4 and optimizer.forward_passes == 10
    assert optimizer.replay(losses) == pytest.approx((losses[0] + losses[1] + losses[2] + losses[3]) / 4)


def test_the_trust_region_scales_eps_and_lr():
    smaller, reference = Problem(), Problem()
    fields = {"rozo_precond": "none", "mode": "shadow"}
    one, two = smaller.optimizer(lr=1e-3, **fields), reference.optimizer(lr=5e-4, zo_eps=2.5e-4, **fields)
    region = TrustRegion(**one.memory["trust_region"])
    one.memory["trust_region"] = dataclasses.replace(region, eps=2.5e-4, lr_factor=0.5).to_dict()
    assert run(smaller, one, 2) == run(reference, two, 2)
    assert same(smaller.weights(), reference.weights())


def test_kl_is_asked_after_both_points():
    problem, asked = Problem(), []

    class Closure:
        def __init__(self, problem):
            self.problem = problem

        def __call__(self):
            asked.append("loss")
            return self.problem()

        def kl(self):
            asked.append("kl")
            return 0.06

    optimizer = problem.optimizer(tr_mode="kl", tr_window=1, n_queries=2)
    run(problem, optimizer, 2, Closure(problem))
    assert asked == ["loss", "loss", "kl"] * 4
    assert optimizer.memory["trust_region"]["eps"] == 2.5e-4 and optimizer.forward_passes == 8
    reference, other = Problem(), Problem()
    run(reference, reference.optimizer(n_queries=2), 2)
    run(other, other.optimizer(tr_mode="kl", tr_window=9, n_queries=2), 2, Closure(other))
    assert same(other.weights(), reference.weights())  # the divergence is no loss


@pytest.mark.parametrize("mode", ["halves", "kl"])
def test_a_closure_without_the_offer_is_refused(mode):
    problem = Problem()
    with pytest.raises(TypeError, match=f"closure with an attribute '{mode}'.* set tr_mode to none"):
        problem.optimizer(tr_mode=mode).step(problem)


# peft


@pytest.mark.parametrize("offset", [True, False])
def test_a_saved_adapter_on_the_original_base_is_the_trained_model(tmp_path, offset):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8))
    original = {name: p.detach().clone() for name, p in base.state_dict().items()}
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"])
    model = peft.get_peft_model(base, config).eval()
    x, y = torch.randn(16, 12), torch.randn(16, 8)
    optimizer = RoZOMomentum(model, lr=1e-2, rozo_offset=offset)
    for _ in range(20):
        optimizer.step(lambda: (model(x) - y).square().mean())
    trained = model(x).detach()
    model.save_pretrained(tmp_path)
    fresh = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8))
    fresh.load_state_dict(original)
    untouched = fresh(x).detach()
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.allclose(loaded(x), trained, atol=1e-6) and not torch.allclose(untouched, trained, atol=1e-3)
    assert torch.allclose(loaded.merge_and_unload()(x), trained, atol=1e-5)
