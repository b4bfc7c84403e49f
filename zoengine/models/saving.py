"""Write what came of a run in the layouts that transformers and PEFT read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from zoengine.models.errors import ModelError


def save(model: Any, tokenizer: Any, folder: str | Path) -> Path:
    """Write the model for plain `from_pretrained`, or only its adapter in PEFT's format, and the tokenizer beside it.

    A model loads again with the Auto class of its head (AutoModelForCausalLM, AutoModelForMaskedLM,
    AutoModelForSequenceClassification), a LoRA or prefix adapter with PeftModel.from_pretrained(base_model, folder).
    Written beside it first and then renamed, so whatever bears the name is whole; a model that is already there is
    replaced. Returns the folder. Raises ModelError if the folder holds something else.
    """
    folder = Path(folder)
    saved = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    if folder.exists() and not saved and (folder.is_file() or any(folder.iterdir())):
        raise ModelError(f"{folder} exists and is not a saved model; choose another folder")
    incomplete = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(incomplete, ignore_errors=True)
    model.save_pretrained(incomplete)
    tokenizer.save_pretrained(incomplete)
    shutil.rmtree(folder, ignore_errors=True)
    incomplete.rename(folder)
    return folder


def write_card(folder: Path, text: str) -> None:
    """Put ``text`` beside a saved model as its README.md, in the place of what PEFT wrote there."""
    incomplete = folder / "README.md.incomplete"
    incomplete.write_text(text, encoding="utf-8")
    incomplete.rename(folder / "README.md")
