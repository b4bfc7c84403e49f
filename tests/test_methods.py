"""Every method in every mode: exactness against written-out formulas, replay, saving, errors that leave no trace."""

import math
import os
import signal

import pytest
import torch
from torch import nn

import zoengine
from zoengine import EvaluationError, FieldError, NonFiniteLossError, methods, ops
from zoengine.noise.seeds import query_seeds

METHODS = tuple(name for name in methods.available() if issubclass(methods.get(name), methods.ZOOptimizer))
MODES = ("inplace", "shadow")
DTYPES = (torch.float32, torch.bfloat16)


class Problem:
    """A small regression: a model with matrices, vectors, tied and frozen weights, and its closure."""

    def __init__(self, dtype=torch.float32) -> None:
        generator = torch.Generator().manual_seed(5)
        self.model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.LayerNorm(40), nn.Linear(40, 1))
        for parameter in self.model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        self.model[0].bias.requires_grad_(False)
        self.model.to(dtype)
        self.x = torch.randn(32, 20, generator=generator).to(dtype)
        self.y = self.x[:, :1] - 0.5 * self.x[:, 1:2]

    def __call__(self) -> torch.Tensor:
        return (self.model(self.x) - self.y).float().square().mean()

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def optimizer(self, name="mezo", **fields) -> methods.ZOOptimizer:
        return methods.create(name, self.model, **{"lr": 1e-3, "seed": 3, **fields})


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def distance(a: dict, b: dict) -> float:
    return math.sqrt(sum((a[k].double() - b[k].double()).square().sum().item() for k in a))


def directions(optimizer, step: int, query: int = 0) -> dict[str, torch.Tensor]:
    """z of a query by parameter name, from the public op."""
    seed = query_seeds(optimizer.fields.seed, step, query).direction
    return {
        s.name: ops.noise_fill(s.shape, seed, offset=s.index, noise=optimizer.fields.noise)
        for s in optimizer.arena.segments
    }


def estimate_by_hand(problem, optimizer, step: int) -> dict[str, torch.Tensor]:
    """The SPSA gradient in float64, tensor by tensor, from the losses of a separate evaluation."""
    fields, theta = optimizer.fields, problem.weights()

    def loss_at(z, scale):
        for name, parameter in problem.model.named_parameters():
            if name in z:
                parameter.data.copy_(theta[name] + scale * z[name])
        value = problem().double().item()
        for name, parameter in problem.model.named_parameters():
            parameter.data.copy_(theta[name])
        return value

    gradient: dict[str, torch.Tensor] = {}
    base = loss_at({}, 0.0)
    for query in range(fields.n_queries):
        z, eps = directions(optimizer, step, query), fields.zo_eps
        other, width = (loss_at(z, -eps), 2 * eps) if fields.two_sided else (base, eps)
        slope = (loss_at(z, eps) - other) / width
        for name, value in z.items():
            gradient[name] = gradient.get(name, 0) + slope / fields.n_queries * value.double()
    return gradient


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize(("n_queries", "two_sided"), [(1, True), (3, True), (1, False), (3, False)])
def test_mezo_is_the_formula(mode, noise, n_queries, two_sided):
    problem = Problem()
    optimizer = problem.optimizer(
        mode=mode, noise=noise, n_queries=n_queries, two_sided=two_sided, zo_eps=1e-2, weight_decay=0.5, lr=1e-2
    )
    expected = {name: p.double() for name, p in problem.weights().items()}
    moved = 0.0
    for step in range(3):
        gradient = estimate_by_hand(problem, optimizer, step)
        for name, g in gradient.items():
            keep = 1 - 1e-2 * 0.5 if expected[name].dim() >= 2 else 1.0
            expected[name] = keep * expected[name] - 1e-2 * g
            moved += (1e-2 * g).square().sum().item()
        optimizer.step(problem)
        assert distance(problem.weights(), expected) < 2e-4 * math.sqrt(moved)
        for name, parameter in problem.model.named_parameters():
            parameter.data.copy_(expected[name])
        expected = {name: p.double() for name, p in problem.weights().items()}
    assert optimizer.forward_passes == 3 * optimizer.forwards_per_step(optimizer.fields)


@pytest.mark.parametrize("mode", MODES)
def test_momentum_is_the_average_of_the_estimates(mode):
    problem = Problem()
    optimizer = problem.optimizer("mezo-momentum", mode=mode, beta1=0.8, lr=1e-2, zo_eps=1e-2)
    momentum, previous = {}, problem.weights()
    for step in range(4):
        gradient = estimate_by_hand(problem, optimizer, step)
        momentum = {name: 0.8 * momentum.get(name, 0) + 0.2 * g for name, g in gradient.items()}
        optimizer.step(problem)
        now = problem.weights()
        for name, m in momentum.items():
            assert torch.allclose(now[name].double() - previous[name].double(), -1e-2 * m, rtol=0, atol=2e-6)
        previous = now


def test_momentum_without_memory_is_mezo():
    plain, momentum = Problem(), Problem()
    start = plain.weights()
    a, b = plain.optimizer(mode="shadow"), momentum.optimizer("mezo-momentum", mode="shadow", beta1=0.0)
    for _ in range(3):
        a.step(plain)
        b.step(momentum)
    assert distance(plain.weights(), momentum.weights()) < 1e-5 * distance(plain.weights(), start)


def test_projected_gradient_is_the_directional_derivative():
    """|c - z'grad| is O(eps^2): two-sided SPSA against autograd in a problem where fp32 does not hide it."""
    problem = Problem()
    errors = []
    for eps in (0.04, 0.02):
        optimizer = problem.optimizer(mode="shadow", zo_eps=eps, lr=0.0)
        z = directions(optimizer, 0)
        problem.model.zero_grad()
        problem().backward()
        named = dict(problem.model.named_parameters())
        exact = sum((named[n].grad.double() * value.double()).sum().item() for n, value in z.items())
        optimizer.step(problem)
        plus, minus = optimizer.last_losses
        errors.append(abs((plus - minus) / (2 * eps) - exact))
    assert 3.5 < errors[0] / errors[1] < 4.5


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_method_lowers_the_loss(name, mode, dtype):
    problem = Problem(dtype)
    before = problem().item()
    optimizer = problem.optimizer(name, mode=mode, lr=3e-2, n_queries=2)
    for _ in range(60):
        optimizer.step(problem)
    assert problem().item() < 0.5 * before


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("two_sided", [True, False])
def test_lr_zero_changes_no_bit_in_shadow(name, dtype, two_sided):
    problem = Problem(dtype)
    problem.model[2].bias.data.fill_(-0.0)
    before = problem.weights()
    optimizer = problem.optimizer(name, mode="shadow", lr=0.0, two_sided=two_sided, weight_decay=0.1)
    for _ in range(5):
        optimizer.step(problem)
    after = problem.weights()
    for key in before:
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(before[key].view(bits), after[key].view(bits))


@pytest.mark.parametrize("name", METHODS)
def test_lr_zero_drifts_little_in_place(name):
    problem = Problem()
    before = problem.weights()
    optimizer = problem.optimizer(name, mode="inplace", lr=0.0)
    for _ in range(20):
        optimizer.step(problem)
    assert 0 < distance(before, problem.weights()) < 1e-6 * math.sqrt(20)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_replay_from_recorded_losses_gives_the_same_bits(name, mode, dtype):
    live, replayed = Problem(dtype), Problem(dtype)
    a = live.optimizer(name, mode=mode, n_queries=2, weight_decay=0.1)
    b = replayed.optimizer(name, mode=mode, n_queries=2, weight_decay=0.1)
    for _ in range(5):
        returned = a.step(live)
        assert b.replay(a.last_losses) == returned
    assert same(live.weights(), replayed.weights())
    assert b.forward_passes == a.forward_passes


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("mode", MODES)
def test_replay_with_the_wrong_number_of_losses_changes_nothing(name, mode):
    problem = Problem()
    optimizer = problem.optimizer(name, mode=mode)
    before = problem.weights()
    for losses in ([], [1.0] * 50):
        with pytest.raises(ValueError, match="losses"):
            optimizer.replay(losses)
        assert optimizer.step_number == 0
        assert distance(before, problem.weights()) < 1e-6


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_saving_and_loading_mid_run_gives_the_same_bits(name, mode, dtype):
    def scheduled(problem):
        optimizer = problem.optimizer(name, mode=mode, lr=2e-3)
        return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=10)

    whole, first, second = Problem(dtype), Problem(dtype), Problem(dtype)
    optimizer, scheduler = scheduled(whole)
    for _ in range(10):
        optimizer.step(whole)
        scheduler.step()
    optimizer, scheduler = scheduled(first)
    for _ in range(5):
        optimizer.step(first)
        scheduler.step()
    saved = optimizer.state_dict(), scheduler.state_dict(), first.weights()
    second.model.load_state_dict(saved[2])
    optimizer, scheduler = scheduled(second)
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    for _ in range(5):
        optimizer.step(second)
        scheduler.step()
    assert same(whole.weights(), second.weights())
    assert all(b.dtype == torch.float32 for buffers in optimizer.states.values() for b in buffers)


def test_loading_a_foreign_state_is_refused():
    optimizer = Problem().optimizer()
    with pytest.raises(ValueError, match="method"):
        optimizer.load_state_dict(Problem().optimizer("mezo-momentum").state_dict())
    with pytest.raises(ValueError, match="seed"):
        optimizer.load_state_dict(Problem().optimizer(seed=4).state_dict())
    with pytest.raises(ValueError, match="zoengine"):
        optimizer.load_state_dict(torch.optim.SGD(Problem().model.parameters(), lr=1.0).state_dict())
    other = methods.create("mezo-momentum", nn.Linear(100, 100), lr=1e-3, seed=3)
    with pytest.raises(ValueError, match="other parameters"):
        Problem().optimizer("mezo-momentum").load_state_dict(other.state_dict())


BAD_CLOSURES = {
    "nan": (lambda loss: loss * float("nan"), NonFiniteLossError, "step 2, evaluation 2 of 2"),
    "inf": (lambda loss: float("inf"), NonFiniteLossError, "run seed 3"),
    "vector": (lambda loss: loss.expand(3), EvaluationError, r"shape \(3,\)"),
    "none": (lambda loss: None, EvaluationError, "None"),
    "text": (lambda loss: "low", EvaluationError, "str"),
    "raising": (lambda loss: 1 / 0, ZeroDivisionError, "division"),
    "interrupt": (lambda loss: os.kill(os.getpid(), signal.SIGINT), KeyboardInterrupt, None),
}


@pytest.mark.parametrize("bad", BAD_CLOSURES)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("mode", MODES)
def test_a_failing_closure_leaves_the_weights_clean(bad, name, mode):
    spoil, error, message = BAD_CLOSURES[bad]
    problem, untroubled = Problem(), Problem()
    optimizer, twin = problem.optimizer(name, mode=mode), untroubled.optimizer(name, mode=mode)
    for _ in range(2):
        optimizer.step(problem)
        twin.step(untroubled)
    before, calls = problem.weights(), []

    def closure():
        calls.append(1)
        return spoil(problem()) if len(calls) == 2 else problem()

    with pytest.raises(error, match=message):
        optimizer.step(closure)
    if mode == "shadow":
        assert same(before, problem.weights())
    else:
        assert distance(before, problem.weights()) < 1e-6
    optimizer.arena.check()
    assert optimizer.step_number == 2
    optimizer.step(problem)  # the step can be taken again
    twin.step(untroubled)
    assert distance(problem.weights(), untroubled.weights()) < (1e-12 if mode == "shadow" else 1e-5)


def test_an_interrupt_while_applying_finishes_the_step():
    problem, untroubled = Problem(), Problem()
    optimizer, twin = problem.optimizer("mezo-momentum"), untroubled.optimizer("mezo-momentum")
    original = optimizer._mode.fold_and_update

    def interrupted(*args):
        original(*args)
        os.kill(os.getpid(), signal.SIGINT)

    optimizer._mode.fold_and_update = interrupted
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(problem)
    twin.step(untroubled)
    assert optimizer.step_number == 1
    assert same(problem.weights(), untroubled.weights())


def test_parameter_groups_bring_their_own_lr_and_decay():
    problem = Problem()
    first, last = problem.model[0].weight, problem.model[3].weight
    optimizer = zoengine.MeZO(
        [{"params": [first], "lr": 0.0}, {"params": [last], "weight_decay": 0.5}], lr=1e-2, seed=1, mode="shadow"
    )
    start = first.detach().clone(), last.detach().clone()
    optimizer.step(problem)
    assert torch.equal(first, start[0])
    plus, minus = optimizer.last_losses
    z = ops.noise_fill(last.shape, query_seeds(1, 0).direction, offset=optimizer.arena.segments[1].index)
    expected = (1 - 1e-2 * 0.5) * start[1].double() - 1e-2 * (plus - minus) / 2e-3 * z.double()
    assert torch.allclose(last.double(), expected, rtol=0, atol=1e-7)


def test_auto_mode_is_shadow_for_sixteen_bit_only():
    assert Problem().optimizer()._mode.__class__.__name__ == "InPlace"
    assert Problem(torch.bfloat16).optimizer()._mode.__class__.__name__ == "Shadow"


@pytest.mark.parametrize("mode", MODES)
def test_closures_may_return_floats_and_need_no_gradient(mode):
    problem = Problem()
    optimizer = problem.optimizer(mode=mode)
    before = problem.weights()
    accuracy = lambda: -float((problem.model(problem.x).sign() == problem.y.sign()).float().mean())  # noqa: E731
    for _ in range(5):
        optimizer.step(accuracy)
    assert distance(before, problem.weights()) > 0


def test_a_replaced_parameter_stops_the_step():
    problem = Problem()
    optimizer = problem.optimizer()
    problem.model.to(torch.bfloat16)
    with pytest.raises(zoengine.ArenaError, match="build the optimizer after"):
        optimizer.step(problem)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "needs a value for lr"),
        ({"lr": -1e-3}, "lr must be at least 0"),
        ({"lr": float("nan")}, "lr must be finite"),
        ({"lr": "1e-3"}, "lr must be of type float"),
        ({"lr": 1e-3, "zo_eps": 0.0}, "zo_eps must be greater than 0"),
        ({"lr": 1e-3, "zo_eps": -1e-3}, "zo_eps must be greater than 0"),
        ({"lr": 1e-3, "n_queries": 0}, "n_queries must be at least 1"),
        ({"lr": 1e-3, "n_queries": 1.0}, "n_queries must be of type int"),
        ({"lr": 1e-3, "n_queries": True}, "n_queries must be of type int"),
        ({"lr": 1e-3, "two_sided": 1}, "two_sided must be of type bool"),
        ({"lr": 1e-3, "weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"lr": 1e-3, "seed": 2**64}, "64 bits"),
        ({"lr": 1e-3, "noise": "uniform"}, "one of gaussian, rademacher"),
        ({"lr": 1e-3, "mode": "streamed"}, "one of auto, inplace, shadow"),
        ({"lr": 1e-3, "eps": 1e-3}, "did you mean 'zo_eps'"),
        ({"lr": 1e-3, "beta1": 0.9}, "no field 'beta1'"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(FieldError, match=message):
        zoengine.MeZO(Problem().model, **fields)


def test_a_group_with_a_bad_lr_is_refused():
    with pytest.raises(FieldError, match="lr must be at least 0"):
        zoengine.MeZO([{"params": [Problem().model[0].weight], "lr": -1.0}], lr=1e-3)
    with pytest.raises(FieldError, match="momentum"):
        zoengine.MeZO([{"params": [Problem().model[0].weight], "momentum": 0.9}], lr=1e-3)


def test_beta1_must_be_below_one():
    with pytest.raises(FieldError, match=r"beta1 must be in \[0, 1\)"):
        Problem().optimizer("mezo-momentum", beta1=1.0)


def test_unknown_method_suggests_the_nearest():
    with pytest.raises(FieldError, match="did you mean 'mezo'"):
        methods.create("mezzo", Problem().model, lr=1e-3)


def test_parameter_groups_cannot_be_added_later():
    optimizer = Problem().optimizer()
    with pytest.raises(RuntimeError, match="build a new optimizer"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})


def test_dropout_in_training_mode_is_warned_about(caplog):
    model = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5)).train()
    zoengine.MeZO(model, lr=1e-3).step(lambda: model(torch.ones(1, 3)).sum())
    assert "dropout" in caplog.text
