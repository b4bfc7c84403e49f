"""What the cells of a comparison add up to: one row a method, a Markdown table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from zoengine import seeds
from zoengine.compare.config import CompareConfig, Entry
from zoengine.scores import score
from zoengine.seeds import number, spread

Record = dict[str, Any]
Row = dict[str, Any]


def best(records: Sequence[Record], select: str) -> float | None:
    """The learning rate whose last evaluation is best: lowest loss, or highest metric and then lowest loss.

    None when the loss of every one of them has stopped being finite.
    """
    left = [record for record in records if record["diverged"] is None]
    if not left:
        return None

    def rank(record: Record) -> tuple[float, ...]:
        scores = record["curve"][-1]
        return (scores["loss"],) if select == "loss" else (-scores[record["metric"]], scores["loss"])

    return min(left, key=rank)["lr"]


def row(entry: Entry, records: Sequence[Record], lr: float | None) -> Row:
    """The result of one method: its grid, and at the learning rate ``lr`` the mean and spread over the seeds."""
    first, metric = records[0]["seed"], records[0]["metric"]
    grid = [
        {"lr": r["lr"], "diverged": r["diverged"], **({} if r["diverged"] else r["curve"][-1])}
        for r in records
        if r["seed"] == first
    ]
    chosen = [record for record in records if record["lr"] == lr]
    done = [record for record in chosen if record["diverged"] is None]
    result: Row = {
        "label": entry.label,
        "method": entry.name,
        "metric": metric,
        "grid": grid,
        "lr": lr,
        "at_edge": lr is not None and len(grid) > 2 and lr in (min(entry.configs), max(entry.configs)),
        "seeds": len(chosen),
        "diverged": len(chosen) - len(done),
        "forwards_per_step": entry.forwards_per_step,
    }
    if not done:
        return result
    for name in ("steps", "forward_passes", "backward_passes", "extra_bytes", "weight_bytes"):
        result[name] = max(record[name] for record in done)
    result["seconds_per_step"] = statistics.median(record["seconds_per_step"] for record in done)
    result["split"] = done[0]["split"]
    for name in (metric, "loss"):
        result[name] = spread([record["final"][name] for record in done])
        result[f"{name}_before"] = spread([record["before"][record["split"]][name] for record in done])
    result["curve"] = seeds.curve([record["curve"] for record in done], metric)
    return result


def markdown(config: CompareConfig, rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """The table, with a caption that says how it came about."""
    measured = next((r for r in rows if "split" in r), None)
    metric = rows[0]["metric"]
    head = f"| method | lr | {metric} | loss | forwards | backwards | s/step | extra memory |"
    lines = [_caption(config, rows, facts, measured), "", head, "|---|---|---|---|---|---|---|---|"]
    if measured is not None:
        before = f"{seeds.score(metric, measured[f'{metric}_before'])} | {number(measured['loss_before'])}"
        lines.append(f"| (untrained) | | {before} | 0 | 0 | | |")
    lines += [_line(r) for r in rows]
    lines += ["", _grid_caption(config), "", f"| method | learning rate: loss, {metric} |", "|---|---|"]
    lines += [f"| {r['label']} | {'; '.join(_grid_cell(cell, r) for cell in r['grid'])} |" for r in rows]
    return "\n".join(lines) + "\n"


def _caption(config: CompareConfig, rows: Sequence[Row], facts: dict[str, Any], measured: Row | None) -> str:
    run = config.run
    split = "test" if measured is None else measured["split"]
    notes = [
        f"{config.model.path}, {config.tuning.kind} tuning ({facts['trainable_parameters']:,} parameters, "
        f"{facts['dtype']}), batch {run.batch_size}. Every method may take {run.budget} forward passes; where a step "
        "takes several, it takes fewer steps.",
        f"Of each method's learning rates the one with the best {run.select} on the evaluation data after training "
        f"with seed {run.seeds[0]} was run again with seeds {', '.join(map(str, run.seeds[1:])) or '(none)'}; the "
        f"other rates have one run. Scores are of the {split} data ({facts['splits'][split]['n']} examples), "
        "mean ± standard deviation over the seeds, which change data order, new weights and directions.",
        "Extra memory is what the optimizer holds beside the weights: states, and the copy of shadow mode, in percent "
        "of the model's weights. A backward pass costs about two forward passes and needs activations, which are in "
        "neither column; gradients are in the memory.",
        f"Seconds are of {facts['device']}, backend {facts['backend']}.",
    ]
    if any(r["at_edge"] for r in rows):
        notes.append("† the best rate is at the end of those tried: a better one may lie beyond.")
    return "\n".join(notes)


def _grid_caption(config: CompareConfig) -> str:
    return f"All learning rates tried, with the last evaluation of seed {config.run.seeds[0]} (chosen in bold):"


def _line(r: Row) -> str:
    if r["lr"] is None:
        return f"| {r['label']} | | every learning rate diverged | | | | | |"
    name = r["label"] + (f" ({r['diverged']} of {r['seeds']} seeds diverged)" if r["diverged"] else "")
    lr = f"{r['lr']:g}{' †' if r['at_edge'] else ''}"
    memory = f"{r['extra_bytes'] / 1e6:.1f} MB ({r['extra_bytes'] / r['weight_bytes']:.0%})"
    cost = f"{r['forward_passes']} | {r['backward_passes']} | {r['seconds_per_step']:.3g} | {memory}"
    return f"| {name} | {lr} | {seeds.score(r['metric'], r[r['metric']])} | {number(r['loss'])} | {cost} |"


def _grid_cell(cell: dict[str, Any], r: Row) -> str:
    metric = r["metric"]
    scores = "diverged" if cell["diverged"] else f"{cell['loss']:.3f}, {score(metric, cell[metric])}"
    lr = f"{cell['lr']:g}"
    return f"**{lr}**: {scores}" if cell["lr"] == r["lr"] else f"{lr}: {scores}"
