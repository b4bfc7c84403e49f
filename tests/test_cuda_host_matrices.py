"""The bodies of the CUDA kernels on matrices, run on the host, against the reference bit for bit."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from zoengine import ops
from zoengine.noise import table
from zoengine.ops import reference

if "cuda_bodies" not in sys.modules:  # other test files compile the same library
    _spec = importlib.util.spec_from_file_location("cuda_bodies", Path(__file__).with_name("cuda_bodies.py"))
    sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_spec.name])
bodies = sys.modules["cuda_bodies"]
address, bits, Framed, DTYPES = bodies.address, bodies.bits, bodies.Framed, bodies.DTYPES
pytestmark = pytest.mark.skipif(bodies.COMPILER is None, reason="no C++ compiler")

CASES = [(dtype, rounding) for dtype in DTYPES for rounding in (False, True) if dtype != torch.float32 or not rounding]
# More than one block of rows, rows narrower than a lane and wider than tiles, and places that suit no vector.
STARTS, SHAPES = [8, 2048, 7000, 12001], [(67, 24), (3, 1200), (2, 2056), (65, 5)]
SIZE = 13000


# Offset, alignment, floats of shared memory, terms: rows held and rows drawn twice; one term, several, more than are
# held at all, none; across a change of the upper half of the blocks' numbers.
PLACES = [
    (1024, 0, 1400, 2), (0, 0, 14336, 1), (2**34 - 7500, 1, 64, 1), (2**34 - 7500, 4, 14336, 1), (5, 0, 64, 17),
    (2**39 - 9000, 0, 4200, 3), (0, 0, 14336, 0),
]  # fmt: skip


def struct(table_of):
    return bodies.Matrices(
        address(table_of.table), len(table_of.table), table_of.table.shape[1], table_of.blocks, table_of.widest
    )


def weights(dtype, shift):
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(3)).to(dtype)
    x[100::997] = float("nan")
    return Framed(x, shift)


def kron(x, out, a, kappa, matrices, seeds, coeffs, keep, sr_seed, score, offset, noise, capacity, step=2):
    """The op through the bodies; rows wider than ``capacity`` floats are drawn twice."""
    parts = torch.full((step, matrices.widest), float("nan")) if score is not None else None
    totals = torch.full((a.numel(),), float("nan"), dtype=torch.float64)
    call = bodies.Kron(
        *map(address, (x, out, a, kappa, seeds, coeffs, keep, sr_seed, parts, totals, score)), struct(matrices),
        columns=a.numel(), offset=offset, terms=seeds.numel(), noise=noise, capacity=capacity,
    )  # fmt: skip
    bodies.call("zo_kron", call, 0 if x is None else DTYPES.index(x.dtype), step)


@pytest.mark.parametrize("noise", table.NOISES.values(), ids=table.NOISES)
@pytest.mark.parametrize(("dtype", "stochastic"), CASES, ids=str)
def test_kron_rows(dtype, stochastic, noise):
    generator = torch.Generator().manual_seed(4)
    matrices = ops.Matrices.for_kron(STARTS, SHAPES)
    for offset, shift, capacity, terms in PLACES if dtype == torch.float32 else PLACES[:3]:
        x, out = weights(dtype, shift), Framed(torch.full((SIZE,), 3.0, dtype=dtype), shift)
        a = torch.randn(matrices.sizes[0], generator=generator)
        kappa = torch.rand(len(SHAPES), generator=generator)
        seeds = torch.randint(-(2**63), 2**63 - 1, (terms,), generator=generator)
        coeffs = torch.randn(terms, generator=generator)
        keep, sr_seed = (torch.tensor([0.75]) if terms > 1 else None), torch.tensor([9]) if stochastic else None
        args = (seeds, coeffs, keep, sr_seed)
        expected, expected_score = torch.full_like(x.tensor, 3.0), torch.empty_like(a)
        with_score = capacity != 14336 or dtype == torch.float32  # the reference takes long
        extents = (offset, noise, matrices.blocks, matrices.widest)
        wanted = expected_score if with_score else None
        reference.kron_rows_out(x.tensor, a, kappa, matrices.table, *args, wanted, *extents, out=expected)
        score = torch.full_like(a, float("nan")) if with_score else None
        kron(x.tensor, out.tensor, a, kappa, matrices, *args, score, offset, noise, capacity)
        assert torch.equal(bits(out.tensor), bits(expected)), (offset, shift, capacity, terms)
        assert out.intact()
        assert not with_score or torch.equal(score, expected_score), (offset, shift, capacity, terms)
        kron(x.tensor, x.tensor, a, kappa, matrices, *args, None, offset, noise, capacity)
        for start, (rows, columns) in zip(STARTS, SHAPES, strict=True):
            part = slice(start, start + rows * columns)
            assert torch.equal(bits(x.tensor[part]), bits(expected[part])), "in place"


@pytest.mark.parametrize("capacity", (64, 14336))
def test_kron_score_alone(capacity):
    matrices = ops.Matrices.for_kron(STARTS, SHAPES)
    a = torch.randn(matrices.sizes[0], generator=torch.Generator().manual_seed(5))
    seeds, coeffs, score = torch.tensor([1, 2]), torch.tensor([0.5, -0.3]), torch.full_like(a, float("nan"))
    expected = reference.kron_score(a, matrices.table, seeds, coeffs, 77, 0, matrices.blocks, matrices.widest)
    kron(None, None, a, None, matrices, seeds, coeffs, None, None, score, 77, 0, capacity, step=matrices.blocks)
    assert torch.equal(score, expected)


@pytest.mark.parametrize("rank", (1, 5, 16, 33))
@pytest.mark.parametrize(("dtype", "stochastic"), CASES, ids=str)
def test_lowrank_add(dtype, stochastic, rank):
    generator = torch.Generator().manual_seed(6)
    matrices = ops.Matrices.for_lowrank(STARTS, SHAPES, rank)
    for offset, shift, decay in [(0, 0, False), (2**35 - 7800, 1, True)]:
        x, out = weights(dtype, shift), Framed(torch.full((SIZE,), 3.0, dtype=dtype), shift)
        left, right = (torch.randn(size, generator=generator) for size in matrices.sizes)
        coeff, keep = torch.tensor([-0.3]), torch.tensor([0.75]) if decay else None
        sr_seed = torch.tensor([9]) if stochastic else None
        expected = torch.full_like(x.tensor, 3.0)
        extents = (offset, rank, matrices.blocks, matrices.widest)
        reference.lowrank_add_out(x.tensor, left, right, matrices.table, coeff, keep, sr_seed, *extents, out=expected)
        call = bodies.LowRank(
            *map(address, (x.tensor, out.tensor, left, right, coeff, keep, sr_seed)), struct(matrices), offset, rank
        )
        bodies.call("zo_lowrank_add", call, DTYPES.index(dtype))
        assert torch.equal(bits(out.tensor), bits(expected)), (offset, shift)
        assert out.intact()
