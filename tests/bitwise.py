"""Comparison bit for bit, for the tests of kernels."""

import torch


def bits(x):
    """The bits of ``x``, every NaN alike: which NaN comes out is not part of the contract."""
    x = torch.where(x.isnan(), torch.full_like(x, float("nan")), x)
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same(actual, expected, what=""):
    different = (bits(actual) != bits(expected)).nonzero().flatten()
    if different.numel():
        i = different[0].item()
        raise AssertionError(
            f"{what}: {different.numel()} of {actual.numel()} differ, first at {i}: "
            f"{actual.flatten()[i].item()!r} instead of {expected.flatten()[i].item()!r}"
        )
