"""The models whose steps are timed, and the task they do. Weights are random but for SmolLM2-135M's, if installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import cases
from bench.progress import say

Closure = Callable[[], Tensor]

_LLAMA_3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip

# Shapes of transformers' configurations, with their type.
MODELS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    },
    "opt-1.3b": {
        "model_type": "opt", "vocab_size": 50272, "hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 32, "max_position_embeddings": 2048, "word_embed_proj_dim": 2048,
    },
    "llama-3.2-1b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "max_position_embeddings": 131072, "tie_word_embeddings": True,
        "rope_parameters": {**_LLAMA_3_ROPE, "factor": 32.0},
    },
    "llama-3.1-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 131072, "tie_word_embeddings": False,
        "rope_parameters": {**_LLAMA_3_ROPE, "factor": 8.0},
    },
}  # fmt: skip


def load_model(name: str, dtype: str, device: torch.device, real: bool = True) -> nn.Module:
    """The model in evaluation mode; real weights of SmolLM2-135M if they are installed and wanted, else random ones.

    Random weights are drawn on ``device`` in ``dtype``: eight billion of them take minutes on a CPU.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if real and name == "smollm2-135m":
        from zoengine.models import load, smollm2
        from zoengine.models.errors import ModelError

        try:
            return load(smollm2.NAME, dtype=cases.DTYPES[dtype], device=device)[0]
        except ModelError as error:
            say(f"random weights of the shape of {name}: {error}")
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[name]), dtype=cases.DTYPES[dtype])
    return model.to(device).eval()


class Task:
    """``batch`` random prompts of ``tokens`` tokens and their loss over two label words, as zoengine.tasks has it."""

    def __init__(self, model: nn.Module, batch: int, tokens: int) -> None:
        from zoengine.tasks.decoder import Decoder

        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(0, model.config.vocab_size, (batch, tokens), generator=generator).to(device)
        self._last = torch.full((batch,), tokens - 1, device=device)
        self._places = [frozenset({tokens - 1})] * batch
        self._targets = torch.arange(batch, device=device) % 2
        self._labels = torch.tensor([5, 7], device=device)
        self._decoder = Decoder()
        self.model = model

    def loss(self) -> Tensor:
        """The mean loss of all prompts, a scalar."""
        return self._loss(len(self._ids))

    def small_loss(self) -> Tensor:
        """The loss of the first prompt: the same code in little time, for warming up."""
        return self._loss(1)

    def _loss(self, count: int) -> Tensor:
        logits = self._decoder.label_logits(
            self.model, self._ids[:count], self._last[:count], self._labels, self._places[:count]
        )
        return F.cross_entropy(logits, self._targets[:count])
