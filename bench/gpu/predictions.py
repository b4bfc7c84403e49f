"""What was predicted for a card without one (``python -m bench.predict``), beside what was measured on it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.environment import ROOT
from bench.rows import Row

FOLDER = ROOT / "bench" / "results"


def path(capability: str) -> Path:
    """Where the predictions for cards of this compute capability ("9.0") are."""
    return FOLDER / f"predicted-sm{capability.replace('.', '')}.json"


def load(device: dict[str, Any]) -> tuple[str, dict[tuple[str, str], dict[str, Any]]]:
    """The card whose predictions stand for ``device`` (its ``name`` and ``capability``), and they by (case, backend).

    It is the one that the device's name has in it, else the first of its capability; "" and {} where there is none.
    """
    file = path(device["capability"])
    if not file.exists():
        return "", {}
    stored = json.loads(file.read_text())
    named = [name for name in stored["cards"] if re.search(rf"\b{name}\b", device["name"])]
    card = (named or list(stored["cards"]))[0]
    return card, {(k["case"], k["backend"]): {**k, **k["cards"][card]} for k in stored["kernels"]}


def compared(device: dict[str, Any], found: Sequence[Row]) -> str:
    """A Markdown table of the kernels that were both predicted and measured; empty where there is none.

    Their last column is the predicted floor over the time measured.
    """
    (card, predicted), lines = load(device), []
    for row in found:
        one = predicted.get((row["case"], row["options"].get("backend")))
        if row["part"] in ("kernel", "update") and one is not None:
            measures = row["measures"]
            floor = 1e-12 * one["floor_ps"] * measures["elements"]
            lines.append(
                f"| `{row['case']}` | {row['options']['backend']} | {one['pipes']['issue']:.1f} | {one['bytes']:g} | "
                f"{one['bound']} | {one['percent_of_copy']:.0f} | {measures['percent_of_copy']:.0f} | "
                f"{floor / measures['seconds']:.2f} |"
            )
    if not lines:
        return ""
    header = "| kernel | backend | SASS | bytes | bound by | predicted, % of copy | measured | measured / predicted |"
    text = "\n".join([header, "|---|---|---:|---:|---|---:|---:|---:|", *lines])
    return f"Predicted for {card}; the last column compares times.\n\n{text}\n"
