"""The result of a check of a card: a JSON file that grows part by part, and the Markdown and plots made of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import figure, rows, table
from bench.gpu import check, predictions
from bench.rows import Row

FORMAT = 1
STATUSES = ("passed", "partly", "failed", "left out")
ROW_PARTS = {"kernels": "kernel", "updates": "update", "step": "step"}
Result = dict[str, Any]


def new(device: dict[str, Any]) -> Result:
    """A result with nothing measured yet."""
    return {"format": FORMAT, "device": device, "parts": {}, "checks": [], "rows": []}


def validate(result: Result) -> Result:
    """The result, if it has the form of this module; rows as in bench.rows, checks as in bench.gpu.check.

    Raises:
        ValueError: says what is wrong.
    """
    if not isinstance(result, dict) or set(result) != set(new({})) or result["format"] != FORMAT:
        raise ValueError(f"a result of format {FORMAT} has the keys {', '.join(new({}))}")
    for name, part in result["parts"].items():
        if set(part) != {"status", "seconds", "date", "left_out", "facts"} or part["status"] not in STATUSES:
            raise ValueError(f"part {name}: status (one of {', '.join(STATUSES)}), seconds, date, left_out, facts")
    for one in result["checks"]:
        check.validate(one)
    for row in result["rows"]:
        rows.check(row)
    return result


def read(path: Path, device: dict[str, Any]) -> Result:
    """What is stored in ``path`` for the same device, or a new result.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.exists():
        return new(device)
    try:
        result = validate(json.loads(path.read_text()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a result of bench.gpu_check ({error}); name another folder") from None
    return {**result, "device": device}


def merge(result: Result, part: str, outcome: dict[str, Any], found: dict[str, Any]) -> None:
    """Put what a part found in the place of what it found before."""
    kind = ROW_PARTS.get(part)
    result["parts"][part] = outcome
    result["rows"] = [row for row in result["rows"] if row["part"] != kind] + found.get("rows", [])
    result["checks"] = [one for one in result["checks"] if one["part"] != part] + found.get("checks", [])
    validate(result)


def write(result: Result, stem: Path) -> None:
    """``stem``.json and ``stem``.md."""
    figure.write(stem.with_suffix(".json"), result)
    stem.with_suffix(".md").write_text(render(result))


def render(result: Result) -> str:
    """The Markdown: what ran, the goals, the checks, then the tables."""
    device = result["device"]
    versions = ", ".join(f"{name} {device[name]}" for name in ("torch", "cuda", "triton", "transformers", "python"))
    commits = sorted({str(row["environment"]["commit"]) for row in result["rows"]})
    blocks = [
        f"# {device['name']}\n",
        f"Written by `make gpu-check`. sm_{device['capability'].replace('.', '')}, "
        f"{device['memory_bytes'] / 2**30:.0f} GiB, {device['multiprocessors']} multiprocessors; {versions}"
        + (f"; commit {', '.join(commits)}" if commits else "")
        + ".\n",
        "## Parts\n",
        _table(
            ("part", "status", "seconds", "left out"),
            [(k, p["status"], f"{p['seconds']:.0f}", "; ".join(p["left_out"])) for k, p in result["parts"].items()],
        ),
    ]
    sections = {
        "Goals": _table(("goal", "wanted", "measured", ""), goals(result)),
        "Checks": _checks(result["checks"]),
        "The whole step": _steps([row for row in result["rows"] if row["part"] == "step"]),
        "Triton against CUDA C++": _table(
            ("kernel", "elements", "Triton, ms", "CUDA, ms", "faster"), faster(result["rows"])
        ),
        "Predicted and measured": predictions.compared(device, result["rows"]),
        "Kernels": "\n".join(table.render(members) for members in _by_size(result["rows"])),
    }
    for title, text in sections.items():
        if text:
            blocks.append(f"## {title}\n\n{text}")
    return "\n".join(blocks)


def goals(result: Result) -> list[tuple[str, str, str, str]]:
    """(goal, what is wanted, what was measured, reached or not) for what was measured."""
    h200 = "H200" in result["device"]["name"]
    found = []
    for noise, wanted in (("gaussian", 75 if h200 else 90), ("rademacher", 95)):
        for row in result["rows"]:
            if row["case"] == f"add_noise/bf16/k1/{noise}/nearest":
                value, backend = row["measures"]["percent_of_copy"], row["options"]["backend"]
                name = f"`add_noise_` bf16, K=1, in place, {noise}, {backend}"
                found.append((name, f">= {wanted} % of the copy", f"{value:.0f} %", _verdict(value >= wanted)))
    for row in (row for row in result["rows"] if row["part"] == "step" and row["options"]["method"] == "mezo"):
        tokens, name = (
            _tokens(row),
            f"MeZO {row['options']['mode']}, {row['options']['model']}, {_tokens(row):,} tokens",
        )
        ratio, faster_by = _ratio(row), row["measures"]["times_faster"]
        if tokens in (2048, 16384):
            wanted = 1.10 if tokens == 2048 else 1.03
            found.append((name, f"step / forwards <= {wanted}", f"{ratio:.3f}", _verdict(ratio <= wanted)))
        elif tokens == 256:
            found.append((name, ">= 2 times faster than today", f"{faster_by:.2f}", _verdict(faster_by >= 2)))
    return found


def faster(found: Sequence[Row]) -> list[tuple[str, str, str, str, str]]:
    """For each kernel and update that both GPU backends ran: the faster one, or neither within two percent."""
    times: dict[tuple[str, int], dict[str, float]] = {}
    for row in found:
        if row["part"] in ("kernel", "update"):
            key = (row["case"].partition("@")[0], row["measures"]["elements"])
            times.setdefault(key, {})[row["options"]["backend"]] = row["measures"]["seconds"]
    result = []
    for (case, elements), seconds in times.items():
        if {"triton", "cuda"} <= set(seconds):
            ratio = seconds["triton"] / seconds["cuda"]
            best = "neither" if 1 / 1.02 < ratio < 1.02 else "cuda" if ratio > 1 else "triton"
            cells = (f"{1e3 * seconds[name]:.3g}" for name in ("triton", "cuda"))
            result.append((f"`{case}`", f"{elements:,}", *cells, best))
    return result


def draw(result: Result, stem: Path) -> list[Path]:
    """``stem``-kernels.png and ``stem``-step.png, those for which there are rows; needs matplotlib."""
    drawn = []
    kernels = [row for row in result["rows"] if row["part"] == "kernel" and "@" not in row["case"]]
    if kernels:
        from bench.plot import draw as draw_kernels

        drawn.append(stem.with_name(f"{stem.name}-kernels.png"))
        draw_kernels(kernels, drawn[-1])
    steps = [row for row in result["rows"] if row["part"] == "step"]
    if steps:
        drawn.append(stem.with_name(f"{stem.name}-step.png"))
        _draw_steps(steps, drawn[-1], result["device"]["name"])
    return drawn


def _verdict(reached: bool) -> str:
    return "reached" if reached else "**missed**"


def _tokens(row: Row) -> int:
    return row["options"]["batch"] * row["options"]["tokens"]


def _ratio(row: Row) -> float:
    return 1 + row["measures"]["overhead_percent"] / 100


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    if not lines:
        return ""
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


def _checks(found: Sequence[check.Check]) -> str:
    kinds: dict[tuple[str, str], list[check.Check]] = {}
    for one in found:
        kinds.setdefault((one["part"], one["check"]), []).append(one)
    lines = [(part, name, str(sum(c["passed"] for c in some)), str(len(some))) for (part, name), some in kinds.items()]
    text = _table(("part", "check", "passed", "of"), lines)
    failed = [f"- {c['check']}: {c['what']}: {c['detail']}" for c in found if not c["passed"]]
    return text + ("\nNot passed:\n\n" + "\n".join(failed) + "\n" if failed else "")


def _steps(found: Sequence[Row]) -> str:
    lines = []
    for row in found:
        o, m = row["options"], row["measures"]
        peaks = (m["peak_bytes"], m["forward_peak_bytes"])
        lines.append((
            o["model"], f"{_tokens(row):,}", table.step_label(row), str(m["forwards"]), f"{1e3 * m['seconds']:.1f}",
            f"{_ratio(row):.3f}", f"{_tokens(row) * m['forwards'] / m['seconds']:,.0f}",
            "" if None in peaks else f"{peaks[0] / peaks[1]:.2f}",
            "" if m["times_faster"] is None else f"{m['times_faster']:.2f}",
        ))  # fmt: skip
    return _table(
        ("model", "tokens", "step", "forwards", "ms", "step / forwards", "tokens/s", "peak memory / inference",
         "times faster than today"),
        lines,
    )  # fmt: skip


def _by_size(found: Sequence[Row]) -> list[list[Row]]:
    members: dict[tuple[str, int], list[Row]] = {}
    for row in found:
        if row["part"] in ("kernel", "update"):
            members.setdefault((row["part"], row["measures"]["elements"]), []).append(row)
    return list(members.values())


def _draw_steps(found: Sequence[Row], path: Path, device: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row["options"]["model"] for row in found))
    drawing, axes = pyplot.subplots(1, len(models), figsize=(5 * len(models), 4), squeeze=False, layout="constrained")
    for axis, model in zip(axes[0], models, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in found:
            if row["options"]["model"] == model and row["options"]["method"] != "forwards":
                lines.setdefault(table.step_label(row), []).append((_tokens(row), _ratio(row)))
        for label, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        axis.axhline(1, color="#999999", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(model)
        axis.set_xlabel("tokens a forward")
    axes[0][0].set_ylabel("step time / its forwards alone")
    axes[0][-1].legend(fontsize=7)
    drawing.suptitle(device)
    drawing.savefig(path, dpi=120)
    pyplot.close(drawing)
