"""Sequences that begin alike run their common beginning once, through the cache of keys and values; so does generation.

Positions are given explicitly and padding is masked, so models with absolute positions see what they would see in one
unpadded sequence.
"""

import copy
import inspect
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoengine.tasks.base import BATCH_TOKENS, Batch
from zoengine.tasks.decoder import Decoder, Targets, prefix, present, unwrapped
from zoengine.tasks.sequences import check_length

_log = logging.getLogger(__name__)

# What a batch of shared prompts holds for every sequence, and a chunk of its sequences needs.
_OF_SEQUENCES = ("start", "targets", "places", "example", "shared", "ending")


class SharedPrompts:
    """Log-probabilities of options whose sequences share a beginning, as :meth:`Decoder.log_probs` gives them.

    On a model's first call the result is compared with that of whole sequences; where they differ, or the model keeps
    no cache, whole sequences are used from then on.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._works: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()

    def log_probs(self, model: nn.Module, batch: Batch) -> Tensor:
        """fp32 (R, T) for a batch of R sequences: input_ids, start, targets, places as there, example (R,), whose
        numbers count up from 0, and, where it pays, what :func:`options.shared` gives.
        """
        whole = (batch["input_ids"], batch["start"], batch["targets"], batch["places"])
        if "shared" not in batch:
            return self._decoder.log_probs(model, *whole)
        check_length(model, batch["input_ids"].shape[1])
        causal_lm = unwrapped(model)
        if causal_lm not in self._works:
            with torch.no_grad():
                expected = self._decoder.log_probs(model, *whole)
            self._works[causal_lm] = self._decoder.is_short(model) and _agrees(model, batch, expected)
        return _shared(model, batch) if self._works[causal_lm] else self._decoder.log_probs(model, *whole)


def _agrees(model: nn.Module, batch: Batch, expected: Tensor) -> bool:
    causal_lm = unwrapped(model)
    name = type(causal_lm).__name__
    if getattr(causal_lm.config.get_text_config(), "sliding_window", None):
        return False  # it counts the padding between a short beginning and what follows
    try:
        with torch.no_grad():
            found = _shared(model, batch)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        _log.warning("%s has no cache to share a prompt by (%s): running whole sequences", name, error)
        return False
    tolerance = 1e-4 if next(causal_lm.parameters()).dtype in (torch.float32, torch.float64) else 2.0**-5
    difference = (found - expected).abs().max()
    if not difference <= tolerance * expected.abs().max().clamp(min=1.0):
        _log.warning("%s: shared prompts are off by %.3g; running whole sequences", name, float(difference))
        return False
    return True


def _shared(model: nn.Module, batch: Batch) -> Tensor:
    causal_lm = unwrapped(model)
    decoder, head = causal_lm.get_decoder(), causal_lm.get_output_embeddings()
    cache, before = _new_cache(model, len(batch["beginning"]))
    beginnings = decoder(
        input_ids=batch["beginning"], past_key_values=cache, use_cache=True
    ).last_hidden_state  # causal, so padding on the right needs no mask
    width, rest = batch["beginning"].shape[1], batch["ending"].shape[1]
    chunk = max(1, BATCH_TOKENS // (width + max(rest, 1)))
    found = []
    for low in range(0, len(batch["ending"]), chunk):
        part = {name: batch[name][low : low + chunk] for name in _OF_SEQUENCES}
        after = None
        if rest > 0:
            ending, shared = part["ending"], part["shared"][:, None]
            columns = shared + torch.arange(rest, device=shared.device)
            mask = (torch.arange(width, device=shared.device) < shared).long()
            mask = torch.cat([mask.new_ones(len(mask), before), mask, torch.ones_like(ending)], 1)
            after = decoder(
                input_ids=ending, attention_mask=mask, past_key_values=_selected(cache, part["example"]),
                use_cache=True, **_positions(causal_lm, before + columns),
            ).last_hidden_state  # fmt: skip
        found.append(_scores(part, beginnings, after, head))
    return torch.cat(found)


def _scores(part: Batch, beginnings: Tensor, after: Tensor | None, head: nn.Module) -> Tensor:
    """The log-probabilities of a part's targets from the hidden states of beginnings and of what comes after."""
    targets, shared = part["targets"], part["shared"]
    rows, offsets = present(targets, part["places"])
    columns = part["start"][rows] - 1 + offsets
    hidden = beginnings[part["example"][rows], columns.clamp(max=beginnings.shape[1] - 1)]
    if after is not None:
        later = columns - shared[rows]
        hidden = torch.where((later >= 0)[:, None], after[rows, later.clamp(min=0)], hidden)
    found = Targets(targets[rows, offsets]).short(hidden, head)
    return found.new_zeros(targets.shape).index_put((rows, offsets), found)


def greedy(
    model: nn.Module, prompts: Sequence[Sequence[int]], new_tokens: int, ends: Callable[[int], bool]
) -> list[list[int]]:
    """What the model continues each prompt with, always by its likeliest token; up to and with the first that ends it.

    prompts: token ids, one sequence each; padded on the left here. new_tokens: at most. ends: of a token.
    """
    causal_lm = unwrapped(model)
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in prompts], device=device)
    cache, before = _new_cache(model, len(prompts))
    lengths = torch.tensor([len(row) for row in prompts], device=device)
    mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
    places = before + (mask.cumsum(1) - 1).clamp(min=0)
    mask = torch.cat([mask.new_ones(len(mask), before), mask], 1)
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(causal_lm.forward).parameters else {}
    found: list[list[int]] = [[] for _ in prompts]
    open_rows = list(range(len(prompts)))
    for _ in range(new_tokens):
        logits = causal_lm(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True,
            **_positions(causal_lm, places), **last,
        ).logits[:, -1]  # fmt: skip
        ids = logits.argmax(1, keepdim=True)
        for row, token in zip(open_rows, ids[:, 0].tolist(), strict=True):
            found[row].append(token)
        going = [k for k, row in enumerate(open_rows) if not ends(found[row][-1])]
        if not going:
            break
        if len(going) < len(open_rows):
            open_rows = [open_rows[k] for k in going]
            kept = torch.tensor(going, device=device)
            cache.batch_select_indices(kept)
            ids, mask, places = ids[kept], mask[kept], places[kept]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        places = places[:, -1:] + 1
    return found


def _new_cache(model: nn.Module, rows: int) -> tuple[Any, int]:
    """An empty cache or that of a PEFT prefix, and how many positions it takes."""
    from transformers import DynamicCache

    cache = prefix(model, rows)
    cache = DynamicCache() if cache is None else cache
    return cache, cache.get_seq_length()


def _selected(cache: Any, rows: Tensor) -> Any:
    """A cache of the chosen rows of another, which stays as it is."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)
    return chosen


def _positions(causal_lm: nn.Module, places: Tensor) -> dict[str, Tensor]:
    """The argument that says where tokens stand, for models that take it; others count what the mask shows."""
    takes = "position_ids" in inspect.signature(causal_lm.get_decoder().forward).parameters
    return {"position_ids": places} if takes else {}
