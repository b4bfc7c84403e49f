"""LOREN's score does not see rotated rows; LOREN's published code, written out, and how close to MeZO it is."""

import math

import pytest
import torch
from torch import nn
from toys import Linear, Problem, Toy, directions, flat

from zoengine import FieldError, ops
from zoengine.directions import Fold, Noise, Step
from zoengine.methods.spsa import advantages
from zoengine.ops.reference import matrices as reference
from zoengine.transforms import kron_tiled

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rotated_rows_have_the_same_score(monkeypatch):
    """v = u'u a - m a, and u'Q'Qu is u'u: the rows of a direction are exchangeable, its columns are not."""
    rows, columns, seeds = 130, 12, torch.tensor([5, 6])
    a, weights = torch.randn(columns, generator=torch.Generator().manual_seed(1)), torch.tensor([0.8, -1.7])
    table = ops.Matrices.for_kron([0], [(rows, columns)])

    def score(left=None, right=None):
        def noise(seed, index, rows, columns, kind):
            u = drawn(seed, index, rows, columns, kind).double()
            u = u if left is None else left @ u
            return (u if right is None else u @ right).float()

        with monkeypatch.context() as patch:
            drawn = reference._noise
            patch.setattr(reference, "_noise", noise)
            return reference.kron_score(a, table.table, seeds, weights, 0, 0, table.blocks, table.widest).double()

    def rotation(size):
        drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
        return torch.linalg.qr(drawn).Q

    plain = score()
    assert torch.equal(plain, ops.kron_score(a, table, seeds, weights).double())
    assert (score(left=rotation(rows)) - plain).norm() < 1e-5 * plain.norm()
    assert (score(right=rotation(columns)) - plain).norm() > 0.5 * plain.norm()
    u = [ops.noise_fill((rows, columns), int(seed)).double() for seed in seeds]
    expected = sum(w * (z.T @ z @ a.double() - rows * a.double()) for w, z in zip(weights.double(), u, strict=True))
    assert (plain - expected).norm() < 1e-5 * expected.norm()


# The published code.


def tiled(a: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """a, repeated to a whole tensor and flat."""
    return a.repeat(math.prod(shape) // a.numel())


def by_name(optimizer, state: str) -> dict[str, torch.Tensor]:
    """Views of a state of vectors a, per parameter."""
    found = {}
    for part, packed in zip(optimizer.transform.parts, optimizer.states[state], strict=True):
        pieces = packed.split([columns for _, columns in part.shapes])
        found |= {s.name: piece for s, piece in zip(part.segments, pieces, strict=True)}
    return found


def momentum(optimizer) -> dict[str, torch.Tensor]:
    found = {}
    for part, state in zip(optimizer.transform.parts, optimizer.states["momentum"], strict=True):
        for s in part.segments:
            start = s.start - part.span.start
            found[s.name] = state[start : start + s.numel].view(s.shape)
    return found


def made(optimizer, seed: int) -> torch.Tensor:
    """The direction of a seed, as the transform makes it now."""
    target = [torch.zeros_like(b) for b in optimizer.arena.buffers]
    for span in optimizer.transform.spans(by_group=False):
        zeros = [torch.zeros_like(b) for b in target]
        optimizer.transform.add(span, zeros, [Noise(seed, 1.0)], target=target)
    return target[0]


def indefinite_root(b: torch.Tensor, rho: float) -> torch.Tensor:
    """The square root of (rho I + b b')^-1 that turns b around."""
    d = b.numel()
    values, vectors = torch.linalg.eigh(rho * torch.eye(d, dtype=torch.float64) + torch.outer(b, b))
    signs = torch.ones(d, dtype=torch.float64)
    signs[-1] = -1  # the largest eigenvalue is that of b
    return vectors @ (signs * values.rsqrt()).diag() @ vectors.T


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_directions_and_score_are_those_of_the_tiled_covariance(scale):
    """By an eigendecomposition and autograd of the log density in float64, a being what all rows share."""
    toy, rho = Linear(), 0.3
    optimizer = toy.optimizer("loren-official", mode="shadow", damping=rho)
    vectors, weights = by_name(optimizer, "curvature"), {11: 0.7, 12: -1.3}
    for a in vectors.values():
        a.mul_(scale)
    start = {name: a.double() for name, a in vectors.items()}
    optimizer.transform.fold(Fold("momentum", 0.0, [Noise(s, w) for s, w in weights.items()]))
    optimizer.transform.learn(0.1, [0.0])
    for s in optimizer.arena.segments:
        variable = start[s.name].clone().requires_grad_(True)
        b = tiled(variable, s.shape)
        root = indefinite_root(b.detach(), rho)
        precision = rho * torch.eye(s.numel, dtype=torch.float64) + torch.outer(b, b)
        assert (root @ root @ precision.detach() - torch.eye(s.numel)).norm() < 1e-9
        density, expected = 0.0, 0.0
        for seed, weight in weights.items():
            w = root @ ops.noise_fill(s.numel, seed, offset=s.index).double()
            density = density + weight * (0.5 * torch.logdet(precision) - 0.5 * w @ precision @ w)
            expected = expected + weight * math.sqrt(rho) * w
        density.backward()
        assert (momentum(optimizer)[s.name].double().view(-1) - expected).norm() < 1e-5 * expected.norm()
        gradient = variable.grad if len(s.shape) >= 2 else variable.grad.sum().expand(s.numel)
        expected = -0.1 * math.sqrt(rho) * gradient
        moved = vectors[s.name].double() - start[s.name]
        assert (moved - expected).norm() < 1e-5 * expected.norm() + 1e-7 * start[s.name].norm()


def test_the_step_is_that_of_the_published_code():
    """Formula by formula in float64: each query folds, moves and learns before the next is made from the new a."""
    toy, rho, lr, lr_cov, eps, decay, beta1 = Problem(), 0.3, 1e-2, 40.0, 0.5, 0.002, 0.8
    fields = {"damping": rho, "lr": lr, "lr_cov": lr_cov, "zo_eps": eps, "weight_decay": decay, "beta1": beta1}
    optimizer = toy.optimizer("loren-official", mode="shadow", n_queries=3, **fields)
    segments = optimizer.arena.segments
    x = {s.name: toy.weights()[s.name].double() for s in segments}
    a = {name: value.double() for name, value in by_name(optimizer, "curvature").items()}
    m, first = {s.name: torch.zeros(s.shape).double() for s in segments}, {name: v.clone() for name, v in a.items()}
    for step in range(4):
        optimizer.step(toy)
        losses = optimizer.last_losses
        for k, loss in enumerate(losses):
            advantage = loss - sum(losses) / 3
            for name, z in directions(optimizer, step, k).items():
                u, b = z.double().view(-1), tiled(a[name], z.shape)
                square, s = b @ b, b @ u
                t = (rho + square).sqrt()
                kappa = (t + math.sqrt(rho)) / (square * t)
                g = (advantage / (2 * eps) * (u - kappa * s * b)).view(z.shape)
                if z.dim() >= 2:
                    m[name] = g = beta1 * m[name] + g
                x[name] = (1 - lr * decay * (z.dim() >= 2)) * x[name] - lr * g
                v = s * u - b
                score = ((v - kappa * (b @ v) * b) / t).view(z.shape).sum(0)
                a[name] = (1 - lr_cov * decay) * a[name] - lr_cov * eps**2 * advantage / 2 * score
    for s in segments:
        start = Problem().weights()[s.name].double()
        assert (x[s.name] - start).norm() > 1e-3 and (a[s.name] - first[s.name]).norm() > 0.1 * a[s.name].norm()
        moved = (x[s.name] - start).norm()
        assert (toy.weights()[s.name].double() - x[s.name]).norm() < 1e-4 * moved, s.name
        vector = by_name(optimizer, "curvature")[s.name].double()
        assert (vector - a[s.name]).norm() < 1e-4 * (a[s.name] - first[s.name]).norm(), s.name
        if len(s.shape) >= 2:
            assert (momentum(optimizer)[s.name].double() - m[s.name]).norm() < 1e-4 * m[s.name].norm()


@pytest.mark.parametrize("mode", ["inplace", "shadow"])
def test_only_the_first_query_is_applied_as_it_was_measured(mode):
    toy, applied = Problem(), []
    optimizer = toy.optimizer("loren-official", mode=mode, n_queries=3, lr_cov=1.0, weight_decay=0.1)
    measured = [made(optimizer, Step(3, 0).seed(k)) for k in range(3)]
    fold = optimizer.transform.fold

    def folding(request):
        (term,) = request.terms
        applied.append((term.seed, made(optimizer, term.seed)))
        fold(request)

    optimizer.transform.fold = folding
    optimizer.step(toy)
    assert [seed for seed, _ in applied] == [Step(3, 0).seed(k) for k in range(3)]
    same = [torch.equal(before, after) for before, (_, after) in zip(measured, applied, strict=True)]
    assert same == [True, False, False]


class Slope(Toy):
    """<g, theta> over a 512 x 512 matrix of zeros, with a gradient of length 5."""

    def __init__(self, size=512) -> None:
        gradient = torch.randn(size, size, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        self.model = nn.ParameterList([nn.Parameter(torch.zeros(size, size))])
        self.gradient = 5 * gradient / gradient.norm()

    def __call__(self) -> torch.Tensor:
        return (self.gradient * self.model[0]).sum()


def test_its_curvature_stands_still():
    """A query moves a by 1e-13 to 1e-9 of its size, which fp32 does not hold; weight decay of 0.01 shrinks it."""
    toy = Slope()
    optimizer = toy.optimizer("loren-official", mode="shadow", lr=1e-6, n_queries=6, lr_cov=1e-3, weight_decay=0.0)
    (a,) = optimizer.states["curvature"]
    start, moves = a.clone(), []
    (vectors,) = optimizer.transform._vectors.values()
    learn = optimizer.transform.learn

    def learning(lr, decays):
        moves.append((lr * vectors.score.double().norm() / a.double().norm()).item())
        learn(lr, decays)

    optimizer.transform.learn = learning
    for _ in range(3):
        optimizer.step(toy)
    assert len(moves) == 18 and 1e-13 < min(moves) < max(moves) < 1e-9
    assert (a != start).sum() <= 3, "only the smallest elements can take that up"
    start = a.clone()
    optimizer.param_groups[0]["weight_decay"] = 0.01
    optimizer.step(toy)
    shrunk = start.double() * (1 - 1e-5) ** 6
    assert (a.double() - shrunk).norm() < 0.01 * (start - shrunk).norm()


def test_it_moves_as_mezo_with_momentum_would():
    """The whole way of every query is that of beta1^K and lr / (1 - beta1), but for one dimension of d.

    The losses of a linear function do not depend on where the two are; their directions differ by (1 + sqrt(rho) / t)
    (e . u) e, whose size is |w| / sqrt(d) times 1 to 1 + sqrt(rho) / t, and so do their slopes. Later queries of a step
    come in later, so the two are apart while they move, and together when the momentum is spent.
    """
    size, beta1, lr, eps = 128, 0.9, 1e-3, 1e-2
    for isotropic in (False, True):
        one, two = Slope(size), Slope(size)
        shared = {"mode": "shadow", "n_queries": 4, "zo_eps": eps, "weight_decay": 0.0}
        official = one.optimizer("loren-official", lr=lr, beta1=beta1, lr_cov=1e-3, **shared)
        mezo = two.optimizer("mezo-momentum", lr=lr / (1 - beta1), beta1=beta1**4, weighting="rloo", **shared)
        if isotropic:
            official.states["curvature"][0].zero_()
        apart = []
        for step in range(45):
            for optimizer, toy in ((official, one), (mezo, two)):
                optimizer.step(toy if step < 5 else lambda: 1.0)
            apart.append((one.model[0] - two.model[0]).double())
            if step == 0:
                u = [directions(official, 0, k)["0"].double() for k in range(4)]
                weights = advantages(official.last_losses, eps)
                missing = [(beta1 ** (4 - k) - beta1**4) / (1 - beta1) for k in range(4)]
                lag = sum(lr * m * w * z for m, w, z in zip(missing, weights, u, strict=True))
        way = two.model[0].double().norm()
        assert apart[0].norm() > 0.02 * way
        assert (apart[0] - lag).norm() < (1e-4 if isotropic else 0.1) * lag.norm()
        if isotropic:
            assert apart[-1].norm() < 1e-5 * way
        else:
            assert 0.3 / size * way < apart[-1].norm() < 3 / size * way


def test_a_vector_of_zeros_leaves_normals_and_learns_nothing():
    toy = Linear()
    optimizer = toy.optimizer("loren-official", mode="shadow", n_queries=3, lr_cov=1e3, zo_eps=0.5)
    for a in optimizer.states["curvature"]:
        a.zero_()
    seed = Step(3, 0).seed()
    assert torch.equal(made(optimizer, seed)[:30], ops.noise_fill(30, seed))
    for _ in range(3):
        optimizer.step(toy)
    assert not any(a.any() for a in optimizer.states["curvature"])
    assert torch.isfinite(flat(toy.model)).all()


def test_little_noise_is_drawn_at_once(monkeypatch):
    """However large the matrices: at most the scratch, and a row where it is longer; the sums are the same."""

    def sums():
        optimizer = Problem().optimizer("loren-official", mode="shadow")
        transform = optimizer.transform
        return transform, {p.span: transform._row_sums(p, Noise(7, 1.0)) for p in transform.parts}

    whole, expected = sums()
    monkeypatch.setattr(kron_tiled, "_SCRATCH", 64)  # three rows of 20; less than one vector of 40 and another
    transform, found = sums()
    sizes = [batch.size for batches in transform._batches.values() for batch in batches]
    assert max(sizes) == 60 and len(sizes) == (1 + 14) + 2 and sum(sizes) == 800 + 40 + 40 + 40 + 1
    assert sum(len(batches) for batches in whole._batches.values()) == 2
    for part in transform.parts:
        assert torch.allclose(found[part.span], expected[part.span], rtol=0, atol=1e-6)
        drawn = [ops.noise_fill(s.numel, 7, offset=s.index).double().view(shape) for s, shape in _shaped(part)]
        assert torch.allclose(found[part.span].double(), torch.cat([z.sum(0) for z in drawn]), rtol=0, atol=1e-6)


def _shaped(part):
    return zip(part.segments, part.shapes, strict=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loren_adv_a": "rloo"}, "loren-official has no field 'loren_adv_a'"),
        ({"two_sided": True}, "two_sided must be false"),
        ({"n_queries": 1}, "n_queries must be at least 2"),
        ({"damping": 0.0}, "damping must be greater than 0"),
        ({"beta1": 1.0}, r"beta1 must be in \[0, 1\)"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(FieldError, match=message):
        Problem().optimizer("loren-official", **fields)
