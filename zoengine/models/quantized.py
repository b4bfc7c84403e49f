"""A frozen base in 8 or 4 bits, with adapters in the model's own dtype.

``int8``
    torchao's weight-only quantisation: one scale for each row, activations stay as they are. A scheme that rounds
    activations too, such as LLM.int8, would round away part of the small loss differences that a zeroth-order step
    lives on.
``nf4``
    bitsandbytes' 4-bit normal float, one scale for 64 weights, as in QLoRA (Dettmers et al. 2023,
    https://arxiv.org/abs/2305.14314).

Both leave embeddings, norms and the head as they are. torchao's 4-bit integers are not offered: PEFT has no LoRA on
them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from zoengine.models.errors import ModelError

_LIBRARIES = {"int8": "torchao", "nf4": "bitsandbytes"}


def options(name: str, dtype: torch.dtype, device: torch.device, tuning: str) -> dict[str, Any]:
    """What ``from_pretrained`` takes for a base quantised as ``name``.

    Raises:
        ModelError: an unknown ``name``, a tuning that would change the base, or the library is not installed.
    """
    if name not in _LIBRARIES:
        raise ModelError(f"quantization is {name!r}; expected {', '.join(_LIBRARIES)} or none")
    if tuning in ("full", "subset"):
        raise ModelError(
            f"tuning={tuning} would perturb the weights themselves, which {name} stores as integer codes; take "
            "tuning=lora or prefix on the quantised base, or leave quantization out"
        )
    library = _LIBRARIES[name]
    if importlib.util.find_spec(library) is None:
        raise ModelError(f"quantization={name} needs {library}: pip install {library}")
    if name == "int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        config: Any = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    else:
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config, "device_map": {"": str(device)}}


def cast_adapters(model: torch.nn.Module, base: Sequence[torch.nn.Parameter], dtype: torch.dtype) -> None:
    """Bring all parameters but those of ``base`` to ``dtype``: PEFT makes adapters of a quantised base in fp32."""
    own = {id(parameter) for parameter in base}
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.data = parameter.data.to(dtype)
