"""Logits of a few label tokens after each prompt of a right-padded batch, without computing the others.

The decoder runs to its last hidden states; one position of each row goes through the output embedding, and of that only
the label tokens' rows. The product is taken in fp32: a bf16 logit near 16 is a multiple of 1/8, coarser than the loss
differences zeroth-order methods live on.
"""

import inspect
import logging
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_log = logging.getLogger(__name__)

# Fields of known configs that change the logits after the output embedding, with the values that mean "not at all".
_AFTER_THE_HEAD = {"final_logit_softcapping": (None,), "logit_scale": (None, 1), "logits_scaling": (None, 1)}


class LabelLogits:
    """Callable (model, input_ids (B, L) int64, last (B,) int64) -> fp32 (B, len(label_ids)).

    No weight is kept between calls: each call reads the model's parameters as they are then. On a model's first call
    the short way is compared with the model's own logits; where they differ, the model's own are used from then on.
    """

    def __init__(self, label_ids: Sequence[int]) -> None:
        self.label_ids = list(label_ids)
        self._short_way: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()

    def __call__(self, model: nn.Module, input_ids: Tensor, last: Tensor) -> Tensor:
        causal_lm = _unwrapped(model)
        if causal_lm not in self._short_way:
            self._short_way[causal_lm] = self._agrees(causal_lm, input_ids[:1, : int(last[0]) + 1])
        if self._short_way[causal_lm]:
            return self._short(causal_lm, input_ids, last)
        return self._own(causal_lm, input_ids, last)

    def _short(self, model: nn.Module, input_ids: Tensor, last: Tensor) -> Tensor:
        hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
        hidden = hidden[torch.arange(len(last), device=last.device), last]
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear or head._forward_pre_hooks or head._forward_hooks:
            # An adapter in the head, or a hook (weights perturbed as modules run): the module itself must be called.
            return head(hidden)[:, self.label_ids].float()
        bias = None if head.bias is None else head.bias[self.label_ids].float()
        return F.linear(hidden.float(), head.weight[self.label_ids].float(), bias)

    def _own(self, model: nn.Module, input_ids: Tensor, last: Tensor) -> Tensor:
        mask = (torch.arange(input_ids.shape[1], device=last.device) <= last[:, None]).long()
        keep: dict[str, Any] = {}
        column = last
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            keep["logits_to_keep"], column = torch.unique(last, return_inverse=True)
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False, **keep).logits
        return logits[torch.arange(len(last), device=last.device), column][:, self.label_ids].float()

    @torch.no_grad()
    def _agrees(self, model: nn.Module, prompt: Tensor) -> bool:
        """Whether the short way, on `prompt` (1, L) with padding to its right, gives the model's own logits for it."""
        config = model.config.get_text_config() if hasattr(model, "config") else None
        fields = [name for name, neutral in _AFTER_THE_HEAD.items() if getattr(config, name, None) not in neutral]
        if fields:
            _log.warning("%s scales its logits (%s): using its full logits", type(model).__name__, ", ".join(fields))
            return False
        last = torch.tensor([prompt.shape[1] - 1], device=prompt.device)
        own = self._own(model, prompt, last)
        try:
            short = self._short(model, F.pad(prompt, (0, 3)), last)
        except (AttributeError, NotImplementedError, TypeError) as error:
            _log.warning("%s has no separate decoder (%s): using its full logits", type(model).__name__, error)
            return False
        # The model rounds its logits to its dtype; one part in 2^7 is one unit of bf16.
        tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 2.0**-6
        difference = (own - short).abs().max()
        if not difference <= tolerance * own.abs().max().clamp(min=1.0):
            _log.warning(
                "%s: label logits by the short way are off by %.3g; using its full logits",
                type(model).__name__, float(difference),
            )  # fmt: skip
            return False
        return True


def _unwrapped(model: nn.Module) -> nn.Module:
    """The causal language model inside a PEFT model: adapters that live in its layers stay in force."""
    if hasattr(model, "get_base_model"):
        if getattr(model.active_peft_config, "is_prompt_learning", False):
            raise ValueError(
                f"a {model.active_peft_config.peft_type} adapter works by extra prompt tokens, which this task does "
                "not pass on; use an adapter inside the layers, such as LoRA"
            )
        return model.get_base_model()
    return model
