"""An order of examples in which batches hold texts of like length, and which can be rebuilt for any epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

_POOL = 16  # batches that are sorted among themselves; more means less padding and less mixing


class LengthGroupedSampler(Sampler[int]):
    """Shuffles, sorts by length within pools of batches, and shuffles the batches; a short batch comes last.

    Args:
        lengths: of every example.
        batch_size: of the batches that the indices will be cut into.
        seed: with the epoch (``set_epoch``), all that the order depends on; transformers' own draws from the global
            generator, and a resumed run would see another order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The order of which epoch the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed + self.epoch) % 2**63)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool, size = _POOL * self.batch_size, self.batch_size
        for start in range(0, len(order), pool):
            order[start : start + pool] = sorted(order[start : start + pool], key=self.lengths.__getitem__)
        whole = len(order) // size
        for batch in torch.randperm(whole, generator=generator).tolist():
            yield from order[batch * size : (batch + 1) * size]
        yield from order[whole * size :]
