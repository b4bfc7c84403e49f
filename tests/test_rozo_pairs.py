"""LoRA pairs found by name in an arena, stacked, read and written."""

import pytest
import torch
from torch import nn

from zoengine.arena import Arena, ArenaError
from zoengine.rozo import AdapterError, stacks


def arena(*groups, **shapes):
    """One group of parameters by name and shape, or several, numbered as they are created."""
    counter = iter(range(1, 100))
    groups = groups or (shapes,)
    return Arena([
        [(name, nn.Parameter(torch.full(shape, float(next(counter))))) for name, shape in group.items()]
        for group in groups
    ])  # fmt: skip


def names(module, adapter=".default"):
    return f"{module}.lora_A{adapter}.weight", f"{module}.lora_B{adapter}.weight"


def pair(module, m=8, n=6, rank=2, adapter=".default"):
    A, B = names(module, adapter)
    return {A: (rank, n), B: (m, rank)}


def test_equal_pairs_share_a_stack():
    found = arena(pair("x.q") | pair("x.k", m=6) | pair("y.q") | pair("y.q", rank=3, adapter=".other"), pair("z.q"))
    groups = stacks(found.segments, offset=False, retracts=True)
    assert [[p.module for p in s.pairs] for s in groups] == [
        ["x.q.default", "y.q.default"], ["x.k.default"], ["y.q.other"], ["z.q.default"],
    ]  # fmt: skip
    assert [(s.rank, s.group) for s in groups] == [(2, 0), (2, 0), (3, 0), (2, 1)]


def test_reading_and_writing():
    found = arena(pair("x", rank=4) | pair("y", rank=4))
    views = found.views(found.buffers)
    (stack,) = stacks(found.segments, offset=True, retracts=True)  # a point of rank 2, the rest constant
    B, A = stack.of(views).read()
    assert (B.shape, A.shape, B.dtype) == ((2, 8, 2), (2, 2, 6), torch.float64)
    assert B[:, 0, 0].tolist() == [2, 4] and A[:, 0, 0].tolist() == [1, 3]
    stack.of(views).write(-B, 2 * A)
    by_name = dict(zip((s.name for s in found.segments), views, strict=True))
    a, b = (by_name[name] for name in names("y"))
    assert (b[:, :2] == -4).all() and (b[:, 2:] == 4).all() and (a[:2] == 6).all() and (a[2:] == 3).all()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"head.weight": (4, 4)}, r"found none among 'head.weight'; wrap the model with peft"),
        (pair("x") | {"head.weight": (4, 4), "norm": (4,)}, r"freeze 'head.weight', 'norm' with requires_grad_"),
        ({f"p{k}": (2, 2) for k in range(5)}, r"'p0', 'p1', 'p2' and 2 more"),
        ({names("x")[0]: (2, 6)}, r"'x.lora_A.default.weight' is trained and lora_B of 'x.default' is not"),
        ({names("x")[0]: (2, 6), names("x")[1]: (8, 3)}, r"8 x 3 and .* is 2 x 6; their product does not exist"),
        (pair("x", rank=6), r"'x.default' is 8 x 6 and its adapter a point of rank 6; .*2 rank <= 6"),
        ({"x.lora_A.default.weight": (2, 6, 1, 1)}, r"found none"),
    ],
)
def test_what_cannot_be_trained(shapes, message):
    with pytest.raises(AdapterError, match=message):
        stacks(arena(shapes).segments, offset=False, retracts=True)
    assert issubclass(AdapterError, ArenaError)


def test_halves_in_different_groups():
    A, B = names("x")
    with pytest.raises(AdapterError, match="different parameter groups"):
        stacks(arena({A: (2, 6)}, {B: (8, 2)}).segments, offset=False, retracts=True)


def test_ranks_with_offset_and_without_retraction():
    assert stacks(arena(pair("x", rank=6)).segments, offset=True, retracts=True)[0].rank == 3
    assert stacks(arena(pair("x", rank=6)).segments, offset=False, retracts=False)[0].rank == 6
    with pytest.raises(AdapterError, match=r"'x.default' has rank 3; .*even rank"):
        stacks(arena(pair("x", rank=3)).segments, offset=True, retracts=True)
