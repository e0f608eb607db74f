"""Assigns pairs to processes: each pair once an epoch, and the micro-batches of a step carry equal work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainingArguments
from transformers.trainer_utils import seed_worker

DUMMY = "dummy"
"""Key of a batch that is only run because other processes have one; it counts for nothing."""


class DummyIndex(int):
    """Index of an item that is run only so that a process has a batch; it counts for nothing there."""


class BalancedBatchSampler(Sampler[list[int]]):
    """Samples the micro-batches of one process, such that those of a step have about the same number of tokens.

    The pairs of a step are those of the plain order; only which micro-batch, and so which process, takes them differs.
    Since the loss is a mean over the whole step, the result does not: accumulation and processes wait less, and the
    largest micro-batch, which sets the memory, is smaller. Every process gets the same number of batches and no pair
    twice: where a last step has too few pairs, a process gets a single :class:`DummyIndex`.

    Args:
        lengths: Tokens of each pair.
        micro_batch: Pairs of a micro-batch, at most.
        accumulation: Micro-batches of an optimizer step in each process.
        seed: Shuffles each epoch in its own order, reproducibly; None keeps the dataset's order.
        processes: How many processes share the pairs.
        process: Which of them this is.
        drop_last: Leave out the pairs at the end that do not fill a micro-batch in every process.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        micro_batch: int,
        accumulation: int,
        seed: int | None,
        processes: int = 1,
        process: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.lengths, self.accumulation, self.seed = lengths, accumulation, seed
        self.processes, self.process = processes, process
        self.batch_size, self.drop_last = micro_batch, drop_last  # names that loaders read of a batch sampler
        self._round = micro_batch * processes  # pairs of one micro-batch of all processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which decides the order; called by the training loop, also when it resumes."""
        self.epoch = epoch

    def __len__(self) -> int:
        pairs = len(self.lengths)
        return pairs // self._round if self.drop_last else -(-pairs // self._round)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(len(self.lengths)))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(len(order), generator=generator).tolist()
        order = order[: len(self) * self._round]
        step = self._round * self.accumulation
        for start in range(0, len(order), step):
            pairs = order[start : start + step]
            blocks = balance(pairs, self.lengths, -(-len(pairs) // self._round) * self.processes)
            for block in blocks[self.process :: self.processes]:
                yield block or [DummyIndex(pairs[0])]


def balance(items: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Splits items into ``count`` blocks of equal size (one less in the last ones) and about equal total length.

    The longest item left goes to the lightest block that has room.

    Example:
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


class _Batches(Dataset[Any]):
    """A dataset that returns collated batches; those of a :class:`DummyIndex` carry the key :data:`DUMMY`."""

    def __init__(self, items: Any, collate: Callable[[Sequence[Any]], dict[str, Any]]) -> None:
        self.items, self.collate = items, collate

    def __len__(self) -> int:
        return len(self.items)

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        batch = self.collate([self.items[index] for index in indices])
        return {**batch, DUMMY: True} if isinstance(indices[0], DummyIndex) else batch


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
        _Batches(dataset, collate),
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
