"""Which parameters of a model are trained: all, a subset, or an adapter's; confined to some layers if asked."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from zoengine.models import prefix
from zoengine.models.errors import ModelError

TUNINGS = ("full", "subset", "lora", "prefix", "none")

_LINEAR = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """How a model is tuned; the fields are those of :func:`zoengine.models.load`. Calling it prepares a model.

    Raises:
        ModelError: an unknown kind, or a field that does not go with it.
    """

    kind: str
    layers: str | Sequence[int] | None
    parameters: str
    lora_r: int
    lora_alpha: float
    lora_target_modules: Sequence[str] | str
    prefix_tokens: int
    prefix_init: str
    seed: int

    def __post_init__(self) -> None:
        if self.kind not in TUNINGS:
            raise ModelError(f"tuning is {self.kind!r}; expected one of {', '.join(TUNINGS)}")
        if self.kind in ("prefix", "none") and self.layers is not None:
            raise ModelError(
                f"layers={self.layers!r} does not go with tuning={self.kind} (a prefix stands before all); take "
                "tuning=lora, subset or full, or leave layers out"
            )
        if self.layers is not None:
            _ends(self.layers)
        if self.kind == "subset":
            _pattern(self.parameters)
        if self.kind == "prefix":
            prefix.check(self.prefix_tokens, self.prefix_init)

    def __call__(self, model: Any, tokenizer: Any, *, head: str | int, top: Sequence[str]) -> Any:
        """``model`` with ``requires_grad`` set, wrapped by PEFT for "lora" and "prefix".

        Args:
            head: of :func:`zoengine.models.load`.
            top: names of modules that are trained in any case, because they start from random numbers.

        The parameters of ``model`` keep their storage: nothing of the base is copied.
        """
        if self.kind == "lora":
            return self._with_lora(model, head, top)
        if self.kind == "prefix":
            return prefix.with_prefix(
                model, tokenizer, tokens=self.prefix_tokens, init=self.prefix_init, seed=self.seed, head=head, top=top
            )
        if self.kind == "none":
            return model.requires_grad_(False)
        if self.kind == "subset" or self.layers is not None:
            self._freeze_the_rest(model, top)
        return model

    def _freeze_the_rest(self, model: torch.nn.Module, top: Sequence[str]) -> None:
        names = [name for name, _ in model.named_parameters()]
        if self.layers is not None:
            place, numbers = pick_layers(model, self.layers)
            inside = tuple(f"{place}.{number}." for number in numbers)
            names = [name for name in names if name.startswith(inside)]
        chosen = set(names if self.kind == "full" else _matching(names, self.parameters))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen or name.startswith(tuple(f"{module}." for module in top)))

    def _with_lora(self, model: Any, head: str | int, top: Sequence[str]) -> Any:
        import peft

        targets = self.lora_target_modules
        targets = targets if isinstance(targets, str) else list(targets)
        fields: dict[str, Any] = {}
        if self.layers is not None:
            place, numbers = pick_layers(model, self.layers)
            if targets == "all-linear":  # PEFT takes a word for the targets, or layers, not both
                modules = model.get_submodule(place).named_modules()
                targets = sorted({name.rpartition(".")[2] for name, m in modules if isinstance(m, _LINEAR)})
            fields = {"layers_to_transform": numbers, "layers_pattern": place.rpartition(".")[2]}
        config = peft.LoraConfig(
            task_type=task_type(head), r=self.lora_r, lora_alpha=self.lora_alpha, lora_dropout=0.0,
            target_modules=targets, modules_to_save=list(top) or None, **fields,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):  # PEFT draws on the host: the same adapter for every device
            torch.manual_seed(self.seed)
            try:
                return peft.get_peft_model(model, config)
            except (TypeError, ValueError) as error:
                names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, _LINEAR)})
                raise ModelError(
                    f"LoRA on {targets} failed ({error}); linear modules here: {', '.join(names)}"
                ) from error


def task_type(head: str | int) -> str:
    """PEFT's name for the task of a model with ``head``. A masked language model has none, and needs nothing of one."""
    return {"lm": "CAUSAL_LM", "masked-lm": "FEATURE_EXTRACTION", "none": "FEATURE_EXTRACTION"}.get(head, "SEQ_CLS")


def pick_layers(model: torch.nn.Module, layers: str | Sequence[int]) -> tuple[str, list[int]]:
    """(name of the list of the model's layers, numbers of those meant by ``layers``).

    Raises:
        ModelError: ``layers`` is neither (first, last) nor "first-last", is out of range, or the model has no list of
            its layers.
    """
    place, count = _layer_list(model)
    first, last = (end + count if end < 0 else end for end in _ends(layers))
    if not 0 <= first <= last < count:
        raise ModelError(f"layers={layers!r} is out of range; this model has {count} layers, 0 to {count - 1}")
    return place, list(range(first, last + 1))


def _ends(layers: str | Sequence[int]) -> list[int]:
    """The first and last layer as given, negative ones too."""
    if isinstance(layers, str):
        match = re.fullmatch(r"\s*(-?\d+)\s*-\s*(-?\d+)\s*", layers)
        ends = [int(part) for part in match.groups()] if match else []
    else:
        ends = list(layers)
    if len(ends) != 2 or not all(isinstance(end, int) and not isinstance(end, bool) for end in ends):
        raise ModelError(f"layers={layers!r} is not of the form (first, last) or 'first-last', such as '20-29'")
    return ends


def _layer_list(model: torch.nn.Module) -> tuple[str, int]:
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [name for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    # A layer may have lists of its own of that length.
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outermost) != 1:
        found = ", ".join(outermost) or "none"
        raise ModelError(
            f"layers: {type(model).__name__} has not one list of its {count} layers (found: {found}); name the "
            "parameters by tuning=subset and a pattern"
        )
    return outermost[0], count


def _pattern(parameters: str) -> re.Pattern[str]:
    try:
        return re.compile(parameters)
    except re.error as error:
        raise ModelError(f"parameters={parameters!r} is not a regular expression: {error}") from error


def _matching(names: Sequence[str], parameters: str) -> list[str]:
    chosen = [name for name in names if _pattern(parameters).search(name)]
    if not parameters or not chosen:
        kinds = sorted({re.sub(r"\.\d+\.", ".N.", name) for name in names})
        raise ModelError(f"parameters={parameters!r} names no parameter; there are {', '.join(kinds)}")
    return chosen
