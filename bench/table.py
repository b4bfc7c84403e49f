"""``python -m bench.table FILE...``: the rows of results files as Markdown tables, as the README shows them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from bench import rows
from bench.rows import Row

Columns = dict[str, Callable[[Row], str]]


def render(found: Sequence[Row]) -> str:
    """One table per part and machine, with a line above each that says where it was measured.

    Of a drift only the last checkpoint is shown; the rows hold all.
    """
    last = {_setting(row): row for row in found if row["part"] == "drift"}
    found = [row for row in found if row["part"] != "drift" or last[_setting(row)] is row]
    blocks = []
    for part, columns in _PARTS.items():
        places = dict.fromkeys(_place(row) for row in found if row["part"] == part)
        for place in places:
            members = [row for row in found if row["part"] == part and _place(row) == place]
            header = "| " + " | ".join(columns) + " |"
            rule = "|" + "|".join(" --- " if k < _TEXT[part] else " ---: " for k in range(len(columns))) + "|"
            lines = ["| " + " | ".join(cell(row) for cell in columns.values()) + " |" for row in members]
            blocks.append("\n".join([f"{_TITLES[part](members[0])} {place}", "", header, rule, *lines, ""]))
    return "\n".join(blocks)


def _place(row: Row) -> str:
    e = row["environment"]
    where = e["device"] if e["device_type"] == "cuda" else f"{e['device']}, {e['threads']} threads, {e['isa']} kernels"
    triton = f", Triton {e['triton']}" if e["device_type"] == "cuda" else ""
    return f"({where}; torch {e['torch']}{triton}; commit {e['commit']}, {e['date'][:10]})"


def _setting(row: Row) -> tuple:
    return (_place(row), *row["options"].values())


def _measure(name: str, form: str, suffix: str = "") -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = row["measures"][name]
        return "" if value is None else format(value, form) + suffix

    return cell


def _option(name: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = row["options"][name]
        return "" if value is None else str(value)

    return cell


def _megabytes(name: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = row["measures"][name]
        return "" if value is None else f"{value / 1e6:,.1f}"

    return cell


def _exponent(row: Row) -> str:
    value = row["measures"]["growth_exponent"]
    return "" if value is None else f"{value:.2f}"


_NAMES = {"normal_add": "`torch.normal` + `add_`", "copy": "copy", "add_noise": "`add_noise_`"}


def kernel_label(row: Row) -> str:
    """What a kernel row measured, in words, without its dtype and backend."""
    o = row["options"]
    words = [_NAMES.get(o["op"], f"`{o['op']}`")]
    if o["op"] == "segment_dot_noise":
        words = ["`segment_dot` with noise"]
    if o["terms"]:
        words.append(f"K={o['terms']}")
    if o["op"] in ("add_noise", "noise_fill", "segment_dot_noise"):
        words.append(o["noise"])
    if o["op"] == "add_noise" and o["dtype"] != "fp32":
        words.append(o["rounding"])
    words += [f"+{o['states']} fp32 states"] * (o["states"] > 0) + ["decay"] * o["decay"] + ["to `out`"] * o["out"]
    return " ".join(words)


_CONTESTANTS = {"forwards": "the two forwards alone", "today": "loop of today, tensor by tensor"}


def step_label(row: Row) -> str:
    """What took the step of a step or memory row, in words."""
    method = row["options"]["method"]
    return _CONTESTANTS.get(method, f"{method}, {row['options']['mode']}")


_TITLES: dict[str, Callable[[Row], str]] = {
    "kernel": lambda row: f"Kernels, {row['measures']['elements']:,} elements",
    "update": lambda row: f"Updates in one pass, {row['measures']['elements']:,} elements",
    "step": lambda row: (
        f"Training step of {row['options']['model']}, {row['options']['batch']} x {row['options']['tokens']} tokens, "
        f"{row['measures']['elements']:,} parameters"
    ),
    "memory": lambda row: f"Memory of training {row['options']['model']}",
    "drift": lambda row: f"Rounding drift at lr = 0, {row['measures']['elements']:,} weights",
}
_TEXT = {"kernel": 3, "update": 3, "step": 2, "memory": 2, "drift": 3}  # columns that are text
_PARTS: dict[str, Columns] = {
    "kernel": {
        "kernel": kernel_label,
        "dtype": _option("dtype"),
        "backend": _option("backend"),
        "ms": lambda row: f"{1e3 * row['measures']['seconds']:.3g}",
        "M elements/s": _measure("melements_per_s", ",.0f"),
        "GB/s": _measure("gb_per_s", ",.1f"),
        "% of copy": _measure("percent_of_copy", ".0f"),
        "times faster than today": _measure("times_faster", ".1f"),
    },
    "update": {
        "update": lambda row: f"`{row['options']['op']}`",
        "dtype": _option("dtype"),
        "backend": _option("backend"),
        "ms": lambda row: f"{1e3 * row['measures']['seconds']:.3g}",
        "% of copy": _measure("percent_of_copy", ".0f"),
        "% of the floor": _measure("percent_of_floor", ".0f"),
        "times faster than plain torch": _measure("times_faster", ".1f"),
    },
    "step": {
        "step": step_label,
        "dtype": _option("dtype"),
        "s": _measure("seconds", ".3g"),
        "on top of the forwards": _measure("overhead_percent", ".0f", " %"),
        "times faster than today": _measure("times_faster", ".2f"),
    },
    "memory": {
        "step": step_label,
        "dtype": _option("dtype"),
        "weights, MB": _megabytes("weight_bytes"),
        "states, MB": _megabytes("state_bytes"),
        "copies, MB": _megabytes("copy_bytes"),
        "held beyond the weights": _measure("added_percent", ".2f", " %"),
        "peak above a forward": _measure("peak_growth_percent", ".1f", " %"),
    },
    "drift": {
        "mode": _option("mode"),
        "dtype": _option("dtype"),
        "rounding": _option("rounding"),
        "steps": _measure("steps", ",d"),
        "drift, % of the weights": _measure("drift_percent", ".3g"),
        "drift, ulps": _measure("drift_ulps", ".3g"),
        "mean, ulps": _measure("drift_mean_ulps", ".2g"),
        "weights changed": _measure("changed_percent", ".1f", " %"),
        "growth exponent": _exponent,
        "ulps at 10,000 steps": _measure("ulps_after_10000", ".3g"),
    },
}


def main() -> int:
    """Print the tables of the files named on the command line."""
    p = argparse.ArgumentParser(prog="python -m bench.table", description="Results files as Markdown tables.")
    p.add_argument("files", nargs="+", metavar="FILE")
    sys.stdout.write(render(rows.read(p.parse_args().files)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
