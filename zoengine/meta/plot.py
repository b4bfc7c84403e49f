"""What the networks learned, as a picture: how strongly each kind of block is perturbed, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_LAYER = re.compile(r"\.(\d+)\.")


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the scales of a metrics file into a PNG: by layer, and their range over the steps.

    Args:
        rows: of ``metrics.jsonl``, among them one of kind ``scales``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    last = next(row for row in reversed(rows) if row["kind"] == "scales")
    steps = [row for row in rows if row["kind"] == "step"]
    figure = Figure(figsize=(9, 7.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, height_ratios=(2, 1))

    for k, (kind, points) in enumerate(sorted(by_kind(last["scales"]).items())):
        layers, values = zip(*points, strict=True)
        style = {"color": f"C{k % 10}", "marker": "osD^v"[k // 10 % 5], "markersize": 4, "linewidth": 1}
        above.plot(layers, values, label=kind, **style)
    above.set_title(f"factor s of each block's noise, mean of the last {last['averaged']} steps (MeZO: 1)", loc="left")
    above.set_xlabel("layer (blocks outside the layers at 0)")
    figure.legend(frameon=False, fontsize="x-small", loc="outside right upper")

    numbers = [row["step"] for row in steps]
    smallest, largest = [row["scale_min"] for row in steps], [row["scale_max"] for row in steps]
    below.fill_between(numbers, smallest, largest, color="#9db7d5")
    for number in [row["step"] for row in steps if row["reset"]]:
        below.axvline(number, color="#c8551b", linewidth=0.6)
    below.set_xlabel("steps of meta-training, smallest to largest s (lines: weights reset)")
    for axes in (above, below):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.axhline(1.0, color="#666666", linestyle="--", linewidth=0.8)
        axes.grid(color="#e5e5e5", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def by_kind(scales: dict[str, float]) -> dict[str, list[tuple[int, float]]]:
    """(layer, scale) of every block, by what follows the layer's number in its name; layer 0 where there is none."""
    kinds: dict[str, list[tuple[int, float]]] = {}
    for name, scale in scales.items():
        layer = _LAYER.search(name)
        kind = name[layer.end() :] if layer else name
        kinds.setdefault(kind, []).append((int(layer[1]) if layer else 0, scale))
    return {kind: sorted(points) for kind, points in kinds.items()}
