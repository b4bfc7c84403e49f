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

# What a transform does to the noise z of every term before its coefficient; `operand` holds what it needs.
TRANSFORMS = {
    "none": 0,  # z
    "scale": 1,  # operand[tile] z: fp32, one per 1024-tile of the arena that x touches
    "mask": 2,  # an element whose bit is 0 keeps its value, whatever the terms: uint8, element i at bit i & 7 of i >> 3
    "diag": 3,  # z / sqrt(operand[i]): fp32, one per element
}

# Elementwise update rules of rule_step_: number, count of states, names of the scalars in their order.
RULES = {
    "sign": (0, 0, ("step",)),
    "adam": (1, 2, ("beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "root_correction", "eps", "step")),
    "amsgrad": (2, 3, ("beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "root_correction", "eps", "step")),
    "adamu": (3, 1, ("state", "first", "second", "beta2", "one_minus_beta2", "eps", "step", "sign")),
    "hizoo": (4, 1, ("keep", "centre", "floor", "hessian_first")),
    "adam_replay": (5, 0, ("root_correction", "eps", "step")),
}

_TERMS = "Tensor seeds, Tensor streams, Tensor coeffs"
_ADD_NOISE = (
    f"{_TERMS}, Tensor[] states, Tensor? keep, Tensor? sr_seed, int offset, int noise, int transform, Tensor? operand"
)
_KRON = "Tensor a, Tensor kappa, Tensor segments, Tensor seeds, Tensor coeffs, Tensor? keep, Tensor? sr_seed"
_LOWRANK = "Tensor left, Tensor right, Tensor segments, Tensor coeff, Tensor? keep, Tensor? sr_seed, int offset"

HISTOGRAM_BINS = 4096
# Rows of a matrix that are one piece of work. kron_score sums a block in fp32, then the blocks in float64.
ROW_BLOCK = 64

SCHEMAS = {
    # x = keep x + sum_k coeffs[k] T(z(seeds[k])) + sum_j coeffs[K + j] states[j], rounded once
    "add_noise_": f"(Tensor(a!) x, {_ADD_NOISE}) -> ()",
    # the same, read from x and written to out
    "add_noise_out": f"(Tensor x, {_ADD_NOISE}, *, Tensor(a!) out) -> ()",
    # out = z(seed)
    "noise_fill_": "(Tensor(a!) out, Tensor seed, int offset, int stream, int noise) -> ()",
    # state = keep state + sum_k coeffs[k] z_k;
    # x = x_keep x + sum_k x_coeffs[k] z_k + x_coeffs[K] old state + x_coeffs[K + 1] new state;
    # (1,): sum of squares of the valid elements of the new state, or (0,) without `valid`
    "state_fold_": (
        f"(Tensor(a!) state, Tensor(b!)? x, {_TERMS}, Tensor? keep, Tensor? x_coeffs, Tensor? x_keep, "
        "Tensor? sr_seed, Tensor? valid, int offset, int noise) -> Tensor"
    ),
    # one elementwise rule of RULES: writes x and its states
    "rule_step_": (
        f"(Tensor(a!) x, Tensor(b!)[] states, {_TERMS}, Tensor scalars, Tensor? keep, Tensor? sr_seed, int offset, "
        "int noise, int rule) -> ()"
    ),
    # `segments` of the matrix ops: int64 (S, 5 or 6), one row per matrix: start in x, rows, columns, number of row
    # blocks before it, then where its part of a (or of left and of right) starts. `blocks`: all row blocks, `widest`:
    # the most columns; both on the host, or a launch would have to wait for the device.
    # rows of matrices: x = keep x + sum_k coeffs[k] (u_k - kappa (a . u_k) a), and score as kron_score
    "kron_rows_": f"(Tensor(a!) x, {_KRON}, Tensor(b!)? score, int offset, int noise, int blocks, int widest) -> ()",
    "kron_rows_out": (
        f"(Tensor x, {_KRON}, Tensor(b!)? score, int offset, int noise, int blocks, int widest, "
        "*, Tensor(a!) out) -> ()"
    ),
    # like a: sum_k coeffs[k] (sum_rows (u_k . a) u_k - rows a)
    "kron_score": (
        "(Tensor a, Tensor segments, Tensor seeds, Tensor coeffs, int offset, int noise, int blocks, int widest)"
        " -> Tensor"
    ),
    # matrices: x = keep x + coeff left right'
    "lowrank_add_": f"(Tensor(a!) x, {_LOWRANK}, int rank, int blocks, int widest) -> ()",
    "lowrank_add_out": f"(Tensor x, {_LOWRANK}, int rank, int blocks, int widest, *, Tensor(a!) out) -> ()",
    # out[starts[s] + i] = z(seed) at indices[s] + i, for i < lengths[s]
    "segment_noise_fill_": (
        "(Tensor(a!) out, Tensor seed, Tensor starts, Tensor lengths, Tensor indices, int stream, int noise) -> ()"
    ),
    # (S, 4): sum, sum of squares, minimum, maximum of x[starts[s] : starts[s] + lengths[s]]
    "segment_stats": "(Tensor x, Tensor starts, Tensor lengths) -> Tensor",
    # (S,): sum of x y over each segment
    "segment_dot": "(Tensor x, Tensor y, Tensor starts, Tensor lengths) -> Tensor",
    # (S,): sum of x z(seed) over each segment
    "segment_dot_noise": (
        "(Tensor x, Tensor seed, Tensor starts, Tensor lengths, int offset, int stream, int noise) -> Tensor"
    ),
    # (S, 4096): how many elements have each value of one digit of |x| and the given digits before it
    "segment_histogram": "(Tensor x, Tensor starts, Tensor lengths, Tensor prefixes, int digit) -> Tensor",
    # bits: |x| <= thresholds[tile], in the layout of the mask transform
    "mask_below_": "(Tensor(a!) bits, Tensor x, Tensor thresholds) -> ()",
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


def _fake_fold(state: Tensor, *args) -> Tensor:
    valid = args[8]
    return state.new_empty((0 if valid is None else 1,), dtype=torch.float64)


def _fake_stats(x: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    return x.new_empty((starts.numel(), 4), dtype=torch.float64)


def _fake_dot(x: Tensor, other: Tensor, starts: Tensor, *args) -> Tensor:
    return x.new_empty((starts.numel(),), dtype=torch.float64)


def _fake_histogram(x: Tensor, starts: Tensor, *args) -> Tensor:
    return x.new_empty((starts.numel(), HISTOGRAM_BINS), dtype=torch.int64)


_FAKES = {
    "state_fold_": _fake_fold,
    "kron_score": lambda a, *args: torch.empty_like(a),
    "segment_stats": _fake_stats,
    "segment_dot": _fake_dot,
    "segment_dot_noise": _fake_dot,
    "segment_histogram": _fake_histogram,
}
for _name in SCHEMAS:
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _FAKES.get(_name, _fake_in_place), lib=_libraries[0])
