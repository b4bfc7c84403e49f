"""ZO Fine-tuner as a method: MeZO when all strengths are equal, the formula when not, and better where it should be."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from zoengine import FieldError, methods, ops, pertnn
from zoengine.meta import MetaTrainer
from zoengine.methods import zo_finetuner
from zoengine.noise.seeds import query_seeds
from zoengine.pertnn import PertNN, PertNNError

pytestmark = pytest.mark.usefixtures("one_thread")

MODES = ("inplace", "shadow")
DTYPES = (torch.float32, torch.bfloat16)


class Problem:
    """A small regression with matrices, vectors, an empty parameter and one whose variance is 0."""

    def __init__(self, dtype=torch.float32) -> None:
        generator = torch.Generator().manual_seed(5)
        self.model = nn.Sequential(nn.Linear(20, 60), nn.Tanh(), nn.LayerNorm(60, bias=False), nn.Linear(60, 1))
        for parameter in [*self.model[0].parameters(), *self.model[3].parameters()]:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        self.model.register_parameter("empty", nn.Parameter(torch.zeros(0, 3)))
        self.model.to(dtype)
        self.x = torch.randn(32, 20, generator=generator).to(dtype)
        self.y = self.x[:, :1] - 0.5 * self.x[:, 1:2]

    def __call__(self) -> torch.Tensor:
        return (self.model(self.x) - self.y).float().square().mean()

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def optimizer(self, name="zo-finetuner", **fields) -> methods.ZOOptimizer:
        return methods.create(name, self.model, **{"lr": 1e-3, "seed": 3, **fields})


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Networks for Problem's blocks whose strengths differ and depend on every input."""
    networks = PertNN(pertnn.blocks_of(Problem().optimizer("mezo").arena.segments), hidden=6)
    for k, parameter in enumerate(networks.parameters()):
        parameter.data = ops.noise_fill(parameter.shape, 90 + k) * 0.5
    return str(pertnn.save(networks, tmp_path_factory.mktemp("networks") / "n.safetensors"))


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    """Networks that give every block the same sigma, which is not 1."""
    networks = PertNN(pertnn.blocks_of(Problem().optimizer("mezo").arena.segments))
    networks.biases[-1].data.fill_(0.7)
    return str(pertnn.save(networks, tmp_path_factory.mktemp("networks") / "common.safetensors"))


def factors(optimizer) -> list[float]:
    """s of every segment, as fp32, from the tiles the kernels read."""
    found = optimizer.transform._factors
    return [found[s.buffer][s.start // 1024].item() if s.numel else 1.0 for s in optimizer.arena.segments]


@pytest.mark.parametrize("which", ["untrained", "common"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n_queries": 3, "weight_decay": 0.3, "noise": "rademacher"},
        {"two_sided": False, "n_queries": 2},
        {"n_queries": 3, "weighting": "rloo"},
    ],
)
def test_equal_strengths_are_mezo_bit_for_bit(which, dtype, mode, fields, common):
    plain, learned = Problem(dtype), Problem(dtype)
    a = plain.optimizer("mezo", mode=mode, lr=1e-2, **fields)
    b = learned.optimizer(mode=mode, lr=1e-2, zoft_file=common if which == "common" else "", **fields)
    for step in range(4):
        assert a.step(plain) == b.step(learned)
        assert b.last_losses[step == 0 :] == a.last_losses
    assert same(plain.weights(), learned.weights())
    assert b.forward_passes == a.forward_passes + 1
    assert set(factors(b)) == {1.0}
    if which == "common":
        optimizer = learned.optimizer(feed_normalised=False, zoft_file=common)
        optimizer.step(learned)
        assert (optimizer.states["sigma"][0] > 1.3).all()


@pytest.mark.parametrize("reading", pertnn.READINGS)
@pytest.mark.parametrize("feed_normalised", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_the_formula(reading, feed_normalised, mode, file):
    problem = Problem()
    optimizer = problem.optimizer(
        zoft_file=file, zoft_reading=reading, feed_normalised=feed_normalised, mode=mode, lr=1e-2, zo_eps=1e-2
    )
    segments = optimizer.arena.segments
    networks = pertnn.load(file, pertnn.blocks_of(segments))
    numels = torch.tensor([s.numel for s in segments], dtype=torch.float64)
    sigma, losses, seen = torch.ones(len(segments), dtype=torch.float64), [problem().item()] * 2, []
    for step in range(4):
        theta = problem.weights()
        x = [theta[s.name].double() for s in segments]
        mean = torch.stack([v.mean() if v.numel() else v.sum() for v in x])
        var = torch.stack([v.var(unbiased=False) if v.numel() else v.sum() for v in x])
        with torch.no_grad():
            sigma = networks(pertnn.features(losses, sigma, mean, var))
        normalised = sigma * (numels.sum() / (numels * sigma**2).sum()).sqrt()
        s = dict(zip([s.name for s in segments], normalised if reading == "std" else normalised.sqrt(), strict=True))
        sigma = normalised if feed_normalised else sigma
        seed = query_seeds(3, step).direction
        u = {g.name: s[g.name] * ops.noise_fill(g.shape, seed, offset=g.index).double() for g in segments}
        optimizer.step(problem)
        plus, minus = losses = optimizer.last_losses[-2:]
        c, now = (plus - minus) / 2e-2, problem.weights()
        for name in theta:
            assert torch.allclose(now[name].double() - theta[name], -1e-2 * c * u[name], rtol=0, atol=4e-7)
        assert optimizer.memory["losses"] == pytest.approx(losses, rel=1e-12)
        assert torch.allclose(optimizer.states["sigma"][0].double(), sigma, rtol=1e-4)
        seen.append(factors(optimizer))
        total = sum(g.numel * f**2 for g, f in zip(segments, seen[-1], strict=True))
        if reading == "std":
            assert total == pytest.approx(numels.sum().item(), rel=1e-6)
        else:
            assert total < 0.999 * numels.sum().item()
    assert max(seen[0]) > 1.2 * min(seen[0]) and seen[0] != seen[1] != seen[2]


@pytest.mark.parametrize(
    ("fields", "asked", "seen"),
    [({}, [5.0, 3.0, 1.0, 7.0, 2.0], [5.0, 1.5]), ({"two_sided": False}, [2.0, 2.0, 3.0, 5.0], [4.0, 0.0])],
)
def test_the_networks_see_the_means_over_the_queries(fields, asked, seen):
    optimizer = Problem().optimizer(n_queries=2, zo_eps=1e-2, **fields)
    optimizer.replay(asked)
    assert optimizer.memory["losses"] == pytest.approx(seen)


def test_a_step_launches_the_statistics_once(file, monkeypatch):
    problem, launches = Problem(), []
    optimizer = problem.optimizer(zoft_file=file)
    original = ops.segment_stats
    monkeypatch.setattr(ops, "segment_stats", lambda *args: launches.append(1) or original(*args))
    for _ in range(3):
        optimizer.step(problem)
    assert len(launches) == 3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_replay_gives_the_same_bits(mode, dtype, file):
    live, replayed = Problem(dtype), Problem(dtype)
    a, b = (p.optimizer(zoft_file=file, mode=mode, n_queries=2, weight_decay=0.1) for p in (live, replayed))
    for _ in range(5):
        returned = a.step(live)
        assert b.replay(a.last_losses) == returned
    assert same(live.weights(), replayed.weights())
    assert a.memory == b.memory and torch.equal(a.states["sigma"][0], b.states["sigma"][0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("after", [0, 1, 5])
def test_saving_and_loading_mid_run_gives_the_same_bits(mode, dtype, after, file, tmp_path):
    """Through the files of a checkpoint; the networks come from it too."""
    checkpoint = pytest.importorskip("zoengine.trainer.checkpoint")
    whole, first, second = Problem(dtype), Problem(dtype), Problem(dtype)
    optimizer = whole.optimizer(zoft_file=file, mode=mode)
    for _ in range(10):
        optimizer.step(whole)
    optimizer = first.optimizer(zoft_file=file, mode=mode)
    for _ in range(after):
        optimizer.step(first)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    checkpoint.save_optimizer(tmp_path, optimizer, scheduler)
    second.model.load_state_dict(first.weights())
    optimizer = second.optimizer(zoft_file=file, mode=mode)
    for parameter in optimizer.networks.parameters():
        parameter.data.zero_()
    checkpoint.load_optimizer(tmp_path, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))
    for _ in range(10 - after):
        optimizer.step(second)
    assert same(whole.weights(), second.weights())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_failing_closure_leaves_strengths_as_they_were(mode, call, file):
    problem, untroubled = Problem(), Problem()
    optimizer, twin = (p.optimizer(zoft_file=file, mode=mode) for p in (problem, untroubled))
    made = []

    def closure():
        made.append(1)
        return problem() / (len(made) != call)

    with pytest.raises((ZeroDivisionError, FloatingPointError)):
        optimizer.step(closure)
    assert optimizer.memory == {"losses": None} and (optimizer.states["sigma"][0] == 1).all()
    for _ in range(2):
        optimizer.step(problem)
        twin.step(untroubled)
    a, b = problem.weights(), untroubled.weights()
    assert all(torch.allclose(a[k], b[k], rtol=0, atol=1e-5 if mode == "inplace" else 0) for k in a)


class Quadratic(nn.Module):
    """Two blocks whose curvatures are 100 and 1."""

    def __init__(self, seed=0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.stiff = nn.Parameter(torch.randn(40, generator=generator))
        self.soft = nn.Parameter(torch.randn(60, generator=generator))

    def forward(self) -> torch.Tensor:
        return 50 * self.stiff.square().sum() + 0.5 * self.soft.square().sum()


@pytest.fixture(scope="module")
def for_quadratics(tmp_path_factory):
    """Networks meta-trained on one quadratic."""
    model = Quadratic()
    with MetaTrainer(model, fo_lr=3e-3, zo_lr=1e-3, cycle_steps=20, hidden=16) as trainer:
        for _ in range(300):
            trainer.step(model)
    return str(pertnn.save(trainer.networks, tmp_path_factory.mktemp("quadratic") / "n.safetensors"))


def test_a_stiff_block_is_perturbed_less_and_the_loss_falls_further(for_quadratics):
    """On another quadratic than the one learned on, at the same forwards and each at its best learning rate."""

    def final(name, lr, **fields):
        model = Quadratic(seed=1)
        optimizer = methods.create(name, model, lr=lr, mode="shadow", **fields)
        try:
            while optimizer.forward_passes < 2000:
                optimizer.step(model)
        except FloatingPointError:
            return math.inf, optimizer
        return model().item(), optimizer

    tried = [final("mezo", lr)[0] for lr in (2.5e-5, 5e-5, 1e-4, 4e-4)]
    mezo = min(tried)
    assert mezo < min(tried[0], tried[-1]), "its best rate lies between those tried"
    learned, optimizer = min(
        (final("zo-finetuner", lr, zoft_file=for_quadratics) for lr in (4e-4, 8e-4, 1.6e-3)), key=lambda found: found[0]
    )
    strengths = dict(zip([s.name for s in optimizer.arena.segments], factors(optimizer), strict=True))
    assert strengths["stiff"] < 0.6 < 1.1 < strengths["soft"]
    assert learned < 0.4 * mezo


def test_networks_for_another_model_are_refused(file):
    model = Problem().model
    model[3] = nn.Linear(60, 2)
    with pytest.raises(PertNNError, match=r"2 differences\): '3.weight' is \(2, 60\) here and \(1, 60\) in the file"):
        methods.create("zo-finetuner", model, lr=1.0, zoft_file=file)
    with pytest.raises(PertNNError, match=r"'parameters\[0\]'"):
        methods.create("zo-finetuner", Problem().model.parameters(), lr=1.0, zoft_file=file)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"zoft_file": "none.safetensors"}, PertNNError, "there is no file none.safetensors"),
        ({"zoft_file": 3}, FieldError, "zoft_file must be of type str"),
        ({"zoft_reading": "variance"}, FieldError, "one of std, alg1"),
        ({"feed_normalised": 1}, FieldError, "feed_normalised must be of type bool"),
        ({"zoft_files": ""}, FieldError, "did you mean 'zoft_file'"),
    ],
)
def test_bad_fields_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        Problem().optimizer(**fields)


def test_another_reading_than_the_networks_were_trained_with_is_warned_about(file, tmp_path, caplog):
    problem = Problem()
    networks = pertnn.load(file, pertnn.blocks_of(problem.optimizer("mezo").arena.segments))
    about = {"zoft_reading": "std", "feed_normalised": "True"}
    path = str(pertnn.save(networks, tmp_path / "n.safetensors", about))
    problem.optimizer(zoft_file=path)
    assert not caplog.text
    problem.optimizer(zoft_file=path, zoft_reading="alg1")
    assert "zoft_reading=std are used with alg1" in caplog.text


def test_every_default_stands_in_one_place():
    from zoengine.meta import MetaFields

    kinds = zo_finetuner.ZOFinetunerFields, MetaFields
    here, there = ({field.name: field.default for field in dataclasses.fields(kind)} for kind in kinds)
    assert all(here[name] == there[name] for name in here.keys() & there.keys())
