"""What an optimizer holds beside the weights, counted tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from zoengine.trainer.full_data import FullLoss


def extra_bytes(optimizer: Any, model: nn.Module) -> int:
    """Bytes of the tensors that ``optimizer`` holds and ``model`` does not: states, masks, the copy of shadow mode.

    For a first-order method the gradients are added, which it frees after every step. Activations are not counted, nor
    is what a kernel needs for a moment.
    """
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in _tensors(optimizer))}
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    held = sum(size for pointer, size in found.items() if pointer not in owned)
    return held + (gradients if getattr(optimizer, "backwards_per_step", 0) else 0)


def _tensors(root: Any) -> Iterator[Tensor]:
    """Every tensor reachable from ``root`` through containers, modules and this package's own objects."""
    waiting, seen = [root], set()
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, nn.Module):
            waiting += [*item.parameters(), *item.buffers()]
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list | tuple | set | frozenset):
            waiting += item
        elif type(item).__module__.partition(".")[0] == "zoengine" and not isinstance(item, FullLoss):
            waiting += getattr(item, "__dict__", {}).values()
            waiting += [getattr(item, name) for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ())
                        if hasattr(item, name)]  # fmt: skip
