"""What the points of a sweep add up to: one row a setting, mean and spread over its seeds, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from zoengine import seeds
from zoengine.scores import score
from zoengine.seeds import number, spread
from zoengine.sweep.grid import SEED, Plan, is_tuned
from zoengine.sweep.points import Record

Row = dict[str, Any]


def scores(record: Record) -> str:
    """The main score and the loss after training, for a line about a finished point."""
    shown = score(record["metric"], record["score"])
    return f"{record['metric']} {shown}, loss {record['loss']:.4f} ({record['split']})"


def rows(plan: Plan, records: Sequence[Record]) -> list[Row]:
    """One row for each setting of which a point has been run; the best of each job, by the evaluation data, is marked.

    A setting of which a seed has failed is behind all of which none has.
    """
    found = []
    for setting in _different(point.setting for point in plan.points):
        names = {point.name for point in plan.points if point.setting == setting}
        mine = [record for record in records if record["point"] in names]
        if mine:
            found.append(_row(setting, mine))
    jobs = _different(point.job for point in plan.points)
    for job in jobs:
        left = [r for r in found if job.items() <= r["setting"].items() and "evaluation" in r]
        if left and any(is_tuned(key) for key in plan.keys):
            best = min(left, key=lambda r: (r["failed"], -r["evaluation"]["mean"], r["evaluation_loss"]["mean"]))
            best["best"] = True
            best["at_edge"] = [key for key, values in plan.keys.items() if _at_edge(key, values, best["setting"])]
    return found


def _row(setting: dict[str, Any], records: Sequence[Record]) -> Row:
    done = [record for record in records if record["error"] is None]
    label = ", ".join(f"{key.rpartition('.')[2]} {_text(value)}" for key, value in setting.items()) or "all"
    result: Row = {"setting": setting, "label": label, "best": False, "at_edge": []}
    result |= {"seeds": len(records), "failed": len(records) - len(done)}
    for name in ("steps", "forward_passes", "backward_passes"):
        result[name] = max(record[name] for record in done or records)
    result["seconds"] = statistics.fmean(record["seconds"] for record in done or records)
    if not done:
        return result
    result |= {"metric": done[0]["metric"], "split": done[0]["split"]}
    for name in ("before", "score", "loss", "evaluation", "evaluation_loss"):
        result[name] = spread([record[name] for record in done])
    result["curve"] = seeds.curve([record["curve"] for record in done], "score")
    return result


def _different(items: Any) -> list[Any]:
    found: list[Any] = []
    for item in items:
        if item not in found:
            found.append(item)
    return found


def _at_edge(key: str, values: Sequence[Any], setting: dict[str, Any]) -> bool:
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    tried = is_tuned(key) and len(numbers) == len(values) > 2
    return tried and setting[key] in (min(numbers), max(numbers))


def markdown(plan: Plan, found: Sequence[Row], records: Sequence[Record]) -> str:
    """The table, with a caption that says how it came about, and what failed."""
    keys = [key for key in plan.keys if key != SEED]
    done = [record for record in records if record["error"] is None]
    splits = {record["split"] for record in done}
    after = f"{metric(records)} ({' or '.join(sorted(splits)) or 'test'})"
    chosen_by = [f"{metric(records)} (eval)"] if splits != {"eval"} else []
    head = [*keys, "untrained", after, *chosen_by, "loss", "seeds", "forwards", "backwards", "seconds"]
    lines = [*_caption(plan, records, done), "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(_cells(r, keys, bool(chosen_by)))} |" for r in found]
    failed = [f"- {record['point']}: {record['error']}" for record in records if record["error"] is not None]
    return "\n".join([*lines, *(["", "Failed:", "", *failed] if failed else [])]) + "\n"


def metric(records: Sequence[Record]) -> str:
    """What the main score is, if it is the same everywhere."""
    names = {record["metric"] for record in records if record["error"] is None}
    return names.pop() if len(names) == 1 else "score"


def _caption(plan: Plan, records: Sequence[Record], done: Sequence[Record]) -> list[str]:
    notes = [f"{len(records)} of {len(plan.points)} runs are done."] if len(records) < len(plan.points) else []
    repeated = ", mean ± standard deviation over the seeds" if len(plan.keys.get(SEED, [])) > 1 else ""
    notes.append(f"Scores after the last step{repeated}. Passes and seconds are of one run's training.")
    if any(is_tuned(key) for key in plan.keys):
        tested = any(record["split"] == "test" for record in done)
        beside = "; the test data chose nothing" if tested else ", whose scores these are: read the best as optimistic"
        notes.append(f"Bold: the best by the evaluation data{beside}.")
        notes.append("A value with † is the least or greatest of those tried: a better one may lie beyond.")
    for record in done[:1]:
        about = record["facts"]
        sizes = ", ".join(f"{name} {split['n']} ({split['hash'][:12]})" for name, split in about["splits"].items())
        notes.append(
            f"{about['trainable_parameters']:,} trained parameters, {about['dtype']}, {about['device']}, backend "
            f"{about['backend']}. Data of {record['point']}, with hashes: {sizes}."
        )
    return notes


def _cells(r: Row, keys: Sequence[str], chosen_by: bool) -> list[str]:
    def bold(text: str) -> str:
        return f"**{text}**" if r["best"] else text

    cells = [bold(_text(r["setting"][key]) + (" †" if key in r["at_edge"] else "")) for key in keys]
    if "score" in r:
        shown = {name: seeds.score(r["metric"], r[name]) for name in ("before", "score", "evaluation")}
        cells += [shown["before"], bold(shown["score"]), *([shown["evaluation"]] if chosen_by else [])]
        cells.append(number(r["loss"]))
    else:
        cells += ["", "failed", *([""] if chosen_by else []), ""]
    failed = f" ({r['failed']} failed)" if r["failed"] else ""
    return [
        *cells,
        f"{r['seeds']}{failed}",
        *map(str, (r["forward_passes"], r["backward_passes"])),
        f"{r['seconds']:.0f}",
    ]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
