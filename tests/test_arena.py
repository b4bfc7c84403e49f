"""The arena: layout, views that survive saving and loading, and what it refuses."""

import itertools

import pytest
import torch
from torch import nn

from zoengine import Arena, ArenaError


class Tied(nn.Module):
    """An embedding whose weight is the output layer's, a norm, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 30)
        self.norm = nn.LayerNorm(30)
        self.frozen = nn.Linear(30, 30).requires_grad_(False)
        self.head = nn.Linear(30, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.frozen(self.norm(self.embed(ids))))


def test_layout():
    model = Tied()
    arena = Arena.from_module(model)
    assert [s.name for s in arena.segments] == ["embed.weight", "norm.weight", "norm.bias"]
    assert [s.start for s in arena.segments] == [0, 2048, 3072]
    assert [s.index for s in arena.segments] == [0, 2048, 3072]
    assert [s.decays for s in arena.segments] == [True, False, False]
    assert arena.numel == 50 * 30 + 60
    assert arena.nbytes == 4096 * 4
    assert len(arena.spans) == 1
    assert [(s.start, s.stop, s.decays) for s in arena.group_spans] == [(0, 2048, True), (2048, 4096, False)]


def test_parameters_are_views_and_keep_their_values():
    model = Tied()
    ids = torch.randint(0, 50, (3, 7))
    before, expected = {n: p.detach().clone() for n, p in model.named_parameters()}, model(ids)
    arena = Arena.from_module(model)
    assert torch.equal(model(ids), expected)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    arena.buffers[0].fill_(2.0)
    assert (model.embed.weight == 2).all()
    assert model.head.weight is model.embed.weight
    assert not (model.frozen.weight == 2).any()


def test_padding_is_zero(poison):
    arena = Arena.from_module(Tied())
    inside = torch.zeros(arena.buffers[0].numel(), dtype=torch.bool)
    for s in arena.segments:
        inside[s.start : s.start + s.numel] = True
    assert (arena.buffers[0][~inside] == 0).all()


def test_noise_indices_do_not_depend_on_dtype_or_buffer():
    model = nn.ModuleList([nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 40)])
    alone = Arena.from_module(model)
    mixed = nn.ModuleList([nn.Linear(40, 40), nn.Linear(40, 40).bfloat16(), nn.Linear(40, 40)])
    split = Arena.from_module(mixed)
    assert [(s.name, s.index) for s in split.segments] == [(s.name, s.index) for s in alone.segments]
    assert len(split.buffers) == 2
    covered = sorted((s.index, s.index + s.stop - s.start) for s in split.spans)
    assert covered[0][0] == 0
    assert all(a[1] == b[0] for a, b in itertools.pairwise(covered))


def test_groups_are_contiguous():
    a, b = nn.Linear(8, 8), nn.Linear(8, 8)
    arena = Arena([[("a.w", a.weight), ("a.b", a.bias)], [("b.w", b.weight), ("b.b", b.bias)]])
    assert [(s.group, s.decays) for s in arena.group_spans] == [(0, True), (0, False), (1, True), (1, False)]
    assert len(arena.spans) == 1


def test_state_dict_and_in_place_loading_go_through_the_views():
    model, other = Tied(), Tied()
    arena = Arena.from_module(model)
    model.load_state_dict(other.state_dict())
    arena.check()
    assert torch.equal(arena.views(arena.buffers)[0], other.embed.weight)
    assert torch.equal(model.state_dict()["head.weight"], other.embed.weight)


def test_reading_restores_the_views_whatever_is_raised():
    model = Tied()
    arena = Arena.from_module(model)
    copies = [torch.zeros_like(b) for b in arena.buffers]
    with pytest.raises(KeyboardInterrupt), arena.reading(arena.views(copies)):
        assert (model.embed.weight == 0).all()
        raise KeyboardInterrupt
    arena.check()
    assert not (model.embed.weight == 0).all()


@pytest.mark.parametrize(
    "replace",
    [
        lambda m: m.load_state_dict(Tied().state_dict(), assign=True),
        lambda m: m.bfloat16(),
        lambda m: setattr(m.norm, "bias", nn.Parameter(torch.zeros(30))),
        lambda m: setattr(m.head, "weight", nn.Parameter(m.embed.weight.detach().clone())),
        lambda m: setattr(m.norm.weight, "data", torch.zeros(30)),
    ],
    ids=["assign", "dtype", "new parameter", "untied", "new data"],
)
def test_a_replaced_parameter_is_noticed(replace):
    model = Tied()
    arena = Arena.from_module(model)
    arena.check()
    replace(model)
    with pytest.raises(ArenaError, match=r"build the optimizer after"):
        arena.check()


def test_nothing_to_train_is_refused():
    with pytest.raises(ArenaError, match="nothing to train"):
        Arena.from_module(nn.Linear(3, 3).requires_grad_(False))
    quantised = nn.Module()
    quantised.register_parameter("weight", nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False))
    with pytest.raises(ArenaError, match="adapters to a quantised model"):
        Arena.from_module(quantised)


def test_meta_float64_and_sparse_are_refused_and_nothing_is_changed():
    for bad, message in (
        (nn.Linear(3, 3, device="meta"), "meta"),
        (nn.Linear(3, 3, dtype=torch.float64), "float64"),
    ):
        model = nn.ModuleList([nn.Linear(3, 3), bad])
        pointer = model[0].weight.data_ptr()
        with pytest.raises(ArenaError, match=message):
            Arena.from_module(model)
        assert model[0].weight.data_ptr() == pointer


def test_shared_memory_without_tying_is_refused():
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = nn.Parameter(a.weight.data)
    with pytest.raises(ArenaError, match="share memory"):
        Arena.from_module(nn.ModuleList([a, b]))
    b.weight.requires_grad_(False)
    with pytest.raises(ArenaError, match="share memory"):
        Arena.from_module(nn.ModuleList([a, b]))
