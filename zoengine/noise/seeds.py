"""Seeds of a run: Philox4x32-10 on Python integers, for the handful of seeds a step needs.

A step's seeds are a pure function of (run seed, step, query), so any step of a run can be rebuilt alone.
"""

from __future__ import annotations

from typing import NamedTuple

from zoengine.noise import table

_MASK32 = 0xFFFFFFFF


class QuerySeeds(NamedTuple):
    """The two 64-bit seeds of one query of one step, as unsigned Python integers."""

    direction: int
    rounding: int


def philox4x32(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """One Philox4x32-10 block: four 32-bit words from a 2-word key and a 4-word counter (Salmon et al. 2011)."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(table.PHILOX_ROUNDS):
        p0 = table.PHILOX_M0 * c0
        p1 = table.PHILOX_M1 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK32
        k0 = (k0 + table.PHILOX_W0) & _MASK32
        k1 = (k1 + table.PHILOX_W1) & _MASK32
    return c0, c1, c2, c3


def check_seed(seed: int, name: str = "seed") -> int:
    """``seed`` as an unsigned 64-bit integer.

    Negative values down to -2^63 are read as two's complement, as torch's int64 tensors hold them.

    Raises:
        TypeError: ``seed`` is not an integer.
        ValueError: ``seed`` does not fit into 64 bits.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{name} must be an integer, got {type(seed).__name__} {seed!r}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{name} must fit into 64 bits (-2^63 <= {name} < 2^64), got {seed}")
    return seed % 2**64


def to_int64(seed: int) -> int:
    """The same 64 bits as a signed integer, the form an int64 tensor takes."""
    return seed - 2**64 if seed >= 2**63 else seed


def query_seeds(run_seed: int, step: int, query: int = 0) -> QuerySeeds:
    """The seeds of query ``query`` of step ``step`` of the run ``run_seed``.

    One Philox call with key = run_seed and counter = (step low, step high, 7, query); words 0 and 1 make the
    direction's seed, words 2 and 3 the seed of stochastic rounding.

    Raises:
        ValueError: ``run_seed`` or ``step`` does not fit into 64 bits, or ``query`` into 32.
    """
    run_seed = check_seed(run_seed, "run seed")
    if not 0 <= step < 2**64:
        raise ValueError(f"step must be in [0, 2^64), got {step}")
    if not 0 <= query < 2**32:
        raise ValueError(f"query must be in [0, 2^32), got {query}")
    w0, w1, w2, w3 = philox4x32(
        (run_seed & _MASK32, run_seed >> 32),
        (step & _MASK32, step >> 32, table.STREAM_RUN_SEED, query),
    )
    return QuerySeeds(w0 | w1 << 32, w2 | w3 << 32)
