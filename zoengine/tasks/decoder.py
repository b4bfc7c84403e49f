"""What a causal language model says at a few positions of a right-padded batch, without computing the rest.

The decoder runs to its last hidden states; only the positions asked for go through the output embedding, and of that,
where the answer is one of a few labels, only the labels' rows. The product is taken in fp32: a bf16 logit near 16 is a
multiple of 1/8, coarser than the loss differences zeroth-order methods live on.

There is no attention mask: under causal attention no token sees the padding to its right, and without a mask torch's
attention takes its fast causal path.
"""

import inspect
import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoengine.tasks.instance import TaskError
from zoengine.tasks.sequences import check_length

_log = logging.getLogger(__name__)

# The positions of each row at which the model is read, as the host knows them: to ask the device for as much as their
# number would make the host wait for all that the device has still to do.
Places = Sequence[frozenset[int]]

# Fields of known configs that change the logits after the output embedding, with the values that mean "not at all".
_AFTER_THE_HEAD = {"final_logit_softcapping": (None,), "logit_scale": (None, 1), "logits_scaling": (None, 1)}
# fp32 logits of the whole vocabulary held at once, so that neither they nor an fp32 copy of a 16-bit head fill a GPU.
_LOGITS = 1 << 26


class Decoder:
    """Reads a model's output at chosen positions.

    No weight is kept between calls: each call reads the model's parameters as they are then. On a model's first call
    the short way is compared with the model's own logits; where they differ, the model's own are used from then on.
    A PEFT model with prefix tuning runs with the keys and values of its prefix in front of every sequence.

    Raises:
        TaskError: the sequences of a call are longer than the model reads.
    """

    def __init__(self) -> None:
        self._short_way: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()

    def label_logits(
        self, model: nn.Module, input_ids: Tensor, last: Tensor, label_ids: Tensor, places: Places
    ) -> Tensor:
        """fp32 (B, n): the logits of the tokens label_ids (n,) after position last (B,) of each of input_ids (B, L).

        places: the set of its last position, for every row.
        """
        rows = torch.arange(len(last), device=last.device)
        return self._read(model, input_ids, rows, last, _Labels(label_ids), places)

    def log_probs(self, model: nn.Module, input_ids: Tensor, start: Tensor, targets: Tensor, places: Places) -> Tensor:
        """fp32 (R, T): log p of targets (R, T) at positions start, start + 1, ... of each of input_ids (R, L).

        start (R,) is the position of a row's first target, so what the model says one position before it is read.
        Targets of -100 are not read, and 0 in the result. places: for every row, the positions that are read, one for
        each target.
        """
        rows, offsets = present(targets, places)
        found = self._read(model, input_ids, rows, start[rows] - 1 + offsets, Targets(targets[rows, offsets]), places)
        return found.new_zeros(targets.shape).index_put((rows, offsets), found)

    def log_probs_and_best(
        self, model: nn.Module, input_ids: Tensor, start: Tensor, targets: Tensor, places: Places
    ) -> tuple[Tensor, Tensor]:
        """What :meth:`log_probs` gives, and bool (R, T): whether no token is likelier than the target."""
        rows, offsets = present(targets, places)
        read = _TargetsAndBest(targets[rows, offsets])
        found = self._read(model, input_ids, rows, start[rows] - 1 + offsets, read, places)
        table = found.new_zeros(*targets.shape, 2).index_put((rows, offsets), found)
        return table[..., 0], table[..., 1].bool()

    def is_short(self, model: nn.Module) -> bool:
        """Whether the short way is taken for this model; known after its first call."""
        return self._short_way.get(unwrapped(model), False)

    def _read(
        self, model: nn.Module, input_ids: Tensor, rows: Tensor, columns: Tensor, read: Any, places: Places
    ) -> Tensor:
        check_length(model, input_ids.shape[1])
        key = unwrapped(model)
        if key not in self._short_way:
            first = rows == 0
            self._short_way[key] = _agrees(
                model, input_ids[:1], rows[first], columns[first], read.of(first), places[:1]
            )
        if self._short_way[key]:
            return _short(model, input_ids, rows, columns, read)
        return _own(model, input_ids, rows, columns, read, places)


def present(targets: Tensor, places: Places) -> tuple[Tensor, Tensor]:
    """(rows, offsets), int64, of the targets (R, T) that are not -100; there are as many as `places`."""
    return torch.nonzero_static(targets != -100, size=count(places)).unbind(1)


def count(places: Places) -> int:
    """How many positions are read in all rows."""
    return sum(map(len, places))


@dataclass
class _Labels:
    """Reads the logits of a few tokens."""

    ids: Tensor

    def of(self, rows: Tensor) -> "_Labels":
        return self

    def short(self, hidden: Tensor, head: nn.Module) -> Tensor:
        if not _is_plain(head):
            return head(hidden)[:, self.ids].float()
        bias = None if head.bias is None else head.bias[self.ids].float()
        return F.linear(hidden.float(), head.weight[self.ids].float(), bias)

    def own(self, logits: Tensor) -> Tensor:
        return logits[:, self.ids].float()


@dataclass
class Targets:
    """Reads the log-probability of one token a position."""

    ids: Tensor

    def of(self, rows: Tensor) -> "Targets":
        return Targets(self.ids[rows])

    def short(self, hidden: Tensor, head: nn.Module) -> Tensor:
        if not _is_plain(head):
            return self.own(head(hidden))
        chosen, total, _ = self._reduced(hidden.float(), head)
        return chosen - total

    def _reduced(self, hidden: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
        """At each position: the target's logit, the log of all logits' sum of exponentials, the largest logit."""
        chosen, sums, largest = hidden.new_zeros(len(hidden)), [], []
        size = max(1024, _LOGITS // max(1, len(hidden)))
        for low in range(0, len(head.weight), size):
            bias = None if head.bias is None else head.bias[low : low + size].float()
            logits = F.linear(hidden, head.weight[low : low + size].float(), bias)
            here = (self.ids >= low) & (self.ids < low + size)
            at = (self.ids - low).clamp(0, logits.shape[1] - 1)
            chosen = torch.where(here, logits.gather(1, at[:, None])[:, 0], chosen)
            sums.append(logits.logsumexp(1))
            largest.append(logits.detach().amax(1))
        return chosen, torch.stack(sums).logsumexp(0), torch.stack(largest).amax(0)

    def own(self, logits: Tensor) -> Tensor:
        return logits.float().log_softmax(1).gather(1, self.ids[:, None])[:, 0]


class _TargetsAndBest(Targets):
    """Reads (log-probability, 1 where no token is likelier, else 0): two numbers a position."""

    def short(self, hidden: Tensor, head: nn.Module) -> Tensor:
        if not _is_plain(head):
            return self.own(head(hidden))
        chosen, total, largest = self._reduced(hidden.float(), head)
        return torch.stack([chosen - total, (chosen >= largest).float()], 1)

    def own(self, logits: Tensor) -> Tensor:
        best = logits.gather(1, self.ids[:, None])[:, 0] >= logits.amax(1)
        return torch.stack([super().own(logits), best.float()], 1)


def _is_plain(head: nn.Module) -> bool:
    """Whether only its weight matters: no adapter or quantisation, no hook (weights perturbed as modules run)."""
    return type(head) is nn.Linear and not head._forward_pre_hooks and not head._forward_hooks


def _short(model: nn.Module, input_ids: Tensor, rows: Tensor, columns: Tensor, read: Any) -> Tensor:
    causal_lm = unwrapped(model)
    past = prefix(model, len(input_ids))
    with_prefix = {} if past is None else {"past_key_values": past}
    hidden = causal_lm.get_decoder()(input_ids=input_ids, use_cache=False, **with_prefix).last_hidden_state
    return read.short(hidden[rows, columns], causal_lm.get_output_embeddings())


def _own(model: nn.Module, input_ids: Tensor, rows: Tensor, columns: Tensor, read: Any, places: Places) -> Tensor:
    last = torch.zeros(len(input_ids), dtype=columns.dtype, device=columns.device)
    last = last.scatter_reduce(0, rows, columns, "amax")
    mask = (torch.arange(input_ids.shape[1], device=last.device) <= last[:, None]).long()
    keep: dict[str, Any] = {}
    model = model if prefix_tuned(model) else unwrapped(model)
    if "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters:
        distinct = torch.zeros_like(input_ids[0]).index_fill(0, columns, 1)
        kept = torch.nonzero_static(distinct, size=len(frozenset().union(*places)))[:, 0]
        keep["logits_to_keep"], columns = kept, torch.searchsorted(kept, columns)
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False, **keep).logits
    return read.own(logits[rows, columns])


@torch.no_grad()
def _agrees(model: nn.Module, row: Tensor, rows: Tensor, columns: Tensor, read: Any, places: Places) -> bool:
    """Whether the short way, with padding to the right of `row` (1, L), gives what the model's own logits give."""
    name, causal_lm = type(unwrapped(model)).__name__, unwrapped(model)
    config = causal_lm.config.get_text_config() if hasattr(causal_lm, "config") else None
    fields = [name for name, neutral in _AFTER_THE_HEAD.items() if getattr(config, name, None) not in neutral]
    if fields:
        _log.warning("%s scales its logits (%s): using its full logits", name, ", ".join(fields))
        return False
    row = row[:, : int(columns.max()) + 1]
    own = _own(model, row, rows, columns, read, places)
    try:
        short = _short(model, F.pad(row, (0, 3)), rows, columns, read)
    except (AttributeError, NotImplementedError, TypeError) as error:
        _log.warning("%s has no separate decoder (%s): using its full logits", name, error)
        return False
    # The model rounds its logits to its dtype; one part in 2^7 is one unit of bf16.
    tolerance = 1e-4 if next(causal_lm.parameters()).dtype in (torch.float32, torch.float64) else 2.0**-6
    difference = (own - short).abs().max()
    if not difference <= tolerance * own.abs().max().clamp(min=1.0):
        _log.warning("%s: logits by the short way are off by %.3g; using its full logits", name, float(difference))
        return False
    return True


def unwrapped(model: nn.Module) -> nn.Module:
    """The causal language model inside a PEFT model: adapters that live in its layers stay in force."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def prefix_tuned(model: nn.Module) -> bool:
    """Whether it is a PEFT model that puts keys and values before each sequence.

    Raises:
        TaskError: it puts something else there.
    """
    if not getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return False
    kind = model.active_peft_config.peft_type
    if kind != "PREFIX_TUNING":
        raise TaskError(
            f"a {kind} adapter works by extra prompt tokens, which this task does not pass on; use prefix tuning, or "
            "an adapter inside the layers, such as LoRA"
        )
    return True


def prefix(model: nn.Module, rows: int) -> Any:
    """The keys and values that prefix tuning puts before each of `rows` sequences; None without it."""
    return model.get_prompt(batch_size=rows) if prefix_tuned(model) else None
