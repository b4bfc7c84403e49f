"""What is known of a point from the files in its folder, and who works on it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from zoengine import config
from zoengine.config_files import flat
from zoengine.sweep.grid import Point
from zoengine.trainer.metrics import read_rows
from zoengine.trainer.run import RunError

Record = dict[str, Any]

_FAILED = "failed.json"
# What may differ between a run that is there and the point it is taken for: no result depends on it.
_FREE = {
    "run.output_dir", "run.log_every", "run.save_every", "run.save_total_limit", "run.report_to", "run.backend",
    "run.eval_batch_size", "run.push_to_hub", "model.device",
}  # fmt: skip


@contextmanager
def claimed(point: Point) -> Iterator[bool]:
    """Hold the point for this process; False if another has it.

    The operating system holds the lock, so that it ends with the process, however that ends.
    """
    folder = point.folder.parent / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{point.name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    except NotImplementedError as error:
        raise RunError(
            f"run.output_dir: {folder} is on a file system without locks ({error}); choose another"
        ) from None
    try:
        yield True
    finally:
        lock.release()


def check(point: Point) -> None:
    """Refuse what an earlier run with another configuration left in the point's folder.

    Raises:
        RunError: it was started with other values; the message names them.
        ConfigError: what it was started with cannot be read.
    """
    if not (point.folder / "config.yaml").is_file():
        return
    earlier, now = (flat(c.model_dump()) for c in (config.load(point.folder), point.config))
    changed = [key for key in sorted({*earlier, *now} - _FREE) if earlier.get(key) != now.get(key)]
    if changed:
        raise RunError(
            f"{point.folder} was run with other values of {', '.join(changed)}; choose another run.output_dir, or "
            "start anew with --overwrite"
        )


def fail(point: Point, error: Exception) -> None:
    """Record that the point's run cannot be finished."""
    _write(point.folder / _FAILED, {"error": str(error)})


def forget(point: Point) -> None:
    """Make the point one that has not been run; its other files go when it is run again."""
    for name in (_FAILED, "result.json", "config.yaml"):
        (point.folder / name).unlink(missing_ok=True)


def done(point: Point) -> bool:
    """Whether the point has been run to its end or has failed."""
    return _ending(point) is not None


def _ending(point: Point) -> Path | None:
    return next((path for name in ("result.json", _FAILED) if (path := point.folder / name).is_file()), None)


def read(point: Point) -> Record | None:
    """The record of a point that has been run to its end or has failed; None of any other.

    Raises:
        RunError: the files are not those of a run.
    """
    ending = _ending(point)
    if ending is None:
        return None
    try:
        result = json.loads(ending.read_text(encoding="utf-8"))
        rows = read_rows(point.folder / "metrics.jsonl")
        return {"point": point.name, "values": point.values, **_record(result, rows)}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise RunError(f"{ending} is not what a run leaves ({error!r}); remove {point.folder}") from error


def _record(result: Record, rows: list[Record]) -> Record:
    steps = [row for row in rows if row["kind"] == "step"]
    evaluations = [row for row in rows if row["kind"] == "eval"]
    about = next((row for row in rows if row["kind"] == "run"), {})
    found: Record = {
        "error": result.get("error"),
        "steps": max((row["step"] for row in steps), default=0),
        "forward_passes": max((row["forward_passes"] for row in steps), default=0),
        "backward_passes": max((row.get("backward_passes", 0) for row in steps), default=0),
        "seconds": max((row["seconds"] for row in steps), default=0.0),
        "facts": {key: about.get(key) for key in ("splits", "device", "backend", "dtype", "trainable_parameters")},
    }
    if found["error"] is not None:
        return found
    split, metric = result["split"], result["metric"]
    shown = "eval" if any(row["split"] == "eval" for row in evaluations) else split
    curve = [row for row in evaluations if row["split"] == shown]
    if not (math.isfinite(result["after"]["loss"]) and math.isfinite(curve[-1]["loss"])):
        return {**found, "error": "the loss after training is not finite"}
    return {
        **found,
        "metric": metric,
        "split": split,
        "before": result["before"][metric],
        "score": result["after"][metric],
        "loss": result["after"]["loss"],
        "after": result["after"],
        "evaluation": curve[-1][metric],
        "evaluation_loss": curve[-1]["loss"],
        "curve": [{"forward_passes": row["forward_passes"], "score": row[metric]} for row in curve],
    }


def _write(path: Path, record: Record) -> None:
    """Write beside its place and rename, so that what is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".incomplete")
    partial.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)
