"""Progress on stderr: a bar, what is running, and the seconds left."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_WIDTH = 24


def say(text: str) -> None:
    """One line on stderr; stdout is for results."""
    sys.stderr.write(text + "\n")


class Progress:
    """A bar over work of a known total ``weight`` (in estimated seconds, for instance).

    On a terminal the line is redrawn; elsewhere a line is written at every tenth.
    """

    def __init__(self, weight: float, stream: TextIO | None = None) -> None:
        self._weight = max(weight, 1e-9)
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._done = 0.0
        self._tenths = 0
        self._started = time.perf_counter()

    def advance(self, weight: float, label: str) -> None:
        """``weight`` more is done; ``label`` says of what."""
        self._done = min(self._done + weight, self._weight)
        share = self._done / self._weight
        left = (time.perf_counter() - self._started) * (1 / max(share, 1e-9) - 1)
        bar = "#" * round(share * _WIDTH)
        line = f"[{bar:<{_WIDTH}}] {share:4.0%}  {left:4.0f} s left  {label}"
        if self._terminal:
            self._stream.write(f"\r{line[:110]:<110}")
        elif int(share * 10) > self._tenths:
            self._tenths = int(share * 10)
            self._stream.write(line + "\n")
        self._stream.flush()

    def finish(self) -> None:
        """End the line."""
        if self._terminal:
            self._stream.write("\n")
