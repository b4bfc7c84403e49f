"""Prefix tuning: trained keys and values that every layer's attention sees before those of the text.

Li & Liang, Prefix-Tuning (2021), https://arxiv.org/abs/2101.00190, in PEFT's layout, without a reparametrisation. As in
MeZO (Malladi et al. 2023, https://arxiv.org/abs/2305.17333) a prefix starts from the keys and values that the model
itself computes for real tokens: far better than noise, from which forward passes alone hardly find back.

A causal model with the fresh prefix of tokens t gives a text x the logits that the plain model gives x in t + x, since
t sees nothing of x and x keeps its positions after t. In an encoder t would see x, so there this holds for one layer
only; from the second on, the prefix is what t looks like alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from zoengine.models.errors import ModelError

INITS = ("activations", "random")


def check(tokens: int, init: str) -> None:
    """Raises ModelError unless there is at least one token and ``init`` is one of INITS."""
    if tokens < 1:
        raise ModelError(f"prefix_tokens={tokens}; expected at least 1")
    if init not in INITS:
        raise ModelError(f"prefix_init is {init!r}; expected one of {', '.join(INITS)}")


def with_prefix(
    model: Any, tokenizer: Any, *, tokens: int, init: str, seed: int, head: str | int, top: Sequence[str]
) -> Any:
    """``model`` frozen, but for a fresh prefix and the modules of ``top``; other arguments as ``load`` has them.

    The prefix is one fp32 matrix (tokens, layers x 2 x key-value heads x head size), whatever the model's dtype.

    Raises:
        ModelError: the model's attention takes no keys and values from before.
    """
    import peft

    from zoengine.models.tuning import task_type

    ids = draw_tokens(tokenizer, model, tokens, seed)
    real = _keys_and_values(model, ids)
    config = peft.PrefixTuningConfig(
        task_type=task_type(head), num_virtual_tokens=tokens, modules_to_save=list(top) or None
    )
    with torch.random.fork_rng(devices=[]):  # PEFT draws the random start on the host
        torch.manual_seed(seed)
        try:
            model = peft.get_peft_model(model, config)
        except (TypeError, ValueError) as error:
            raise ModelError(f"prefix tuning of {type(model).__name__} failed: {error}") from error
    if init == "activations":
        _start_from(model, real)
    return model


def draw_tokens(tokenizer: Any, model: Any, tokens: int, seed: int) -> Tensor:
    """int64 (1, tokens): ordinary tokens of the vocabulary, uniformly from ``seed``; special ones are left out."""
    count = min(len(tokenizer), model.get_input_embeddings().num_embeddings)
    ordinary = torch.tensor(sorted(set(range(count)) - set(tokenizer.all_special_ids)))
    generator = torch.Generator().manual_seed(seed)
    return ordinary[torch.randint(len(ordinary), (1, tokens), generator=generator)]


def check_fit(model: Any) -> None:
    """Raises ValueError if the prefix of the PEFT model is not of the shape of its base model's keys and values."""
    base = model.get_base_model()
    expected = [keys.shape[1::2] for keys, _ in _keys_and_values(base, torch.zeros(1, 1, dtype=torch.int64))]
    found = [layer.keys.shape[1::2] for layer in model.get_prompt(batch_size=1).layers]
    if found != expected:
        raise ValueError(
            f"its prefix is for {len(found)} layers of (heads, head size) {tuple(found[0])}, the model has "
            f"{len(expected)} of {tuple(expected[0])}"
        )


@torch.no_grad()
def _keys_and_values(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer, each (1, heads, tokens, head size), in a forward of ``ids`` without dropout."""
    cache, training = DynamicCache(), model.training
    try:
        model.eval().base_model(input_ids=ids.to(model.device), past_key_values=cache)
    finally:
        model.train(training)
    layers = model.config.get_text_config().num_hidden_layers
    if len(cache.layers) != layers or any(layer.get_seq_length() != ids.shape[1] for layer in cache.layers):
        raise ModelError(
            f"{type(model).__name__} takes no keys and values from before the text in its {layers} layers, which a "
            "prefix needs; take tuning=lora, subset or full"
        )
    return [(layer.keys, layer.values) for layer in cache.layers]


@torch.no_grad()
def _start_from(model: Any, real: list[tuple[Tensor, Tensor]]) -> None:
    """Write ``real`` into the prefix, and see that PEFT hands it to the model unchanged."""
    weight = model.prompt_encoder[model.active_adapter].embedding.weight
    rows = torch.stack([part[0].transpose(0, 1) for layer in real for part in layer], dim=1)
    if rows.numel() == weight.numel():
        weight.copy_(rows.reshape(weight.shape))
        given = model.get_prompt(batch_size=1)
        pairs = zip(real, given.layers, strict=True) if isinstance(given, DynamicCache) else []
        if pairs and all(torch.equal(k, at.keys) and torch.equal(v, at.values) for (k, v), at in pairs):
            return
    raise ModelError(
        f"PEFT lays the prefix of {type(model.get_base_model()).__name__} out otherwise than its keys and values; take "
        "prefix_init=random"
    )
