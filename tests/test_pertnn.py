"""The networks of ZO Fine-tuner: their formulas, their normalisation, and the file they travel in."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from zoengine import pertnn
from zoengine.arena import Arena
from zoengine.ops import noise_fill
from zoengine.pertnn import Block, PertNN, PertNNError, Statistics

pytestmark = pytest.mark.usefixtures("one_thread")

NUMELS = torch.tensor([576.0 * 49152, 576, 576 * 576, 192 * 576, 1, 0], dtype=torch.float64).repeat(48)


def blocks(count=4):
    return [Block(f"layers.{k}.weight", (k + 1, 3)) for k in range(count)]


def trained(count=4, *, seed=3, **sizes):
    """Networks whose last layer is not zero either."""
    networks = PertNN(blocks(count), **sizes)
    for k, parameter in enumerate(networks.parameters()):
        parameter.data = noise_fill(parameter.shape, seed + k) / math.sqrt(parameter.shape[1])
    return networks


@pytest.mark.parametrize("sizes", [{}, {"hidden": 8, "hidden_layers": 3}])
def test_untrained_networks_say_exactly_one(sizes):
    networks = PertNN(blocks(37), **sizes)  # 37: vectorised and scalar code both run
    sigma = networks(noise_fill((37, 5), 1).double() * 10)
    assert sigma.dtype == torch.float64 and torch.equal(sigma, torch.ones(37, dtype=torch.float64))


@pytest.mark.parametrize("reading", pertnn.READINGS)
def test_a_common_sigma_gives_a_scale_of_exactly_one(reading):
    for common in (1.0, 1e-3, 0.3, math.pi, 5.5, 1e3):
        normalised = pertnn.normalise(torch.full_like(NUMELS, common), NUMELS)
        assert torch.equal(pertnn.scales(normalised, reading).float(), torch.ones(len(NUMELS)))


def test_the_square_sum_is_the_number_of_elements():
    sigma = noise_fill(len(NUMELS), 2).double().exp()
    normalised = pertnn.normalise(sigma, NUMELS)
    standard = pertnn.scales(normalised, "std")
    assert torch.allclose(standard / sigma, (standard / sigma)[0], rtol=1e-12)
    assert abs((NUMELS * standard.square()).sum() / NUMELS.sum() - 1) < 1e-12
    assert abs((NUMELS * standard.float().double().square()).sum() / NUMELS.sum() - 1) < 1e-6
    literal = pertnn.scales(normalised, "alg1")
    assert torch.allclose(literal.square(), standard, rtol=1e-12)
    assert (NUMELS * literal.square()).sum() < 0.95 * NUMELS.sum()


@pytest.mark.parametrize("reading", pertnn.READINGS)
def test_gradient_of_sigma_is_autograds(reading):
    sigma = noise_fill(len(NUMELS), 4).double().exp().requires_grad_()
    d_scales = noise_fill(len(NUMELS), 5).double()
    (pertnn.scales(pertnn.normalise(sigma, NUMELS), reading) * d_scales).sum().backward()
    found = pertnn.gradient_of_sigma(d_scales, sigma.detach(), NUMELS, reading)
    assert torch.allclose(found, sigma.grad, rtol=1e-10, atol=1e-14)
    assert abs((found * sigma.detach()).sum()) < 1e-12 * found.norm() * sigma.detach().norm()


def test_all_networks_at_once_are_the_networks_one_by_one():
    networks = trained(5, hidden=7, hidden_layers=2).double()
    inputs = noise_fill((5, 5), 6).double() * 3
    found = networks(inputs)
    for block in range(5):
        x = inputs[block]
        for layer in (0, 1):
            x = torch.tanh(x @ networks.weights[layer][block] + networks.biases[layer][block, 0])
        out = (x @ networks.weights[2][block] + networks.biases[2][block, 0]).item()
        expected = math.log1p(math.exp(5 * math.tanh(out / 5) + math.log(math.e - 1)))
        assert found[block].item() == pytest.approx(expected, rel=1e-12)
    assert found.std() > 0.1


def test_sigma_stays_positive_and_finite():
    networks = trained(6)
    for sign in (1e6, -1e6):
        networks.biases[-1].data.fill_(sign)
        sigma = networks(torch.zeros(6, 5, dtype=torch.float64))
        assert ((sigma > 0.01) & (sigma < 6)).all()


def test_features_are_the_five_inputs_clipped():
    one = torch.ones(3, dtype=torch.float64)
    mean, var = one * torch.tensor([0.1, 1.0, 0.0]), one * torch.tensor([0.04, 0.0, 4.0])
    sigma = one * torch.tensor([2.0, 1e-9, 1.0])
    found = pertnn.features((0.7, 123.0), sigma, mean, var)
    expected = [[0.7, 10, math.log(2), 0.5, math.log(0.04)], [0.7, 10, -10, 10, -10], [0.7, 10, 0, 0, math.log(4)]]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-6)


def mixed_arena():
    """Two dtypes that alternate in the arena, sizes that are no multiples of a tile, an empty parameter."""
    shapes = {"a": (3, 700), "b": (5, 5), "c": (1200, 2), "d": (1,), "e": (0,), "f": (7,)}
    pairs = [
        (name, nn.Parameter((noise_fill(shape, 8 + k) + 0.3).to([torch.float32, torch.bfloat16][k % 2])))
        for k, (name, shape) in enumerate(shapes.items())
    ]
    return Arena([pairs])


def test_statistics_of_every_block_in_the_arenas_order():
    arena = mixed_arena()
    assert len(arena.spans) > 2
    statistics = Statistics(arena)
    mean, var = statistics.moments(arena.buffers)
    dots, squares = statistics.dots(arena.buffers, 77, "gaussian"), statistics.squares(arena.buffers)
    for k, (segment, parameter) in enumerate(zip(arena.segments, arena.parameters, strict=True)):
        x = parameter.detach().double().view(-1)
        z = noise_fill(x.shape, 77, offset=segment.index).double()
        assert statistics.numels[k] == x.numel()
        expected = torch.stack((x.mean(), x.var(unbiased=False))) if x.numel() else torch.zeros(2)
        assert torch.allclose(torch.stack((mean[k], var[k])), expected.double(), rtol=1e-10, atol=1e-12)
        assert dots[k].item() == pytest.approx((x * z).sum().item(), rel=1e-10, abs=1e-12)
        assert squares[k].item() == pytest.approx(x.square().sum().item(), rel=1e-10)


class Wrapper(nn.Module):
    def __init__(self, **inner):
        super().__init__()
        for name, module in inner.items():
            setattr(self, name, module)


def test_wrapping_a_model_does_not_change_its_blocks():
    inner = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    plain = pertnn.blocks_of(Arena.from_module(copy.deepcopy(inner)).segments)
    assert plain[0] == Block("0.weight", (3, 2))
    for wrapped in (
        Wrapper(module=copy.deepcopy(inner)),
        Wrapper(_orig_mod=copy.deepcopy(inner)),
        Wrapper(base_model=Wrapper(model=copy.deepcopy(inner))),
    ):
        assert pertnn.blocks_of(Arena.from_module(wrapped).segments) == plain
    other = Wrapper(module=copy.deepcopy(inner), head=nn.Linear(2, 1))
    assert "module.0.weight" in [name for name, _ in pertnn.blocks_of(Arena.from_module(other).segments)]
    with pytest.raises(PertNNError, match=r"two parameters are called 'weight'"):
        pertnn.blocks_of(Arena.from_module(Wrapper(_orig_mod=nn.Linear(2, 1, bias=False))).segments * 2)


def test_networks_come_back_in_the_order_asked_for(tmp_path):
    networks = trained(hidden=6, hidden_layers=2)
    path = pertnn.save(networks, tmp_path / "new" / "n.safetensors", {"model": "tiny"})
    assert [p.name for p in path.parent.iterdir()] == ["n.safetensors"]
    order = [2, 0, 3, 1]
    there = pertnn.load(path, [networks.blocks[k] for k in order])
    inputs = noise_fill((4, 5), 9).double()
    assert torch.equal(there(inputs[order]), networks(inputs)[order])
    assert (there.hidden, there.hidden_layers) == (6, 2)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        assert file.metadata()["model"] == "tiny"


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = pertnn.save(trained(seed=1), tmp_path / "n.safetensors")
    before = path.read_bytes()

    def broken(tensors, place, metadata):
        place.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        pertnn.save(trained(seed=2), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_files_for_other_blocks_are_refused_by_name(tmp_path):
    path = pertnn.save(PertNN(blocks(5)), tmp_path / "n.safetensors")
    here = [*blocks(3), Block("layers.3.weight", (9, 3)), Block("head.weight", (2, 2))]
    with pytest.raises(PertNNError) as error:
        pertnn.load(path, here)
    for words in (
        "3 differences", "'head.weight' is (2, 2) here and not in the file",
        "'layers.4.weight' is (5, 3) in the file and not here",
        "'layers.3.weight' is (9, 3) here and (4, 3) in the file",
    ):  # fmt: skip
        assert words in str(error.value)
    many = [Block(f"other.{k}", (1,)) for k in range(50)]
    with pytest.raises(PertNNError, match=r"5 there, 50 here, 55 differences\): .*; \.\.\.\. Networks") as error:
        pertnn.load(path, many)
    assert len(str(error.value)) < 500


def test_a_file_is_replaced_in_one_move(tmp_path):
    """Who has the old file open, or another name for it, keeps the old file."""
    path, other = pertnn.save(trained(seed=1), tmp_path / "n.safetensors"), tmp_path / "other"
    before = path.read_bytes()
    other.hardlink_to(path)
    pertnn.save(trained(seed=2), path)
    assert other.read_bytes() == before != path.read_bytes()


def rewritten(path, tensors=None, **metadata):
    """The file with other contents."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        old, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file({**old, **(tensors or {})}, path, metadata={**about, **metadata})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "there is no file"),
        (lambda path: path.write_bytes(b"not it"), "no readable safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "no readable safetensors file"),
        (lambda path: rewritten(path, format="other"), "no file of ZO Fine-tuner networks.*'other'"),
        (lambda path: rewritten(path, version="2"), "version '2'"),
        (lambda path: rewritten(path, hidden="65"), "is damaged"),
        (lambda path: rewritten(path, hidden="many"), "is damaged"),
        (lambda path: rewritten(path, blocks=json.dumps([["a"]])), "is damaged"),
        (lambda path: rewritten(path, {"biases.1": torch.full((4, 1, 1), math.nan)}), "NaN or infinite"),
    ],
)
def test_unusable_files_are_refused(tmp_path, spoil, message):
    path = pertnn.save(trained(), tmp_path / "n.safetensors")
    spoil(path)
    with pytest.raises(PertNNError, match=message):
        pertnn.load(path, blocks())


@pytest.mark.parametrize("sizes", [{"hidden": 0}, {"hidden_layers": 0}, {"blocks": []}])
def test_networks_of_no_size_are_refused(sizes):
    with pytest.raises(PertNNError, match="at least"):
        PertNN(**{"blocks": blocks(), **sizes})
