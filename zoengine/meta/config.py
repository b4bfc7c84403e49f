"""The configuration of meta-training: a run's, with a section ``meta`` in the place of ``method``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from zoengine import config
from zoengine.config import ConfigError
from zoengine.config_sections import Count, PositiveInt, Problem, Section
from zoengine.meta.training import MetaFields
from zoengine.methods.fields import FieldError, build


class MetaRun(Section):
    """How long, where to."""

    output_dir: str
    steps: PositiveInt
    batch_size: PositiveInt = 16
    group_by_length: bool = False
    save_every: Count = 100
    seed: Count = 0
    backend: Literal["auto", "reference", "cpp", "triton", "cuda"] = "auto"


class MetaConfig(Problem):
    """A whole meta-training. ``meta`` holds the fields of :class:`~zoengine.meta.MetaFields`, defaults filled in."""

    meta: dict[str, Any]
    run: MetaRun


def load(path: str | Path, overrides: Sequence[str] = ()) -> MetaConfig:
    """The configuration in a YAML file, with overrides such as ``meta.fo_lr=1e-3``.

    Only the training data is read: ``data.eval`` and ``data.test`` may stand there, as in the file of a run.

    Raises:
        ConfigError: the file cannot be read, or a key or value is not as declared here.
    """
    return check(config.read(path, overrides, MetaConfig))


def check(values: Mapping[str, Any]) -> MetaConfig:
    """``values`` as a configuration.

    Raises:
        ConfigError: an unknown key (the nearest known one is suggested), a missing one, or a wrong value.
    """
    found = config.checked(values, MetaConfig)
    try:
        fields = build(MetaFields, {"seed": found.run.seed, **found.meta}, "section 'meta'")
    except FieldError as error:
        raise ConfigError(f"meta: {error}") from None
    config.need_gradient(found.task, "meta-training")
    return found.model_copy(update={"meta": vars(fields)})
