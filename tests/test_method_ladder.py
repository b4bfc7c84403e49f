"""Limits in which one method is another: bit for bit where the arithmetic is the same, else to 1e-6 of the way."""

import math

import pytest
import torch
from toys import Problem, Quadratic, Transformer, directions, distance, same

from zoengine import methods, ops
from zoengine.directions import Noise, Update
from zoengine.methods import spsa
from zoengine.transforms import matrix_shape

pytestmark = pytest.mark.usefixtures("one_thread")


def pair(a: tuple, b: tuple, toy=Problem, steps=5):
    """Two runs from the same weights; each a name and fields. Returns their problems and optimizers."""
    first, second = toy(), toy()
    one, two = first.optimizer(a[0], mode="shadow", **a[1]), second.optimizer(b[0], mode="shadow", **b[1])
    for _ in range(steps):
        one.step(first)
        two.step(second)
    return first, second, one, two


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("conmezo", {"cone_theta": math.pi / 2, "steps": 0}),
        ("hizoo", {"hessian_smooth": 0.0}),
        ("hizoo", {"hessian_smooth": 0.0, "hizoo_order": "hess_then_step"}),
        ("sparse-mezo", {"sparsity": 0.0, "mask_interval": 1}),
        ("mezo-greedy", {"gv_m": 1}),
        ("zo-finetuner", {}),
    ],
)
def test_is_mezo_bit_for_bit(name, fields, dtype, decay):
    shared = {"lr": 1e-2, "weight_decay": decay}
    first, second, *_ = pair(("mezo", shared), (name, {**shared, **fields}), lambda: Problem(dtype))
    assert same(first.weights(), second.weights())
    assert not same(first.weights(), Problem(dtype).weights())


@pytest.mark.parametrize("n_queries", [1, 4])
@pytest.mark.parametrize("name", ["conmezo", "hizoo", "sparse-mezo"])
def test_is_mezo_with_several_queries(name, n_queries):
    fields = {
        "conmezo": {"cone_theta": math.pi / 2},
        "hizoo": {"hessian_smooth": 0.0},
        "sparse-mezo": {"sparsity": 0.0},
    }[name]
    shared = {"lr": 1e-2, "n_queries": n_queries}
    first, second, *_ = pair(("mezo", shared), (name, {**shared, **fields}))
    assert same(first.weights(), second.weights())


class _AlongPair(methods.MeZO):
    """MeZO along z1 - z2."""

    name = "along-pair"

    def run(self, step):
        pair = [Noise(step.seed(0), 1.0), Noise(step.seed(1), -1.0)]
        estimate = yield from spsa.estimate(step, self.fields, [pair])
        yield Update(estimate.terms)
        return estimate.loss


def test_gv_of_two_candidates_is_mezo_along_their_difference():
    """Whichever ranks first: the estimate is even in the guide."""
    first, second = Problem(), Problem()
    guided = first.optimizer("mezo-gv", mode="shadow", lr=1e-2, gv_m=3)
    object.__setattr__(guided.fields, "gv_m", 2)  # refused from outside: it costs twice as much as MeZO
    plain = _AlongPair(second.model, mode="shadow", lr=1e-2, seed=3)
    won = set()
    for _ in range(6):
        guided.step(first)
        plain.step(second)
        won.add(guided.last_losses[0] < guided.last_losses[1])
        assert same(first.weights(), second.weights())
    assert won == {True, False}


TOLERANT = {
    "momentum": (("mezo", {}), ("mezo-momentum", {"beta1": 0.0})),
    "momentum with queries": (("mezo", {"n_queries": 3}), ("mezo-momentum", {"beta1": 0.0, "n_queries": 3})),
    "lozo-m": (("lozo", {}), ("lozo-m", {"beta1": 0.0})),
    "lozo-m exact": (("lozo", {"lozo_scale": "1/r"}), ("lozo-m", {"beta1": 0.0, "lozo_scale": "1/r"})),
    "rloo by gv": (("mezo", {"weighting": "rloo", "n_queries": 4}), ("mezo-gv", {"gv_weights": "rloo", "gv_m": 4})),
    "heavy ball": (("mezo-momentum", {"beta1": 0.0, "n_queries": 4, "weighting": "rloo"}), ("loren", {"a": 0.0})),
    "recomputed adam": (("mezo-adam", {}), ("mezo-adam", {"moments": "recomputed", "adam_window": 8})),
    "recomputed adam, one-sided": (
        ("mezo-adam", {"two_sided": False, "beta2": 0.9}),
        ("mezo-adam", {"two_sided": False, "beta2": 0.9, "moments": "recomputed", "adam_window": 8}),
    ),
    "subzero-greedy": (("subzero", {}), ("subzero-greedy", {"gv_m": 1})),
}


@pytest.mark.parametrize("case", TOLERANT)
def test_is_the_other_to_a_millionth_of_the_way(case):
    """From the same weights at every step, so that the losses are the same."""
    (first_name, first_fields), (second_name, second_fields) = TOLERANT[case]
    isotropic = second_fields.get("a") == 0.0
    if isotropic:
        second_fields = {"beta1": 0.0, "n_queries": 4}
    first, second = Problem(), Problem()
    for toy in (first, second):
        toy.model.requires_grad_(True)
    shared = {"mode": "shadow", "lr": 1e-2, "zo_eps": 1e-2}
    one = first.optimizer(first_name, **shared, **first_fields)
    two = second.optimizer(second_name, **shared, **second_fields)
    if isotropic:
        two.states["curvature"][0].zero_()
    for _ in range(7):
        for here, there in zip(one.arena.buffers, two.arena.buffers, strict=True):
            there.copy_(here)
        start = first.weights()
        one.step(first)
        two.step(second)
        moved = distance(start, first.weights())
        assert one.last_losses == two.last_losses
        # theta itself is rounded too: half an ulp of its size, for every element.
        resolution = 2**-24 * math.sqrt(sum(p.square().sum().item() for p in start.values()))
        assert distance(first.weights(), second.weights()) < 1e-6 * moved + 2 * resolution
    if isotropic:
        assert not two.states["curvature"][0].any()  # the score is 0 at 0


@pytest.mark.parametrize(("name", "amsgrad"), [("mezo-adam", False), ("zo-adamm", True)])
def test_adam_on_the_estimate_is_torch_adam(name, amsgrad):
    """torch's optimizer, fed the estimate written out in float64. AdamW's bias corrections are undone for AMSGrad."""
    problem = Problem()
    fields = {"beta1": 0.8, "beta2": 0.95, "adam_eps": 1e-3, "weight_decay": 0.3, "lr": 1e-2, "n_queries": 2}
    optimizer = problem.optimizer(name, mode="shadow", **fields)
    shadow = {s.name: p.detach().double().clone() for s, p in zip(*_parts(optimizer), strict=True)}
    moments: dict[str, list[torch.Tensor]] = {}
    matrices = [torch.nn.Parameter(p) for p in shadow.values() if p.dim() >= 2]
    vectors = [torch.nn.Parameter(p) for p in shadow.values() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), eps=1e-3)
    names = [n for n, p in shadow.items() if p.dim() >= 2] + [n for n, p in shadow.items() if p.dim() < 2]
    start = {n: p.clone() for n, p in shadow.items()}
    for step in range(12):
        optimizer.step(problem)
        losses = optimizer.last_losses
        slopes = [(losses[2 * k] - losses[2 * k + 1]) / (2 * 1e-3) / 2 for k in range(2)]
        z = [directions(optimizer, step, k) for k in range(2)]
        for name_, parameter in zip(names, [*matrices, *vectors], strict=True):
            g = sum(c * u[name_].double() for c, u in zip(slopes, z, strict=True))
            if amsgrad:
                m, v, top = moments.get(name_, [torch.zeros_like(g)] * 3)
                m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
                top = torch.maximum(top, v)
                moments[name_] = [m, v, top]
                keep = 1 - 1e-2 * 0.3 if parameter.dim() >= 2 else 1.0
                parameter.data.mul_(keep).sub_(1e-2 * m / (top.sqrt() + 1e-3))
            parameter.grad = g
        if not amsgrad:
            reference.step()
    trained = problem.weights()
    for name_, parameter in zip(names, [*matrices, *vectors], strict=True):
        moved = (parameter.detach() - start[name_]).norm()
        assert (trained[name_].double() - parameter.detach()).norm() < 1e-5 * moved, name_


def test_the_adam_rule_is_torch_adam_on_a_gradient():
    """One noise term per step whose coefficient makes it the gradient: f = c'x along z has gradient c z."""
    count = 2048
    x = torch.linspace(-1, 1, count)
    twin = torch.nn.Parameter(x.double())
    reference = torch.optim.AdamW([twin], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    m, v = torch.zeros(count), torch.zeros(count)
    for t in range(1, 9):
        c = (-1) ** t * 0.5 * t
        scalars = {
            "beta1": 0.9, "one_minus_beta1": 0.1, "beta2": 0.99, "one_minus_beta2": 0.01,
            "root_correction": (1 - 0.99**t) ** -0.5, "eps": 1e-8, "step": -1e-2 / (1 - 0.9**t),
        }  # fmt: skip
        ops.rule_step_(x, "adam", [m, v], [t], [c], scalars, keep=1 - 1e-3)
        twin.grad = c * ops.noise_fill(count, t).double()
        reference.step()
    assert (x.double() - twin.detach()).norm() < 1e-6 * twin.detach().norm()


def _parts(optimizer):
    return optimizer.arena.segments, optimizer.arena.parameters


def _drawn(optimizer, seeds) -> torch.Tensor:
    """Directions of the first matrix, one per seed."""
    found = []
    for seed in seeds:
        target = [torch.zeros_like(b) for b in optimizer.arena.buffers]
        for span in optimizer.transform.spans(by_group=False):
            optimizer.transform.add(span, [torch.zeros_like(b) for b in target], [Noise(seed, 1.0)], target=target)
        s = next(s for s in optimizer.arena.segments if matrix_shape(s) == (8, 8))
        found.append(target[s.buffer][s.start : s.start + s.numel])
    return torch.stack(found).double()


@pytest.mark.parametrize("name", ["subzero", "lozo"])
def test_full_rank_is_mezo_in_distribution(name):
    """r = n = m with orthogonal factors: independent normals, by their moments to the fourth."""
    model = torch.nn.Linear(8, 8)
    optimizer = methods.create(name, model, lr=1e-3, rank=8, seed=1, mode="shadow")
    if name == "subzero":
        optimizer.transform.redraw(4)
    else:
        (right,) = [r for r in optimizer.transform.right.values() if r.numel()]
        right.copy_(torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0))).Q.reshape(-1))
    z = _drawn(optimizer, range(4000))
    n = len(z)
    assert z.mean(0).abs().max() < 4.5 / math.sqrt(n)
    covariance = z.T @ z / n
    assert (covariance.diagonal() - 1).abs().max() < 4.5 * math.sqrt(2 / n)
    off = covariance - covariance.diagonal().diag()
    assert off.abs().max() < 5 / math.sqrt(n)
    fourth = z.pow(4).mean().item()
    assert abs(fourth - 3) < 5 * math.sqrt(96 / z.numel())


def test_loren_of_two_on_a_linear_loss_is_mezo_along_the_difference():
    """With a = 0 and no momentum: 1 / (2 eps) (f1 - f2) (w1 - w2), and (w1 - w2) / sqrt(2) is a normal direction."""
    toy = Quadratic()
    start = toy.weights()
    slope = {
        n: torch.randn(p.shape, generator=torch.Generator().manual_seed(k)) for k, (n, p) in enumerate(start.items())
    }

    def linear():
        return sum((slope[n].double() * p.double()).sum() for n, p in toy.model.named_parameters())

    optimizer = toy.optimizer("loren", mode="shadow", lr=1e-3, beta1=0.0, n_queries=2, zo_eps=1e-2)
    optimizer.states["curvature"][0].zero_()
    optimizer.step(linear)
    z1, z2 = directions(optimizer, 0, 0), directions(optimizer, 0, 1)
    v = {n: (z1[n].double() - z2[n].double()) / math.sqrt(2) for n in z1}
    c = sum((slope[n].double() * v[n]).sum().item() for n in v)
    expected = {n: start[n].double() - 1e-3 * c * v[n] for n in v}
    moved = distance(start, expected)
    assert distance(toy.weights(), expected) < 1e-4 * moved


@pytest.mark.parametrize("name", ["subzero-gv", "subzero-greedy"])
def test_guides_in_the_subspace_are_combinations_of_cores(name):
    """The guide s U (sum w Z) V' is the sum of the directions it is made of, to 1e-6."""
    toy = Transformer()
    optimizer = toy.optimizer(name, mode="shadow")
    optimizer.transform.redraw(5)
    weights = [0.5, -0.5, 0.25, -0.25]

    def made(terms):
        target = [torch.zeros_like(b) for b in optimizer.arena.buffers]
        for span in optimizer.transform.spans(by_group=False):
            optimizer.transform.add(span, [torch.zeros_like(b) for b in target], terms, target=target)
        return target[0].double()

    whole = made([Noise(k, w) for k, w in enumerate(weights)])
    parts = sum(w * made([Noise(k, 1.0)]) for k, w in enumerate(weights))
    assert (whole - parts).norm() < 1e-6 * whole.norm()
