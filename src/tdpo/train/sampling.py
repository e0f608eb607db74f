"""The order of training pairs: every epoch visits each pair once, and the micro-batches of a step carry equal work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class BalancedSampler(Sampler[int]):
    """Deals the pairs of each optimizer step to its micro-batches so that they hold about as many tokens.

    The pairs of a step are those of the plain order; only which micro-batch (and so which process) takes them changes.
    Since the loss is a mean over the whole step, the result does not: accumulation and processes wait less, and the
    largest micro-batch, which sets the memory, is smaller.

    Args:
        lengths: Tokens of each pair.
        micro_batch: Pairs of a micro-batch.
        micro_batches: Micro-batches of an optimizer step, over all processes.
        seed: Shuffles each epoch anew, reproducibly; None keeps the dataset's order.
    """

    def __init__(self, lengths: Sequence[int], micro_batch: int, micro_batches: int, seed: int | None) -> None:
        self.lengths, self.micro_batch, self.micro_batches, self.seed = lengths, micro_batch, micro_batches, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch's order; called by the training loop, also when it resumes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = list(range(len(self.lengths)))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(len(order), generator=generator).tolist()
        step = self.micro_batch * self.micro_batches
        for start in range(0, len(order), step):
            yield from deal(order[start : start + step], self.lengths, self.micro_batch)


def deal(items: Sequence[int], lengths: Sequence[int], size: int) -> list[int]:
    """Reorders items so that consecutive blocks of ``size`` have about equal total length; the last may be short.

    The longest item left goes to the lightest block that has room.

    Example:
        >>> deal([0, 1, 2, 3], lengths=[9, 8, 2, 1], size=2)
        [0, 3, 1, 2]
        >>> deal([2, 0], lengths=[1, 1, 5], size=2)
        [2, 0]
    """
    if len(items) <= size:
        return list(items)
    room = [min(size, len(items) - start) for start in range(0, len(items), size)]
    blocks: list[list[int]] = [[] for _ in room]
    totals = [0.0] * len(room)
    for item in sorted(items, key=lambda i: -lengths[i]):
        # A short last block is filled in proportion, so that its few items are not all the longest.
        block = min((b for b in range(len(room)) if len(blocks[b]) < room[b]), key=lambda b: totals[b] / room[b])
        blocks[block].append(item)
        totals[block] += lengths[item]
    return [item for block in blocks for item in block]
