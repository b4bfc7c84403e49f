"""MeZO and what every optimizer inherits: the update written out, errors that leave no trace, refused arguments."""

import math
import os
import signal

import pytest
import torch
from torch import nn
from toys import Problem, directions, distance, same

import zoengine
from zoengine import EvaluationError, FieldError, NonFiniteLossError, methods, ops
from zoengine.directions import Fold, FoldAndUpdate, Noise, State, Update
from zoengine.methods import spsa
from zoengine.noise.seeds import query_seeds
from zoengine.transforms import States

MODES = ("inplace", "shadow")

pytestmark = pytest.mark.usefixtures("one_thread")


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


class AlongStates(methods.MeZO):
    """Queries and moves along states that the same step folds: what no method does, and all of it has to be undone."""

    name = "along-states"
    state_names = ("first", "second")
    request = "update first"

    def run(self, step):
        noise = Noise(step.seed(), 1.0)
        estimate = yield from spsa.estimate(step, self.fields, [[noise, State("first", 1.0)]])
        fold = Fold("first", 0.5, [noise])
        if self.request == "apart":
            yield fold
            yield Update([State("first", 1.0)])
        else:
            others = [State("second", 1.0)] if "other" in self.request else []
            update = Update([State("first", 1.0), *others])
            yield FoldAndUpdate(fold, update, fold_first="fold first" in self.request)
        return estimate.loss


@pytest.mark.parametrize(
    "request_", ["apart", "fold first", "update first", "fold first, other", "update first, other"]
)
@pytest.mark.parametrize("mode", MODES)
def test_folds_and_updates_in_either_order(mode, request_):
    problem = Problem()
    optimizer = AlongStates(problem.model, mode=mode, lr=0.5, seed=3, zo_eps=0.25)
    optimizer.request = request_
    start, first = problem.weights(), 2.0
    for name, value in (("first", first), ("second", 10.0)):
        optimizer.states[name][0].fill_(value)
    optimizer.replay([1.0, 1.0])
    for name, z in directions(optimizer, 0).items():
        new = 0.5 * first + z
        along = (first if "update first" in request_ else new) + (10.0 if "other" in request_ else 0.0)
        assert torch.allclose(problem.weights()[name], start[name] - 0.5 * along, rtol=0, atol=2e-6), name
        s = next(s for s in optimizer.arena.segments if s.name == name)
        state = optimizer.states["first"][0][s.start : s.start + s.numel]
        assert torch.allclose(state, new.flatten(), rtol=0, atol=1e-6)


def test_a_state_of_norm_zero_contributes_nothing():
    states = States()
    assert states.coefficient(State("m", 2.0, unit=True)) == 0.0
    for square, expected in ((0.0, 0.0), (4.0, 1.0)):
        states.squares["m"] = torch.tensor([square], dtype=torch.float64)
        assert states.coefficient(State("m", 2.0, unit=True)).item() == expected


@pytest.mark.parametrize("mode", MODES)
def test_every_rounding_has_its_own_seed(mode, monkeypatch):
    """The update's is that of the noise stream; the passes of the queries take others, the same ones in a replay."""
    optimizer, seeds = Problem(torch.bfloat16).optimizer(mode=mode), []
    original = ops.add_noise_
    monkeypatch.setattr(
        ops,
        "add_noise_",
        lambda *args, **given: seeds.append((given["rounding"], given["sr_seed"])) or original(*args, **given),
    )
    found = []
    for step in range(2):
        seeds.clear()
        optimizer.replay([1.002, 1.0]) if mode == "inplace" else optimizer.step(iter([1.002, 1.0]).__next__)
        *queries, (rounding, last) = seeds
        assert rounding == "stochastic" and last == query_seeds(3, step).rounding
        assert len(queries) == 2
        assert all(how == ("stochastic" if mode == "inplace" else "nearest") for how, _ in queries)
        found += [seed for how, seed in seeds if how == "stochastic"]
    assert len(set(found)) == len(found)


def test_a_saved_state_does_not_change_with_the_optimizer():
    problem = Problem()
    optimizer = problem.optimizer("conmezo")
    saved = optimizer.state_dict()
    optimizer.step(problem)
    assert saved["zoengine"]["memory"] == {"started": False}
    optimizer.load_state_dict(saved)
    optimizer.step(problem)
    assert saved["zoengine"]["memory"] == {"started": False}


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
@pytest.mark.parametrize("mode", MODES)
def test_a_failing_closure_leaves_the_weights_clean(bad, mode):
    spoil, error, message = BAD_CLOSURES[bad]
    problem, untroubled = Problem(), Problem()
    optimizer, twin = problem.optimizer(mode=mode), untroubled.optimizer(mode=mode)
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
