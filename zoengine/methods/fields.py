"""Hyperparameters of methods: plain dataclasses that check themselves, the only place where a default stands."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from zoengine.noise.seeds import check_seed


class FieldError(ValueError):
    """A hyperparameter is unknown, of the wrong type or out of range."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` when a known name resembles ``name``, else the list of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
    """What every zeroth-order method takes; a method's own fields extend this class.

    A field's ``help`` metadata is what the command line shows.
    """

    lr: float = dataclasses.field(metadata={"help": "learning rate; has no default"})
    zo_eps: float = dataclasses.field(default=1e-3, metadata={"help": "perturbation size"})
    weight_decay: float = dataclasses.field(
        default=0.0, metadata={"help": "decoupled: theta *= 1 - lr * weight_decay once a step, matrices only"}
    )
    n_queries: int = dataclasses.field(default=1, metadata={"help": "directions averaged in one update"})
    two_sided: bool = dataclasses.field(
        default=True, metadata={"help": "L(+) - L(-) per query; false: L(+) - L(theta), one forward less per query"}
    )
    weighting: Literal["mean", "rloo", "fitness"] = dataclasses.field(
        default="mean",
        metadata={
            "help": "mean: finite differences; rloo: L(+) minus the mean of all queries, one forward per query; "
            "fitness: the same over their standard deviation"
        },
    )
    seed: int = dataclasses.field(default=0, metadata={"help": "run seed, 64 bits"})
    noise: Literal["gaussian", "rademacher"] = dataclasses.field(
        default="gaussian", metadata={"help": "distribution of the directions"}
    )
    mode: Literal["auto", "inplace", "shadow"] = dataclasses.field(
        default="auto", metadata={"help": "where queries are formed; auto: inplace in fp32, shadow (a copy) in 16 bit"}
    )
    rounding: Literal["stochastic", "nearest"] = dataclasses.field(
        default="stochastic", metadata={"help": "rounding of updates to 16-bit weights; fp32 ignores it"}
    )

    def __post_init__(self) -> None:
        check_types(self)
        require(self.lr >= 0, self, "lr", "at least 0")
        require(self.zo_eps > 0, self, "zo_eps", "greater than 0")
        require(self.weight_decay >= 0, self, "weight_decay", "at least 0")
        require(self.n_queries >= 1, self, "n_queries", "at least 1")
        require(
            self.weighting == "mean" or self.n_queries >= 2,
            self, "n_queries", f"at least 2 with weighting={self.weighting}, whose baseline is the other queries",
        )  # fmt: skip
        try:
            check_seed(self.seed)
        except ValueError as error:
            raise FieldError(str(error)) from None


def require(condition: bool, fields: Any, name: str, what: str) -> None:
    """Raise FieldError unless ``condition`` holds; ``what`` completes "name must be ..."."""
    if not condition:
        raise FieldError(f"{name} must be {what}, got {getattr(fields, name)!r}")


def check_types(fields: Any) -> None:
    """Check every field of a dataclass against its annotation (bool, int, float, str, Literal).

    Integers are taken where a float is expected; numbers must be finite.

    Raises:
        FieldError: names the field, what it takes and what was given.
    """
    annotations = typing.get_type_hints(type(fields))
    for field in dataclasses.fields(fields):
        expected, value = annotations[field.name], getattr(fields, field.name)
        if get_origin(expected) is Literal:
            require(value in get_args(expected), fields, field.name, f"one of {', '.join(get_args(expected))}")
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = number if expected is float else isinstance(value, expected) and (expected is bool or value is not True)
        fits = fits and not (expected is int and isinstance(value, bool))
        require(fits, fields, field.name, f"of type {expected.__name__}")
        if expected is float:
            require(math.isfinite(value), fields, field.name, "finite")
            object.__setattr__(fields, field.name, float(value))


def of_run(cls: type, seed: int, steps: int) -> dict[str, Any]:
    """The fields that a run gives a method unless the user does: its seed, and its length if the method asks for it."""
    known = {field.name for field in dataclasses.fields(cls)}
    return {"seed": seed, **({"steps": steps} if "steps" in known and steps > 0 else {})}


def build(cls: type, values: dict[str, Any], owner: str) -> Any:
    """``cls(**values)`` with errors a user can act on.

    Raises:
        FieldError: an unknown field (the nearest known one is suggested), a missing one, or a bad value.
    """
    known = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise FieldError(f"{owner} has no field {name!r}{nearest(name, known)}")
    missing = [name for name, field in known.items() if field.default is dataclasses.MISSING and name not in values]
    if missing:
        raise FieldError(f"{owner} needs a value for {', '.join(missing)}; for example {missing[0]}=1e-6")
    return cls(**values)
