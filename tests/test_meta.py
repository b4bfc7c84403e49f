"""Meta-training of ZO Fine-tuner: its gradient against autograd through the whole step, and weights that come back."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from zoengine import ArenaError, EvaluationError, FieldError, NonFiniteLossError, ops, pertnn
from zoengine.meta import MetaTrainer
from zoengine.noise.seeds import query_seeds

pytestmark = pytest.mark.usefixtures("one_thread")


class Problem:
    """A small regression with three blocks, one of them unused."""

    def __init__(self, dtype=torch.float32) -> None:
        generator = torch.Generator().manual_seed(5)
        self.model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 1, bias=False))
        self.model.register_parameter("unused", nn.Parameter(torch.ones(7)))
        for parameter in self.model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        self.model.to(dtype)
        self.x = torch.randn(16, 20, generator=generator).to(dtype)
        self.y = self.x[:, :1] * 2

    def __call__(self) -> torch.Tensor:
        return (self.model(self.x) - self.y).float().square().mean()

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def trainer(self, **fields) -> MetaTrainer:
        return MetaTrainer(self.model, **{"fo_lr": 1e-2, "zo_lr": 1e-2, "hidden": 6, "seed": 3, **fields})


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def trained(trainer):
    """Give the networks something to say."""
    for k, parameter in enumerate(trainer.networks.parameters()):
        parameter.data = ops.noise_fill(parameter.shape, 70 + k) * 0.2
    return trainer


@pytest.mark.parametrize("reading", pertnn.READINGS)
@pytest.mark.parametrize("feed_normalised", [True, False])
def test_the_networks_follow_the_gradient_of_the_whole_step(reading, feed_normalised):
    """dJ/dw by autograd in float64, from the networks through sigma, s, u and theta1 to the loss, c held constant."""
    problem = Problem()
    trainer = trained(
        problem.trainer(
            zoft_reading=reading, feed_normalised=feed_normalised, meta_normalise=False, meta_lr=0.5, zo_lr=0.05
        )
    )
    names = [s.name for s in trainer.arena.segments]
    numels = torch.tensor([s.numel for s in trainer.arena.segments], dtype=torch.float64)
    model = Problem(torch.float64)
    sigma, losses = torch.ones(len(names), dtype=torch.float64), None

    def loss(theta):
        return (functional_call(model.model, theta, (model.x,)) - model.y).square().mean()

    for step in range(3):
        theta = {name: p.double() for name, p in problem.weights().items()}
        z = {
            s.name: ops.noise_fill(s.shape, query_seeds(3, step).direction, offset=s.index).double()
            for s in trainer.arena.segments
        }
        losses = losses or [loss(theta).item()] * 2
        weights = [p.detach().double().requires_grad_() for p in trainer.networks.parameters()]
        first, last, first_bias, last_bias = weights
        mean = torch.stack([theta[n].mean() for n in names])
        var = torch.stack([theta[n].var(unbiased=False) for n in names])
        x = pertnn.features(losses, sigma, mean, var).unsqueeze(1)
        x = (torch.tanh(x @ first + first_bias) @ last + last_bias).flatten()
        one = math.log(math.e - 1)
        sigma = nn.functional.softplus(5 * torch.tanh(x / 5) + one)
        kappa = (numels.sum() / (numels * sigma.square()).sum()).sqrt()
        s = kappa * sigma if reading == "std" else (kappa * sigma).sqrt()

        def moved(coeff, theta=theta, s=s, z=z):
            return {name: theta[name] + coeff * s[k] * z[name] for k, name in enumerate(names)}

        losses = [loss(moved(eps)).item() for eps in (1e-3, -1e-3)]
        c = (losses[0] - losses[1]) / 2e-3
        loss(moved(-0.05 * c)).backward()
        row = trainer.step(problem)
        assert row["projected_gradient"] == pytest.approx(c, rel=1e-2)
        for before, after in zip(weights, trainer.networks.parameters(), strict=True):
            change = (after.detach().double() - before.detach()) / -0.5
            assert (change - before.grad).norm() < 2e-2 * before.grad.norm() + 1e-7
            assert before.grad.norm() > 1e-5
        sigma = ((kappa if feed_normalised else 1.0) * sigma).detach()
    assert row["scale_min"] < 0.99 < 1.01 < row["scale_max"]


def test_the_normalised_gradient_is_the_literal_one_rescaled_and_knows_no_unit_of_loss():
    def change(times=1.0, **fields):
        problem = Problem()
        trainer = trained(problem.trainer(zo_lr=0.02 / times, **fields))
        trainer._sigma.mul_(torch.tensor([1.0, 2.0, 0.5, 1.0]))
        trainer._losses, trainer._first = (0.5, 0.5), 1.0  # what the networks see stays the same
        before = [p.detach().clone() for p in trainer.networks.parameters()]
        trainer.step(lambda: times * problem())
        after = [p.detach() for p in trainer.networks.parameters()]
        return torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)])

    normalised, louder, literal = change(), change(100.0), change(meta_normalise=False)
    assert torch.allclose(normalised, louder, rtol=2e-2, atol=1e-3 * normalised.norm().item())
    cosine = (normalised @ literal) / (normalised.norm() * literal.norm())
    assert cosine > 0.999 and abs(math.log(normalised.norm() / literal.norm())) > 0.5


@pytest.mark.parametrize("reuse", [False, True])
def test_the_trajectory_is_sgd(reuse):
    problem, plain = Problem(), Problem()
    trainer = problem.trainer(zoft_reuse_grad=reuse, zo_lr=1e-9)  # so small that the judged step stays at theta
    optimizer = torch.optim.SGD(plain.model.parameters(), lr=1e-2)
    for _ in range(4):
        row = trainer.step(problem)
        optimizer.zero_grad()
        plain().backward()
        optimizer.step()
    now, expected = problem.weights(), plain.weights()
    assert all(torch.allclose(now[name], expected[name], rtol=1e-5, atol=1e-6) for name in now)
    assert row["backward_passes"] == (4 if reuse else 8)
    assert row["forward_passes"] == 1 + 2 * 4 + row["backward_passes"]
    assert all(p.grad is None for p in problem.model.parameters())


def test_a_parameter_that_a_batch_does_not_reach_stays_where_it_is():
    problem = Problem()
    trainer = problem.trainer()
    trainer.step(lambda: problem() + problem.model.unused.square().sum())
    before = problem.weights()
    trainer.step(problem)
    after = problem.weights()
    assert torch.equal(before["unused"], after["unused"]) and not torch.equal(before["0.weight"], after["0.weight"])


def test_the_change_of_the_loss_is_that_of_the_judged_step():
    problem = Problem()
    trainer = problem.trainer(zo_lr=1e-2)
    before, theta = problem().item(), problem.weights()
    row = trainer.step(problem)
    seed = query_seeds(3, 0).direction
    with torch.no_grad():
        for s, parameter in zip(trainer.arena.segments, trainer.arena.parameters, strict=True):
            z = ops.noise_fill(s.shape, seed, offset=s.index)
            parameter.copy_(theta[s.name] - 1e-2 * row["projected_gradient"] * z)  # untrained: s = 1
    assert row["change"] == pytest.approx(problem().item() - before, rel=1e-3)


class Stop(BaseException):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("calls", [None, 1, 3, 8])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Stop])
def test_the_weights_come_back_whatever_is_thrown(dtype, calls, error):
    problem, made = Problem(dtype), []
    problem.model[0].bias.data.fill_(-0.0)
    before = problem.weights()

    def closure():
        made.append(1)
        if len(made) == calls:
            raise error("thrown")
        return problem()

    try:
        with problem.trainer() as trainer:
            for _ in range(3):
                trainer.step(closure)
            assert not same(before, problem.weights())
    except (RuntimeError, KeyboardInterrupt, Stop):
        assert calls is not None
    after = problem.weights()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert all(torch.equal(before[k].view(bits), after[k].view(bits)) for k in before)
    problem().backward()
    assert problem.model[0].weight.grad is not None, "gradients are the user's own again"


def test_a_cycle_ends_after_its_steps_and_everything_starts_anew():
    problem = Problem()
    before = problem.weights()
    trainer = trained(problem.trainer(cycle_steps=3, reset_loss=0.0))
    resets = []
    for _ in range(7):
        resets.append(trainer.step(problem)["reset"])
        assert same(before, problem.weights()) == resets[-1]
        assert bool((trainer._sigma == 1).all()) == resets[-1]
    assert resets == [False, False, True, False, False, True, False]


def test_a_cycle_ends_early_when_the_loss_has_fallen():
    problem = Problem()
    losses, resets = [], []
    trainer = problem.trainer(fo_lr=0.1, reset_loss=0.5)
    for _ in range(60):
        row = trainer.step(problem)
        losses.append(row["loss"])
        resets.append(row["reset"])
    first = resets.index(True)
    smooth = losses[0]
    for loss in losses[1:first]:
        smooth = 0.9 * smooth + 0.1 * loss
        assert smooth >= 0.5 * losses[0]
    assert 0.9 * smooth + 0.1 * losses[first] < 0.501 * losses[0]
    assert losses[first + 1] == pytest.approx(losses[0], rel=1e-2)
    assert sum(resets) >= 2


def test_sixteen_bit_weights_walk_by_stochastic_rounding():
    """fo_lr |gradient| is far below half an ulp: to nearest nothing would ever move."""
    problem = Problem(torch.bfloat16)
    trainer = problem.trainer(fo_lr=1e-4, reset_loss=0.0)
    start, gradient = problem.weights()["0.weight"].float(), None
    for _ in range(40):
        trainer.step(problem)
        gradient = gradient if gradient is not None else trainer.arena.views(trainer._gradient)[0].clone()
    moved = problem.weights()["0.weight"].float() - start
    assert (moved * gradient).sum() / gradient.square().sum() == pytest.approx(-40e-4, rel=0.5)


def test_the_same_seed_gives_the_same_networks_and_another_one_others():
    def networks(seed):
        problem = Problem()
        trainer = problem.trainer(seed=seed)
        for _ in range(3):
            trainer.step(problem)
        return {name: p.detach() for name, p in trainer.networks.named_parameters()}

    assert same(networks(3), networks(3)) and not same(networks(3), networks(4))


def test_learning_goes_on_from_given_networks(tmp_path):
    problem = Problem()
    trainer = problem.trainer()
    for _ in range(2):
        trainer.step(problem)
    trainer.close()
    path = pertnn.save(trainer.networks, tmp_path / "n.safetensors")
    there = pertnn.load(path, pertnn.blocks_of(trainer.arena.segments))
    again = Problem().trainer(networks=there)
    assert same(dict(trainer.networks.named_parameters()), dict(again.networks.named_parameters()))
    with pytest.raises(FieldError, match="other blocks"):
        MetaTrainer(nn.Linear(2, 2), networks=there, fo_lr=1.0)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda loss: loss * math.nan, NonFiniteLossError, "step 1"),
        (lambda loss: loss.item(), EvaluationError, "needs the gradient"),
        (lambda loss: loss.detach(), EvaluationError, "needs the gradient"),
        (lambda loss: None, EvaluationError, "None"),
        (lambda loss: loss.expand(3), EvaluationError, "shape"),
    ],
)
def test_a_bad_loss_stops_the_step_and_changes_nothing(spoil, error, message):
    problem = Problem()
    trainer = problem.trainer()
    trainer.step(problem)
    before, networks = problem.weights(), [p.detach().clone() for p in trainer.networks.parameters()]
    with pytest.raises(error, match=message):
        trainer.step(lambda: spoil(problem()))
    assert same(before, problem.weights())
    assert all(torch.equal(a, b) for a, b in zip(networks, trainer.networks.parameters(), strict=True))
    trainer.step(problem)


def test_a_gradient_that_is_not_finite_is_refused():
    class Spiteful(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * math.inf

    problem = Problem()
    trainer = problem.trainer()
    before = [p.detach().clone() for p in trainer.networks.parameters()]
    with pytest.raises(NonFiniteLossError):
        trainer.step(lambda: Spiteful.apply(problem()))
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.networks.parameters(), strict=True))


def test_a_replaced_parameter_is_noticed():
    problem = Problem()
    trainer = problem.trainer()
    problem.model.to(torch.bfloat16)
    with pytest.raises(ArenaError):
        trainer.step(problem)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "needs a value for fo_lr"),
        ({"fo_lr": 0.0}, "fo_lr must be greater than 0"),
        ({"fo_lr": 1.0, "zo_lr": -1.0}, "zo_lr must be greater than 0"),
        ({"fo_lr": 1.0, "meta_lr": math.nan}, "meta_lr must be finite"),
        ({"fo_lr": 1.0, "hidden": 0}, "hidden must be at least 1"),
        ({"fo_lr": 1.0, "reset_loss": 1.0}, r"reset_loss must be in \[0, 1\)"),
        ({"fo_lr": 1.0, "zoft_reading": "var"}, "one of std, alg1"),
        ({"fo_lr": 1.0, "seed": 2**64}, "64 bits"),
        ({"fo_lr": 1.0, "metalr": 1.0}, "did you mean 'meta_lr'"),
        ({"fo_lr": 1.0, "cycle_steps": 0}, "cycle_steps must be at least 1"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(FieldError, match=message):
        MetaTrainer(Problem().model, **fields)
