"""The bodies of the CUDA kernels for transformed noise, folds and rules, run on the host, against the reference."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from zoengine.noise import table
from zoengine.ops import reference
from zoengine.ops.schema import RULES, TRANSFORMS

if "cuda_bodies" not in sys.modules:  # other test files compile the same library
    _spec = importlib.util.spec_from_file_location("cuda_bodies", Path(__file__).with_name("cuda_bodies.py"))
    sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_spec.name])
bodies = sys.modules["cuda_bodies"]
address, bits, Framed, DTYPES = bodies.address, bodies.bits, bodies.Framed, bodies.DTYPES
pytestmark = pytest.mark.skipif(bodies.COMPILER is None, reason="no C++ compiler")

# (elements, offset, elements that x stands after a boundary, terms): whole units, cut ones, suitable addresses and
# others, and ranges across the places where the upper half of a block number changes.
PLACES = [
    (4100, 0, 0, 1),
    (4096, 2048, 0, 2),
    (5000, 1024, 0, 3),
    (5003, 1027, 3, 1),
    (700, 2**32 - 3, 1, 2),
    (6000, 2**34 - 3072, 0, 1),
    (4097, 2**39 - 2048, 4, 1),
    (1, 5, 0, 1),
]
CASES = [(dtype, rounding) for dtype in DTYPES for rounding in (False, True) if dtype != torch.float32 or not rounding]


def terms(count, sets=1, extra=0, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator),
        torch.arange(count) % 3,
        torch.randn(sets * count + extra, generator=generator),
    )


def weights(n, dtype, shift, seed=6):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[:: max(1, n // 7)] = float("nan")
    x[n // 2] = float("inf")
    return Framed(x, shift)


def positive(n, shift, seed):
    """Roots and divisions at their ends too: zero, subnormal, infinite, NaN."""
    h = torch.rand(n, generator=torch.Generator().manual_seed(seed)) + 1e-3
    for k, value in enumerate((0.0, 1e-42, float("inf"), float("nan"), 3e38, 1e-38, -1.0)):
        h[k + 8 :: 97] = value
    return Framed(h, shift)


def fused(x, out, seeds, streams, coeffs, keep, sr_seed, offset, noise, states=(), added=(), **pointers):
    pointers = {name: address(tensor) for name, tensor in pointers.items()}
    return bodies.Fused(
        x=address(x), out=address(out), states=bodies.addresses(3, states), added=bodies.addresses(2, added),
        seeds=address(seeds), streams=address(streams), coeffs=address(coeffs), keep=address(keep),
        rounding_seed=address(sr_seed), offset=offset, terms=seeds.numel(), noise=noise, **pointers,
    )  # fmt: skip


@pytest.mark.parametrize("noise", table.NOISES.values(), ids=table.NOISES)
@pytest.mark.parametrize("transform", ("scale", "mask", "diag"))
@pytest.mark.parametrize(("dtype", "stochastic"), CASES, ids=str)
def test_add_transformed(dtype, stochastic, transform, noise):
    generator = torch.Generator().manual_seed(1)
    for case, (n, offset, shift, count) in enumerate(PLACES):
        state_count, decay = case % 3, case % 2
        x, out = weights(n, dtype, shift), Framed(torch.zeros(n, dtype=dtype), shift)
        states = [torch.randn(n, generator=generator) for _ in range(state_count)]
        keep, sr_seed = torch.tensor([0.75]) if decay else None, torch.tensor([77]) if stochastic else None
        if transform == "scale":
            operand = torch.randn(-(-(n + offset % 1024) // 1024), generator=generator)
        elif transform == "mask":
            operand = torch.randint(0, 256, (-(-n // 8),), generator=generator).to(torch.uint8)
        else:
            operand = positive(n, shift, 2).tensor
        args = (*terms(count, extra=state_count), states, keep, sr_seed, offset, noise, TRANSFORMS[transform], operand)
        expected = torch.empty_like(x.tensor)
        reference.add_noise_out(x.tensor, *args, out=expected)
        pointer = {{"mask": "bits"}.get(transform, transform): operand}
        framed = [Framed(state, shift).tensor for state in states]
        call = fused(x.tensor, out.tensor, *args[:3], keep, sr_seed, offset, noise, added=framed, **pointer)
        call.count = n
        bodies.call("zo_transformed", call, DTYPES.index(dtype), TRANSFORMS[transform])
        assert torch.equal(bits(out.tensor), bits(expected)), (n, offset, shift, count)
        assert out.intact()
        call.out = call.x
        bodies.call("zo_transformed", call, DTYPES.index(dtype), TRANSFORMS[transform])
        assert torch.equal(bits(x.tensor), bits(expected)), "in place"


def test_a_range_behind_a_block_boundary_keeps_its_mask():
    """The second part of a cut range begins within a byte of the mask."""
    n, offset = 5000, 2**34 - 2045
    x, mask = weights(n, torch.float32, 3), torch.randint(0, 256, (n // 8,), dtype=torch.uint8)
    args = (*terms(1), [], None, None, offset, 0, TRANSFORMS["mask"], mask)
    expected = torch.empty(n)
    reference.add_noise_out(x.tensor, *args, out=expected)
    call = fused(x.tensor, x.tensor, *args[:3], None, None, offset, 0, bits=mask)
    call.count = n
    bodies.call("zo_transformed", call, 0, TRANSFORMS["mask"])
    assert torch.equal(bits(x.tensor), bits(expected))


@pytest.mark.parametrize("noise", table.NOISES.values(), ids=table.NOISES)
@pytest.mark.parametrize(("dtype", "stochastic"), [(None, False), *CASES], ids=str)
def test_state_fold(dtype, stochastic, noise):
    for case, (n, offset, shift, count) in enumerate([*PLACES, (3000, 3 * 1024, 4, 0)]):
        state = weights(n, torch.float32, shift, 8)
        x = None if dtype is None else weights(n, dtype, shift)
        seeds, streams, coeffs = terms(count)
        keep, x_keep = (torch.tensor([0.75]) if case % 2 else None), (torch.tensor([0.5]) if case % 3 else None)
        x_coeffs = None if x is None else terms(count, extra=2, seed=9)[2]
        sr_seed = torch.tensor([77]) if stochastic else None
        valid = None
        if offset % 1024 == 0:
            valid = torch.randint(0, 1025, (-(-n // 1024),), dtype=torch.int32)
            state.tensor.nan_to_num_(0.5, posinf=2.0)  # a sum that says something
        expected, expected_x = state.tensor.clone(), None if x is None else x.tensor.clone()
        squares = reference.state_fold_(
            expected, expected_x, seeds, streams, coeffs, keep, x_coeffs, x_keep, sr_seed, valid, offset, noise
        )
        tiles = torch.full((-(-n // 1024),), float("nan"), dtype=torch.float64)
        call = fused(
            x and x.tensor, x and x.tensor, seeds, streams, coeffs, x_keep, sr_seed, offset, noise, [state.tensor],
            numbers=x_coeffs, state_keep=keep, valid=valid, squares=None if valid is None else tiles,
        )  # fmt: skip
        call.count = n
        bodies.call("zo_state_fold", call, 0 if x is None else DTYPES.index(dtype))
        assert torch.equal(bits(state.tensor), bits(expected)), (n, offset, shift, count)
        assert state.intact()
        if x is not None:
            assert torch.equal(bits(x.tensor), bits(expected_x)), (n, offset, shift, count)
            assert x.intact()
        if valid is not None:
            assert torch.equal(reference.segments.lane_sum(tiles.unsqueeze(0)), squares), (n, offset, shift)


@pytest.mark.parametrize("noise", table.NOISES.values(), ids=table.NOISES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("dtype", "stochastic"), CASES, ids=str)
def test_rule_step(dtype, stochastic, rule, noise):
    number, state_count, names = RULES[rule]
    for case, (n, offset, shift, count) in enumerate(PLACES[2:6]):
        count = 2 if rule == "adamu" else count
        x = weights(n, dtype, shift)
        states = [positive(n, shift, seed) for seed in range(state_count)]
        seeds, streams, coeffs = terms(count, sets=2 if rule in ("hizoo", "adam_replay") else 1)
        numbers = torch.rand(len(names), generator=torch.Generator().manual_seed(case)) * 0.5
        if rule == "hizoo":
            numbers[3] = case % 2
        keep, sr_seed = torch.tensor([0.75]) if case % 2 else None, torch.tensor([77]) if stochastic else None
        expected, expected_states = x.tensor.clone(), [state.tensor.clone() for state in states]
        place = (keep, sr_seed, offset, noise)
        reference.rule_step_(expected, expected_states, seeds, streams, coeffs, numbers, *place, number)
        tensors = [state.tensor for state in states]
        call = fused(x.tensor, x.tensor, seeds, streams, coeffs, *place, tensors, numbers=numbers)
        call.count = n
        bodies.call("zo_rule_step", call, DTYPES.index(dtype), number)
        assert torch.equal(bits(x.tensor), bits(expected)), (n, offset, shift, count)
        for state, values in zip(states, expected_states, strict=True):
            assert torch.equal(bits(state.tensor), bits(values)), (n, offset, shift, count)
        assert x.intact() and all(state.intact() for state in states)
