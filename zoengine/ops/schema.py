"""Schemas and fake implementations of every op, in one place.

Two namespaces share the same schema strings: ``zoengine::`` is what programs call and what torch.compile and
opcheck see; ``zoengine_C::`` is filled by the compiled extension. A backend is a module with one function per
op, named and called as the schema says; it registers nothing and checks nothing (``zoengine.ops`` does).

Conventions of all ops: tensors are contiguous; ``offset`` is the arena index of element 0; ``noise`` is an integer of
:data:`zoengine.noise.table.NOISES`; ``seeds`` are int64 holding 64 bits; ``coeffs`` fp32; sums are float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NOISE_TERMS = (
    "Tensor seeds, Tensor coeffs, Tensor[] states, Tensor? keep, Tensor? sr_seed, int offset, int stream, int noise"
)

SCHEMAS = {
    # x = keep x + sum_k coeffs[k] z(seeds[k]) + sum_j coeffs[K + j] states[j], rounded once
    "add_noise_": f"(Tensor(a!) x, {_NOISE_TERMS}) -> ()",
    # the same, read from x and written to out
    "add_noise_out": f"(Tensor x, {_NOISE_TERMS}, *, Tensor(a!) out) -> ()",
    # out = z(seed)
    "noise_fill_": "(Tensor(a!) out, Tensor seed, int offset, int stream, int noise) -> ()",
    # (S, 4): sum, sum of squares, minimum, maximum of x[starts[s] : starts[s] + lengths[s]]
    "segment_stats": "(Tensor x, Tensor starts, Tensor lengths) -> Tensor",
    # (S,): sum of x y over each segment
    "segment_dot": "(Tensor x, Tensor y, Tensor starts, Tensor lengths) -> Tensor",
    # (S,): sum of x z(seed) over each segment
    "segment_dot_noise": (
        "(Tensor x, Tensor seed, Tensor starts, Tensor lengths, int offset, int stream, int noise) -> Tensor"
    ),
}

NAMESPACE = "zoengine"
EXTENSION_NAMESPACE = "zoengine_C"

_libraries = [torch.library.Library(namespace, "FRAGMENT") for namespace in (NAMESPACE, EXTENSION_NAMESPACE)]
for _name, _schema in SCHEMAS.items():
    for _library in _libraries:
        _library.define(_name + _schema)


def implement(name: str, function) -> None:
    """Register ``function`` as the ``zoengine::name`` of every device."""
    _libraries[0].impl(name, function, "CompositeExplicitAutograd")


def _fake_in_place(*args, **kwargs) -> None:
    return None


def _fake_stats(x: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    return x.new_empty((starts.numel(), 4), dtype=torch.float64)


def _fake_dot(x: Tensor, other: Tensor, starts: Tensor, *args) -> Tensor:
    return x.new_empty((starts.numel(),), dtype=torch.float64)


for _name in ("add_noise_", "add_noise_out", "noise_fill_"):
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake_in_place, lib=_libraries[0])
torch.library.register_fake(f"{NAMESPACE}::segment_stats", _fake_stats, lib=_libraries[0])
for _name in ("segment_dot", "segment_dot_noise"):
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake_dot, lib=_libraries[0])
