"""What a run looked like: the environment it ran in, a curve, and a self-contained HTML page."""

from __future__ import annotations

import base64
import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import zoengine
from zoengine.noise import table
from zoengine.scores import FRACTIONS, score

if TYPE_CHECKING:
    from zoengine.trainer.run import Outcome

Row = dict[str, Any]

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "safetensors", "numpy")


class Line(NamedTuple):
    """One line of the report's table: a text, what is right for it, and what the model answered."""

    text: str
    expected: str
    before: str
    after: str
    right_before: bool
    right_after: bool


def environment() -> dict[str, Any]:
    """Versions of everything that can change a result."""
    return {
        "zoengine": zoengine.__version__,
        "noise_version": table.VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in _PACKAGES if (version := package_version(name))},
    }


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the processor's with the instruction set torch uses and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def processor_name() -> str:
    """The processor's model name as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def plot(rows: Sequence[Row], path: Path, *, split: str, metric: str) -> None:
    """Draw loss and ``metric`` over forward passes into a PNG.

    Args:
        rows: of ``metrics.jsonl``.
        split: whose zero-shot and final score stand as reference (the test set where there is one).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [row for row in rows if row["kind"] == "step"]
    scores = [row for row in rows if row["kind"] == "eval"]
    figure = Figure(figsize=(8, 6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)

    passes, losses = [row["forward_passes"] for row in steps], [row["loss"] for row in steps]
    above.plot(passes, losses, color="#9db7d5", linewidth=0.7, label="batch")
    above.plot(passes, _smooth(losses), color="#1f4e8c", linewidth=1.8, label="batch, smoothed")
    held_out = [row for row in scores if row["split"] == "eval"]
    if held_out:
        above.plot(*_points(held_out, "loss"), "o-", color="#c8551b", markersize=4, linewidth=1, label="eval")
        below.plot(*_points(held_out, metric), "o-", color="#c8551b", markersize=4, linewidth=1.4, label="eval")
    reference = [row for row in scores if row["split"] == split]
    if reference:
        zero_shot = reference[0][metric]
        label = f"zero-shot, {split}: {score(metric, zero_shot)}"
        below.axhline(zero_shot, color="#666666", linestyle="--", linewidth=1, label=label)
        if split != "eval" and len(reference) > 1:
            final = f"final, {split}: {score(metric, reference[-1][metric])}"
            below.plot(*_points(reference[-1:], metric), "D", color="#1f4e8c", label=final)
    above.set_ylabel("loss")
    below.set_ylabel(metric)
    below.set_xlabel("forward passes")
    if metric in FRACTIONS:
        below.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    for axes in (above, below):
        axes.grid(color="#e5e5e5", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path)


def write_html(rows: Sequence[Row], lines: Sequence[Line], outcome: Outcome, config: str, path: Path) -> None:
    """Write one HTML page with everything a reader needs to judge and repeat the run."""
    import jinja2

    curve = base64.b64encode((path.parent / "curve.png").read_bytes()).decode()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    run = next(row for row in rows if row["kind"] == "run")
    page = environment.from_string(_PAGE).render(
        run=run, lines=lines, outcome=outcome, config=config, curve=curve, score=score,
        resumed=[row for row in rows if row["kind"] == "resume"],
    )  # fmt: skip
    path.write_text(page, encoding="utf-8")


def _points(rows: Sequence[Row], name: str) -> tuple[list[int], list[float]]:
    return [row["forward_passes"] for row in rows], [row[name] for row in rows]


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential average without the bias towards its start."""
    keep = 1 - 1 / max(1.0, min(25.0, len(values) / 8))
    result, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        result.append(total / weight)
    return result


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>zoengine run</title>
<style>
 body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
 h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
 .big { font-size: 1.3rem } img { max-width: 100% }
 table { border-collapse: collapse } td, th { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top }
 th { font-weight: 600; border-bottom: 1px solid #bbb } .wrong { color: #b3261e } .right { color: #1b6e3c }
 pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: 13px }
</style></head><body>
<h1>{{ run.config.model.path }}, {{ run.config.method.name }}, {{ run.config.tuning.kind }} tuning</h1>
<p class="big">{{ outcome.metric | capitalize }} {{ score(outcome.metric, outcome.before[outcome.metric]) }} &rarr;
<b>{{ score(outcome.metric, outcome.after[outcome.metric]) }}</b>
on {{ outcome.after.n }} {{ outcome.split }} examples,
{{ outcome.forward_passes }} forward passes and {{ outcome.backward_passes or "no" }} backward
{{ "passes" if outcome.backward_passes else "pass" }}, {{ "%.0f" | format(outcome.seconds) }} s,
{{ "%.0f" | format(100 * outcome.evaluation_share) }}% of it for evaluation.</p>
<img alt="loss and {{ outcome.metric }} over forward passes" src="data:image/png;base64,{{ curve }}">
<h2>The first {{ lines | length }} {{ outcome.split }} examples</h2>
<table><tr><th>text</th><th>right</th><th>before</th><th>after</th></tr>
{% for s in lines %}
<tr><td>{{ s.text }}</td><td>{{ s.expected }}</td>
<td class="{{ 'right' if s.right_before else 'wrong' }}">{{ s.before }}</td>
<td class="{{ 'right' if s.right_after else 'wrong' }}">{{ s.after }}</td></tr>
{% endfor %}
</table>
<h2>Run</h2>
<table>
<tr><td>command</td><td><code>{{ run.command }}</code></td></tr>
{% for row in resumed %}
<tr><td>resumed</td><td><code>{{ row.command }}</code></td></tr>
{% endfor %}
<tr><td>zoengine</td>
<td>{{ run.zoengine }}, noise stream version {{ run.noise_version }}, backend {{ run.backend }}</td></tr>
<tr><td>weights</td><td>{{ "{:,}".format(run.trainable_parameters) }} trained, {{ run.dtype }}</td></tr>
<tr><td>device</td><td>{{ run.device }}</td></tr>
<tr><td>versions</td>
<td>python {{ run.python }}{% for name, version in run.packages.items() %}, {{ name }} {{ version }}{% endfor %}
</td></tr>
{% for name, split in run.splits.items() %}
<tr><td>{{ name }} data</td><td>{{ split.n }} examples, hash {{ split.hash }}</td></tr>
{% endfor %}
<tr><td>too long</td><td>{{ run.truncated }} cut, {{ run.skipped }} left out</td></tr>
</table>
<h2>Settings</h2>
<pre>{{ config }}</pre>
</body></html>
"""
