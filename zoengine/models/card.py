"""The model card of a run: a README.md whose front matter the Hub reads and whose text says what was measured how."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from zoengine.models.hub import hub_id

_ADAPTERS = ("lora", "prefix")
_PIPELINES = {"lm": "text-generation", "masked-lm": "fill-mask", "none": "feature-extraction"}
_CLASSES = {"lm": "AutoModelForCausalLM", "masked-lm": "AutoModelForMaskedLM", "none": "AutoModel"}
_PLACE = {"kind", "step", "split", "forward_passes", "backward_passes", "seconds", "n"}  # of a row, not a score


def model_card(
    *,
    config: Mapping[str, Any],
    head: str | int,
    facts: Mapping[str, Any],
    scores: Sequence[Mapping[str, Any]],
    steps: int,
    forward_passes: int,
    backward_passes: int,
    seconds: float,
    command: str,
    name: str,
    location: str,
) -> str:
    """The text of a run's model card. No license is named: that is for whoever publishes the model to decide.

    Args:
        config: the run's configuration, with ``model.path``, ``tuning.kind``, ``method.name`` and ``run.seed``.
        head: of the model, as :func:`zoengine.models.load` takes it.
        facts: ``zoengine`` and ``noise_version``, ``packages``, ``device``, ``dtype``, ``backend``,
            ``trainable_parameters`` and ``splits`` (name -> ``n`` and ``hash``).
        scores: the ``eval`` rows of the run's metrics; each split's first and last are shown.
        steps, forward_passes, backward_passes, seconds: what was spent on training.
        command: the command line that started the run.
        name: the title.
        location: where the model lies for whoever loads it, a Hub id or a folder's name.
    """
    kind, base = config["tuning"]["kind"], config["model"]["path"]
    published = hub_id(base)
    shown = published or Path(base).name
    zeroth = backward_passes == 0
    data = ModelCardData(
        base_model=published,
        library_name="peft" if kind in _ADAPTERS else "transformers",
        pipeline_tag=_PIPELINES.get(head, "text-classification"),
        tags=["zoengine", *(["zeroth-order"] if zeroth else []), config["method"]["name"], kind],
        **({"base_model_relation": "adapter" if kind in _ADAPTERS else "finetune"} if published else {}),
    )
    passes = f"{forward_passes} forward passes" + ("" if zeroth else f" and {backward_passes} backward passes")
    how = "by forward passes alone" if zeroth else "with backpropagation"
    quantization = config["tuning"].get("quantization")
    spent = {
        "method": config["method"]["name"],
        "tuning": f"{kind}, {facts['trainable_parameters']:,} trained parameters",
        "base": shown + (f", frozen in {quantization}" if quantization else ""),
        "steps": f"{steps}, {passes}, {seconds:.0f} s",
        "seed": config["run"]["seed"],
        "precision": facts["dtype"],
        "device": f"{facts['device']}, kernels: {facts['backend']}",
        "versions": ", ".join(
            f"{package} {version}" for package, version in {"zoengine": facts["zoengine"], **facts["packages"]}.items()
        ),
        "noise stream": f"version {facts['noise_version']}",
    }
    return "\n".join([
        "---", data.to_yaml().strip(), "---", "",
        f"# {name}", "",
        f"{shown}, tuned {how} ({config['method']['name']}, {kind}, {passes}) with zoengine.", "",
        "## Results", "",
        *_results(scores, facts["splits"]), "",
        "A split's hash is that of its texts and labels: scores compare where the hashes agree.", "",
        "## Training", "",
        "| | |", "| --- | --- |", *(f"| {key} | {_cell(value)} |" for key, value in spent.items()), "",
        *(["The run was started with", "", *_fenced("bash", command), ""] if command else []),
        "and these settings:" if command else "Its settings:", "",
        *_fenced("yaml", yaml.safe_dump(_settings(config, shown), sort_keys=False, allow_unicode=True).strip()), "",
        "## Use", "",
        *_fenced("python", _loading(head, kind, shown, location)), "",
    ])  # fmt: skip


def _results(scores: Sequence[Mapping[str, Any]], splits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table with a line for each split and metric, before training and after it."""
    lines = ["| split | examples | hash | metric | before | after |", "| --- | --- | --- | --- | --- | --- |"]
    for split in dict.fromkeys(row["split"] for row in scores):
        rows = [row for row in scores if row["split"] == split]
        known = splits.get(split, {})
        for metric in (key for key, value in rows[-1].items() if key not in _PLACE and isinstance(value, float)):
            before, after = (f"{row[metric]:.4f}" if metric in row else "" for row in (rows[0], rows[-1]))
            n, digest = rows[-1].get("n", known.get("n", "")), known.get("hash", "")
            lines.append(f"| {split} | {n} | {digest} | {metric} | {before} | {after} |")
    return lines if len(lines) > 2 else ["Nothing was measured."]


def _settings(config: Mapping[str, Any], base: str) -> dict[str, Any]:
    """The configuration without what is about the machine: where the run lay, and folders before names of files."""
    settings = copy.deepcopy(dict(config))
    settings["model"]["path"] = base
    settings["run"].pop("output_dir", None)
    for key, value in settings.get("data", {}).items():
        if isinstance(value, str) and Path(value).is_absolute():
            settings["data"][key] = Path(value).name
    return settings


def _loading(head: str | int, kind: str, base: str, location: str) -> str:
    loader = _CLASSES.get(head, "AutoModelForSequenceClassification")
    imports = f"from transformers import {loader}, AutoTokenizer"
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{location}")'
    if kind not in _ADAPTERS:
        return f'{imports}\n\nmodel = {loader}.from_pretrained("{location}")\n{tokenizer}'
    classes = f", num_labels={head}" if isinstance(head, int) else ""
    lines = [
        "from peft import PeftModel",
        imports,
        "",
        tokenizer,
        f'base = {loader}.from_pretrained("{base}"{classes})',
    ]
    if classes:
        lines += [
            "if base.config.pad_token_id is None:  # by it, decoders find the end of a text",
            "    pad = tokenizer.pad_token_id",
            "    base.config.pad_token_id = tokenizer.eos_token_id if pad is None else pad",
        ]
    return "\n".join([*lines, f'model = PeftModel.from_pretrained(base, "{location}")'])


def _fenced(language: str, text: str) -> list[str]:
    fence = "`" * max(2, *map(len, re.findall("`+", text)), 2) + "`"
    return [f"{fence}{language}", text, fence]


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
