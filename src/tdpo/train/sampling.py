"""Assigns pairs to processes: each pair once an epoch, and the micro-batches of a step carry equal work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainingArguments
from transformers.trainer_utils import seed_worker

DUMMY = "dummy"
"""Key of a batch that is only run because other processes have one; it counts for nothing."""
DUMMY_BATCH = [None]
"""Stands for the indices of such a batch."""


@dataclass
class BalancedBatchSampler(Sampler[list[Any]]):
    """Samples the micro-batches of one process, such that those of a step have about the same number of tokens.

    The pairs of a step are those of the plain order; only which micro-batch, and so which process, takes them differs.
    Since the loss is a mean over the whole step, the result does not: accumulation and processes wait less, and the
    largest micro-batch, which sets the memory, is smaller. Every process gets the same number of batches and no pair
    twice: where a last step has too few pairs, a process gets :data:`DUMMY_BATCH`.

    Attributes:
        lengths: Tokens of each pair.
        batch_size: Pairs of a micro-batch, at most.
        accumulation: Micro-batches of an optimizer step in each process.
        seed: Shuffles each epoch in its own order, reproducibly; None keeps the dataset's order.
        processes: How many processes share the pairs.
        process: Which of them this is.
        drop_last: Leave out the pairs at the end that do not fill a micro-batch in every process.
        epoch: Decides the order.
    """

    lengths: Sequence[int]
    batch_size: int
    accumulation: int
    seed: int | None
    processes: int = 1
    process: int = 0
    drop_last: bool = False
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch; called by the training loop, also when it resumes."""
        self.epoch = epoch

    def __len__(self) -> int:
        pairs, together = len(self.lengths), self.batch_size * self.processes
        return pairs // together if self.drop_last else -(-pairs // together)

    def __iter__(self) -> Iterator[list[Any]]:
        order, together = list(range(len(self.lengths))), self.batch_size * self.processes
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(len(order), generator=generator).tolist()
        order = order[: len(self) * together]
        step = together * self.accumulation
        for start in range(0, len(order), step):
            pairs = order[start : start + step]
            blocks = balance(pairs, self.lengths, -(-len(pairs) // together) * self.processes)
            for block in blocks[self.process :: self.processes]:
                yield block or DUMMY_BATCH


def balance(items: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Splits items into ``count`` blocks of equal size (one less in the last ones) and about equal total length.

    The longest item left goes to the lightest block that has room.

    Examples:
        >>> balance([0, 1, 2, 3], lengths=[9, 8, 2, 1], count=2)
        [[0, 3], [1, 2]]
        >>> balance([2, 0], lengths=[1, 1, 5], count=3)
        [[2], [0], []]
    """
    if count == 1:
        return [list(items)]
    room = [len(items) // count + (block < len(items) % count) for block in range(count)]
    blocks: list[list[int]] = [[] for _ in room]
    totals = [0.0] * count
    for item in sorted(items, key=lambda i: -lengths[i]):
        # A block with fewer items is filled in proportion, so that its few are not all the longest.
        block = min((b for b in range(count) if len(blocks[b]) < room[b]), key=lambda b: totals[b] / room[b])
        blocks[block].append(item)
        totals[block] += lengths[item]
    return blocks


@dataclass
class CollatedBatches(Dataset[Any]):
    """A dataset that returns collated batches; a dummy runs the first item and carries the key :data:`DUMMY`."""

    items: Any
    collate: Callable[[Sequence[Any]], dict[str, Any]]

    def __len__(self) -> int:
        return len(self.items)

    def __getitems__(self, indices: list[Any]) -> dict[str, Any]:
        if indices == DUMMY_BATCH:
            return {**self.collate([self.items[0]]), DUMMY: True}
        return self.collate([self.items[index] for index in indices])


def make_loader(
    dataset: Any,
    batch_size: int,
    collate: Any,
    args: TrainingArguments,
    accumulation: int = 1,
    seed: int | None = None,
    drop_last: bool = False,
) -> DataLoader[Any]:
    """Makes the loader of this process; its batches are chosen already, so accelerate only moves them to the device."""
    batches = BalancedBatchSampler(
        dataset.lengths(), batch_size, accumulation, seed, args.world_size, args.process_index, drop_last
    )
    workers = args.dataloader_num_workers
    plain: DataLoader[Any] = DataLoader(
        CollatedBatches(dataset, collate),
        batch_sampler=batches,
        collate_fn=dict,  # the dataset collates
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        in_order=args.dataloader_in_order,
        worker_init_fn=partial(seed_worker, num_workers=workers, rank=args.process_index),
    )
    non_blocking = args.accelerator_config.non_blocking  # type: ignore[union-attr]
    return prepare_data_loader(plain, args.device, 1, 0, put_on_device=True, non_blocking=non_blocking)
