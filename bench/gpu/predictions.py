"""What was predicted for a card without one (``python -m bench.predict``), beside what was measured on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.environment import ROOT
from bench.rows import Row

FOLDER = ROOT / "bench" / "results"


def path(capability: str) -> Path:
    """Where the predictions for a card of this compute capability ("9.0") are."""
    return FOLDER / f"predicted-sm{capability.replace('.', '')}.json"


def load(capability: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Predictions by (case, backend); empty where there are none for such cards."""
    file = path(capability)
    if not file.exists():
        return {}
    return {(k["case"], k["backend"]): k for k in json.loads(file.read_text())["kernels"]}


def compared(capability: str, found: Sequence[Row]) -> str:
    """A Markdown table of the kernels that were both predicted and measured; empty where there is none."""
    predicted, lines = load(capability), []
    for row in found:
        one = predicted.get((row["case"], row["options"].get("backend")))
        if row["part"] in ("kernel", "update") and one is not None:
            measured = row["measures"]["percent_of_copy"]
            lines.append(
                f"| `{row['case']}` | {row['options']['backend']} | {one['instructions']:.1f} | {one['bytes']:g} | "
                f"{one['bound']} | {one['percent_of_copy']:.0f} | {measured:.0f} | "
                f"{measured / one['percent_of_copy']:.2f} |"
            )
    if not lines:
        return ""
    header = "| kernel | backend | SASS | bytes | bound by | predicted, % of copy | measured | measured / predicted |"
    return "\n".join([header, "|---|---|---:|---:|---|---:|---:|---:|", *lines]) + "\n"
