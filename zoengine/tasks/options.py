"""Batches of prompts with all their options, one sequence an option, and the options' mean log-probabilities."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoengine.tasks.base import Batch, Encoded, pad
from zoengine.tasks.cached import SharedPrompts
from zoengine.tasks.instance import Instance
from zoengine.tasks.sequences import Scored, Sequences, common

# Sharing is the faster way where it leaves at most this part of the tokens. Whole sequences took so much longer, with
# SmolLM2-135M in fp32 on a CPU: 1.07 times at 0.68 of the tokens, 1.4 times at 0.57, 1.5 times at 0.52.
_PAYS = 0.7


def encoded_options(sequences: Sequences, instance: Instance) -> Encoded:
    """{"input_ids": the tokens all options have before them, "endings": what follows, "starts": where the scored
    tokens begin, an option each; "options"}."""
    found = sequences.encode(instance.prompt, instance.options)
    shared = common([ids[:start] for ids, start in found])
    return {
        "input_ids": found[0].ids[:shared],
        "endings": [ids[shared:] for ids, _ in found],
        "starts": [start for _, start in found],
        "options": instance.options,
    }


def sequence(item: Encoded, option: int) -> Scored:
    """The sequence of one option."""
    return Scored(item["input_ids"] + item["endings"][option], item["starts"][option])


def size(item: Encoded) -> tuple[int, int]:
    """(sequences, tokens of the longest) of an example with all its options; one where each option is one token."""
    longest = max(map(len, item["endings"]))
    return 1 if longest == 1 else len(item["endings"]), len(item["input_ids"]) + longest - 1


def scored(rows: Sequence[Scored]) -> Batch:
    """int64 tensors for R sequences, padded on the right: input_ids (R, L), each without its last token, which nothing
    follows; start (R,), and targets (R, T), the tokens from there on, padded with -100. On the host, places: see
    :mod:`zoengine.tasks.decoder`."""
    return {
        "input_ids": pad([ids[:-1] for ids, _ in rows], 0),
        "start": torch.tensor([start for _, start in rows]),
        "targets": pad([ids[start:] for ids, start in rows], -100),
        "places": [frozenset(range(start - 1, len(ids) - 1)) for ids, start in rows],
    }


def every_option(encoded: Sequence[Encoded]) -> Batch:
    """As :func:`scored` for R sequences, one an option, with their example (R,) and option (R,); on the host counts,
    how many options each example has; and, where running an example's prompt once pays, :func:`shared`."""
    counts = [len(item["endings"]) for item in encoded]
    example = torch.arange(len(encoded)).repeat_interleave(torch.tensor(counts))
    batch = {
        **scored([sequence(item, k) for item in encoded for k in range(len(item["endings"]))]),
        "example": example,
        "option": torch.cat([torch.arange(count) for count in counts]),
        "counts": counts,
    }
    parts = shared(encoded)
    if parts["beginning"].numel() + parts["ending"].numel() <= _PAYS * batch["input_ids"].numel():
        batch |= parts
    return batch


def shared(encoded: Sequence[Encoded]) -> Batch:
    """int64 tensors, padded on the right: beginning (B, W), what an example's options have in common; for every option
    shared (R,), how many tokens that is, and ending (R, E), what follows, without the last token."""
    return {
        "beginning": pad([item["input_ids"] for item in encoded], 0),
        "shared": torch.tensor([len(item["input_ids"]) for item in encoded for _ in item["endings"]]),
        "ending": pad([ending[:-1] for item in encoded for ending in item["endings"]], 0),
    }


def table(model: nn.Module, options: SharedPrompts, batch: Batch) -> Tensor:
    """fp32 (B, O): the mean log-probability of each option's targets, -inf where an example has fewer than O."""
    found = options.log_probs(model, batch)
    means = found.sum(1) / (batch["targets"] != -100).sum(1)
    shape = len(batch["counts"]), max(batch["counts"])
    return means.new_full(shape, -torch.inf).index_put((batch["example"], batch["option"]), means)
