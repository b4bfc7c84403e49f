"""Shared fixtures: poisoned allocations and the automatic backend after every test."""

import pytest
import torch

from zoengine import ops


@pytest.fixture(autouse=True)
def automatic_backend():
    """A test that forces a backend does not leak it into the next."""
    yield
    ops.use(None)


@pytest.fixture
def poison(monkeypatch):
    """``torch.empty`` filled with NaN, so that reading memory nobody wrote shows."""
    original = torch.empty

    def poisoned(*args, **kwargs):
        tensor = original(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and not tensor.is_meta else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
