"""The same thing measured with several seeds: mean and spread, as text and as curves."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoengine.scores import FRACTIONS

Spread = dict[str, Any]


def spread(values: Sequence[float]) -> Spread:
    """``mean``, ``std`` (of the sample; None of a single value) and the ``values`` themselves."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "values": list(values)}


def curve(curves: Sequence[Sequence[dict[str, float]]], key: str) -> list[dict[str, Any]]:
    """The spread of ``key`` at each point of curves that were measured after the same forward passes."""
    return [
        {"forward_passes": points[0]["forward_passes"], key: spread([point[key] for point in points])}
        for points in zip(*curves, strict=False)
    ]


def percent(value: Spread) -> str:
    """``91.2 ± 0.3 %``."""
    deviation = "" if value["std"] is None else f" ± {100 * value['std']:.1f}"
    return f"{100 * value['mean']:.1f}{deviation} %"


def score(metric: str, value: Spread) -> str:
    """As :func:`percent` for metrics that are fractions, else as :func:`number`."""
    return percent(value) if metric in FRACTIONS else number(value)


def number(value: Spread) -> str:
    """``0.231 ± 0.004``."""
    deviation = "" if value["std"] is None else f" ± {value['std']:.3f}"
    return f"{value['mean']:.3f}{deviation}"


def plot(rows: Sequence[dict[str, Any]], path: Path, key: str, name: str) -> None:
    """Draw a score on the evaluation data over forward passes, mean with the range over the seeds, into a PNG.

    Args:
        rows: of each curve its ``label`` and ``curve``, as :func:`curve` makes it; rows without one are left out.
        path: the file.
        key: of the score in the curves.
        name: of the metric.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    styles = itertools.product(("-", "--", ":"), colormaps["tab10"].colors)
    for r, (line, color) in zip((r for r in rows if "curve" in r), itertools.cycle(styles), strict=False):
        passes = [point["forward_passes"] for point in r["curve"]]
        values = [point[key]["values"] for point in r["curve"]]
        means = [point[key]["mean"] for point in r["curve"]]
        axes.fill_between(passes, list(map(min, values)), list(map(max, values)), color=color, alpha=0.12, linewidth=0)
        axes.plot(passes, means, line, color=color, linewidth=1.6, label=r["label"])
    axes.set_xlabel("forward passes")
    axes.set_ylabel(f"{name} on the evaluation data")
    if name in FRACTIONS:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(color="#e5e5e5", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path)
