"""The progress of a run: a bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm
from transformers import ProgressCallback

from zoengine.trainer.optimizer import unwrapped

_LINE_EVERY = 30.0  # seconds between lines when nobody watches a bar


class ZOProgressCallback(ProgressCallback):
    """Loss, forward passes and time left of a zeroth-order run.

    Args:
        stream: where to write; a bar is drawn if it is a terminal.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self._stream = stream or sys.stderr
        self._smooth: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.current_step = state.global_step
        self._first, self._began, self._last_line = state.global_step, time.monotonic(), float("-inf")
        if self._stream.isatty():
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="train", unit="step", dynamic_ncols=True,
                file=self._stream,
            )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = unwrapped(kwargs["optimizer"])
        loss = optimizer.last_loss
        self._smooth = loss if self._smooth is None else 0.9 * self._smooth + 0.1 * loss
        if self.training_bar is not None:
            shown = f"loss {self._smooth:.4f}, {optimizer.forward_passes} forward passes"
            self.training_bar.set_postfix_str(shown, refresh=False)
            super().on_step_end(args, state, control, **kwargs)
        elif time.monotonic() - self._last_line >= _LINE_EVERY or state.global_step == state.max_steps:
            self._last_line = time.monotonic()
            self._write(
                f"step {state.global_step}/{state.max_steps}  loss {self._smooth:.4f}  "
                f"{optimizer.forward_passes} forward passes  {self._left(state)}"
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        super().on_evaluate(args, state, control, **kwargs)
        named = (metrics or {}).items()
        aside = ("_n", "_runtime", "_per_second")
        scores = [
            f"{name} {value:.4f}" for name, value in named if name.startswith("eval_") and not name.endswith(aside)
        ]
        if scores:
            self._write(f"step {state.global_step}/{state.max_steps}  " + "  ".join(scores))

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._stream.isatty():
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Nothing: the bar shows it already."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def _left(self, state: Any) -> str:
        done = state.global_step - self._first
        seconds = (time.monotonic() - self._began) / done * (state.max_steps - state.global_step)
        return f"{tqdm.format_interval(seconds)} left"

    def _write(self, line: str) -> None:
        if self.training_bar is not None:
            self.training_bar.write(line, file=self._stream)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()
