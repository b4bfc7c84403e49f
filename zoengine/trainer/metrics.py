"""The metrics of a run as JSON lines: ``metrics.jsonl``, one row a step or evaluation, after a row about the run.

For example::

    {"kind": "run", "zoengine": "0.1.0", "noise_version": 1, "backend": "cpp", ...}
    {"kind": "step", "step": 1, "forward_passes": 2, "loss": 0.69, "lr": 1e-06, "seconds": 1.4}
    {"kind": "eval", "step": 100, "forward_passes": 200, "split": "eval", "accuracy": 0.71, "loss": 0.58, ...}
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from zoengine.trainer.optimizer import passes, unwrapped

Row = dict[str, Any]

NOT_SCORES = ("kind", "step", "forward_passes", "split", "seconds")  # what else an evaluation's row holds


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics file; a last line cut off by a crash is left out, and so is a missing file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricsWriter(TrainerCallback):
    """Appends to a metrics file while a run goes on.

    Args:
        path: the file.
        resume_step: rows of later steps are removed first; None begins the file anew.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        self.rows = [] if resume_step is None else [r for r in read_rows(path) if r.get("step", 0) <= resume_step]
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)  # a line is on its way once it is written
        self.evaluating = 0.0  # seconds spent so since this was made
        self._trained = max((row["seconds"] for row in self.rows if row["kind"] == "step"), default=0.0)

    def write(self, kind: str, **values: Any) -> None:
        """Append one row."""
        self.rows.append({"kind": kind, **values})
        self._file.write(json.dumps(self.rows[-1]) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def evaluation(self, split: str, step: int, forward_passes: int, metrics: dict[str, float], seconds: float) -> None:
        """Append the scores of ``split`` after ``step`` steps, which took ``seconds``."""
        self.evaluating += seconds
        self.write("eval", step=step, forward_passes=forward_passes, split=split, **metrics, seconds=round(seconds, 3))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = unwrapped(kwargs["optimizer"])
        self.write(
            "step", step=state.global_step, **passes(optimizer), loss=optimizer.last_loss, lr=optimizer.last_lr,
            seconds=round(self._trained + time.monotonic() - self._began, 3),
        )  # fmt: skip

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        speed = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
        named = {name: value for name, value in (metrics or {}).items() if name not in speed}
        scores = {name.removeprefix("eval_"): value for name, value in named.items() if name.startswith("eval_")}
        taken = unwrapped(kwargs["optimizer"]).forward_passes
        self.evaluation("eval", state.global_step, taken, scores, metrics["eval_runtime"])
