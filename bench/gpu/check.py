"""What a check found, in the form it is stored in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Check = dict[str, Any]
_FIELDS = {"part": str, "check": str, "what": str, "passed": bool, "detail": str}


def make(part: str, check: str, what: str, passed: bool, detail: str = "") -> Check:
    """``what`` was checked for ``check``; ``detail`` says what was seen, above all where it did not pass."""
    return validate({"part": part, "check": check, "what": what, "passed": bool(passed), "detail": detail})


def validate(check: Check) -> Check:
    """The check, if it has the fields of :func:`make` with their types.

    Raises:
        ValueError: it has not.
    """
    if not isinstance(check, dict) or {name: type(value) for name, value in check.items()} != _FIELDS:
        raise ValueError(f"a check has the fields {', '.join(_FIELDS)}, got {check!r}")
    return check


def attempt(part: str, check: str, what: str, function: Callable[[], tuple[bool, str]]) -> Check:
    """The check of a function that returns (passed, detail); an error of it is a check that did not pass."""
    try:
        return make(part, check, what, *function())
    except Exception as error:  # whatever breaks is what the check is there to tell
        return make(part, check, what, False, f"{type(error).__name__}: {str(error)[:300]}")


def same(a: Tensor, b: Tensor) -> Tensor:
    """A bool on the device: equal bits, any NaN equal to any NaN."""
    if not a.is_floating_point():
        return (a == b).all()
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return ((a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())).all()
