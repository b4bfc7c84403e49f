"""The rows every benchmark writes: one JSON object per case.

A results file is a JSON array with one row a line. A row is

    part         "kernel", "update", "step", "memory" or "drift"
    case         its name, unique within part and environment
    options      object: what was measured (op, dtype, noise terms, ...), values of JSON scalars
    measures     object: the numbers, see ``MEASURES``; null where a number has no meaning for the case
    environment  object: see ``ENVIRONMENT``

Units are in the names: seconds, bytes, GB/s (10^9), M elements/s (10^6). Times are medians over the rounds of a run;
ratios (``percent_of_copy``, ``times_faster``, ``overhead_percent``) are medians of the ratio within each round, where
the two sides ran one after the other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_NUMBER = (int, float)

# Every measure of a part, with the types it may have.
MEASURES: dict[str, dict[str, tuple[type, ...]]] = {
    "kernel": {
        "elements": (int,),
        "rounds": (int,),
        "seconds": _NUMBER,
        "seconds_min": _NUMBER,
        "seconds_max": _NUMBER,
        "melements_per_s": _NUMBER,
        "bytes": (int,),  # that the operation has to read and write; see bench.cases
        "gb_per_s": _NUMBER,
        "percent_of_copy": _NUMBER,  # GB/s over that of the copy of the same dtype
        "times_faster": (*_NUMBER, type(None)),  # than options["baseline"]
    },
    "update": {
        "elements": (int,),
        "rounds": (int,),
        "seconds": _NUMBER,
        "seconds_min": _NUMBER,
        "seconds_max": _NUMBER,
        "bytes": (int,),  # that the update has to read and write; see bench.update_cases
        "normals": (int,),  # that it has to draw
        "today_seconds": _NUMBER,  # of the same in plain torch
        "percent_of_copy": _NUMBER,  # GB/s over that of the copy of the same dtype
        "percent_of_floor": _NUMBER,  # the longer of moving the bytes and drawing the normals, over the time taken
        "times_faster": _NUMBER,  # than plain torch
    },
    "step": {
        "elements": (int,),
        "rounds": (int,),
        "seconds": _NUMBER,
        "seconds_min": _NUMBER,
        "seconds_max": _NUMBER,
        "forwards": (int,),  # forward passes in it
        "forwards_seconds": _NUMBER,  # the same forwards alone
        "overhead_percent": _NUMBER,  # of the forwards: what the step adds to them
        "times_faster": (*_NUMBER, type(None)),  # than the loop people use today
        "forward_peak_bytes": (int, type(None)),  # of the GPU's memory in the forwards, before any optimizer was built
        "peak_bytes": (int, type(None)),  # in the step
    },
    "memory": {
        "weight_bytes": (int,),
        "arena_bytes": (int, type(None)),
        "state_bytes": (int, type(None)),
        "copy_bytes": (int, type(None)),  # of the evaluation mode
        "added_percent": (*_NUMBER, type(None)),  # arena, states and copies, over the weights alone
        "peak_growth_bytes": (int,),  # highest memory in a step, above that of a forward
        "peak_growth_percent": _NUMBER,  # of the weights
    },
    "drift": {
        "elements": (int,),
        "steps": (int,),
        "weight_rms": _NUMBER,
        "drift_rms": _NUMBER,
        "drift_percent": _NUMBER,  # of weight_rms
        "drift_ulps": _NUMBER,  # in ulps of a weight as large as weight_rms
        "drift_mean_ulps": _NUMBER,
        "changed_percent": _NUMBER,  # of the elements
        "growth_exponent": (*_NUMBER, type(None)),  # 0.5 is a random walk; null for the first checkpoint
        "ulps_after_10000": _NUMBER,  # extrapolated as a random walk
    },
}

ENVIRONMENT: dict[str, tuple[type, ...]] = {
    "date": (str,),  # UTC, ISO 8601
    "commit": (str, type(None)),  # with "+changes" when tracked files differ from it; null outside of a git checkout
    "device": (str,),  # the CPU's or GPU's name
    "device_type": (str,),  # "cpu" or "cuda"
    "cores": (int,),  # logical processors of the machine
    "threads": (int,),  # torch's
    "isa": (str, type(None)),  # of the C++ kernels; null when they are not built
    "python": (str,),
    "torch": (str,),
    "triton": (str, type(None)),
    "cuda": (str, type(None)),
    "zoengine": (str,),
    "noise_stream": (int,),
}


def make(part: str, case: str, options: dict[str, Any], measures: dict[str, Any], environment: dict[str, Any]) -> Row:
    """A checked row; floats are rounded to six significant digits."""
    rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in measures.items()}
    row = {"part": part, "case": case, "options": options, "measures": rounded, "environment": environment}
    check(row)
    return row


def check(row: Row) -> None:
    """Compare a row with the schema of this module.

    Raises:
        ValueError: says which field is missing, unknown or of the wrong type.
    """
    expected = {"part": str, "case": str, "options": dict, "measures": dict, "environment": dict}
    if not isinstance(row, dict) or set(row) != set(expected):
        got = list(row) if isinstance(row, dict) else row
        raise ValueError(f"a row has the keys {', '.join(expected)}; got {got!r}")
    for key, kind in expected.items():
        if not isinstance(row[key], kind):
            raise ValueError(f"{key} must be {kind.__name__}, got {row[key]!r}")
    if row["part"] not in MEASURES:
        raise ValueError(f"part must be one of {', '.join(MEASURES)}, got {row['part']!r}")
    for name, value in row["options"].items():
        if not isinstance(value, str | int | float | bool | None):
            raise ValueError(f"{row['case']}: option {name} must be a scalar, got {value!r}")
    _check_object(f"{row['case']}: measures", row["measures"], MEASURES[row["part"]])
    _check_object(f"{row['case']}: environment", row["environment"], ENVIRONMENT)


def _check_object(where: str, found: dict[str, Any], schema: dict[str, tuple[type, ...]]) -> None:
    if set(found) != set(schema):
        missing, unknown = sorted(set(schema) - set(found)), sorted(set(found) - set(schema))
        raise ValueError(f"{where}: missing {missing}, unknown {unknown}")
    for name, kinds in schema.items():
        value = found[name]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"{where}: {name} must be {' or '.join(k.__name__ for k in kinds)}, got {value!r}")
        if isinstance(value, float) and value != value:
            raise ValueError(f"{where}: {name} is NaN")


def write(path: str | Path, rows: Sequence[Row]) -> None:
    """Write ``rows`` as a JSON array, one a line; an existing file is replaced only by a complete one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    os.replace(partial, path)


def read(paths: Iterable[str | Path]) -> list[Row]:
    """All rows of some results files, checked.

    Raises:
        ValueError: a file holds something else; names the file.
    """
    rows: list[Row] = []
    for path in paths:
        try:
            found = json.loads(Path(path).read_text())
            for row in found:
                check(row)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a results file of bench.run: {error}") from None
        rows += found
    return rows
