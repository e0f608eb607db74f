"""The order of training: nothing is lost or visited twice, steps keep their pairs, micro-batches carry equal work."""

from __future__ import annotations

import math
import random
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import preference_rows
from tiny_training import tiny_trainer, train_tiny, weights

from tdpo.train.sampling import BalancedBatchSampler, balance


def lengths_of(seed: int, count: int) -> list[int]:
    generator = random.Random(seed)
    return [round(generator.lognormvariate(4, 0.8)) + 4 for _ in range(count)]


def batches(count: int, micro: int = 4, accumulation: int = 4, processes: int = 1, **options: Any) -> list[list]:
    """The batches of every process for pairs of random lengths."""
    lengths, options = lengths_of(0, count), {"seed": None, **options}
    return [list(BalancedBatchSampler(lengths, micro, accumulation, **options, processes=processes, process=p))
            for p in range(processes)]  # fmt: skip


@pytest.mark.parametrize("count", [1, 7, 8, 63, 64, 100])
@pytest.mark.parametrize(("processes", "seed"), [(1, None), (1, 3), (2, 3), (3, None), (5, 3)])
def test_an_epoch_visits_every_pair_once(count: int, processes: int, seed: int | None) -> None:
    each = batches(count, accumulation=2, processes=processes, seed=seed)
    taken = [index for process in each for batch in process for index in batch if index is not None]
    assert sorted(taken) == list(range(count))
    assert {len(process) for process in each} == {math.ceil(count / (4 * processes))}, "all processes run as often"
    assert len(BalancedBatchSampler(lengths_of(0, count), 4, 2, None, processes)) == len(each[0])
    assert all(0 < len(batch) <= 4 for process in each for batch in process)


def test_only_processes_without_a_pair_get_a_filler() -> None:
    each = batches(10, micro=2, accumulation=1, processes=4)
    assert [len(process) for process in each] == [2, 2, 2, 2]
    fillers = [[i is None for i in process[1]] for process in each]
    assert fillers == [[False], [False], [True], [True]]


def test_what_does_not_fill_every_process_may_be_dropped() -> None:
    each = batches(29, micro=2, accumulation=2, processes=3, drop_last=True)
    assert sorted(i for process in each for batch in process for i in batch) == list(range(24))
    assert not batches(5, micro=2, processes=3, drop_last=True)[0]


def test_steps_keep_the_pairs_of_the_plain_order_however_they_are_shared() -> None:
    plain = batches(100, micro=16, accumulation=1, seed=5)[0]
    for micro, accumulation, processes in ((4, 4, 1), (4, 2, 2), (2, 2, 4), (8, 1, 2)):
        each = batches(100, micro, accumulation, processes, seed=5)
        for number, pairs in enumerate(plain):
            share = [process[number * accumulation : (number + 1) * accumulation] for process in each]
            ours = [int(i) for part in share for batch in part for i in batch if i is not None]
            assert sorted(ours) == sorted(pairs)


def test_epochs_differ_and_are_reproducible() -> None:
    first, again = (BalancedBatchSampler(lengths_of(2, 50), 4, 2, seed=7) for _ in range(2))
    zero = list(first)
    first.set_epoch(1)
    again.set_epoch(1)
    assert list(first) == list(again) != zero
    assert list(chain(*BalancedBatchSampler(lengths_of(2, 50), 4, 1, seed=None))) == list(range(50))


def test_micro_batches_carry_more_equal_work_than_chance_gives() -> None:
    """Largest micro-batch of a step over the mean: what one waits for, and what sets the memory."""

    def excess(order: list[int], lengths: list[int]) -> float:
        steps = []
        for start in range(0, len(order), 64):
            work = [sum(lengths[i] for i in order[s : s + 8]) for s in range(start, start + 64, 8)]
            steps.append(max(work) / (sum(work) / len(work)))
        return sum(steps) / len(steps)

    lengths = lengths_of(3, 1024)
    plain, balanced = (list(chain(*BalancedBatchSampler(lengths, 8, n, seed=1))) for n in (1, 8))
    assert excess(plain, lengths) > 1.3
    assert excess(balanced, lengths) < 1.1


def test_a_short_last_step_is_shared_evenly() -> None:
    lengths = [10] * 9 + [1] * 9
    blocks = balance(range(18), lengths, count=4)
    assert sorted(chain(*blocks)) == list(range(18))
    assert [len(block) for block in blocks] == [5, 5, 4, 4]
    assert all(2 <= sum(lengths[i] == 10 for i in block) <= 3 for block in blocks)


def test_accumulated_training_is_that_of_the_large_batch_with_shuffling(tmp_path: Path, tokenizer: Any) -> None:
    fields = {"max_steps": -1, "num_train_epochs": 2, "learning_rate": 0.1, "optim": "sgd", "rows": preference_rows(20)}
    whole, parts = (
        train_tiny(tmp_path, tokenizer, per_device_train_batch_size=micro, gradient_accumulation_steps=steps, **fields)
        for micro, steps in ((8, 1), (2, 4))
    )
    torch.testing.assert_close(weights(parts.model), weights(whole.model), rtol=1e-4, atol=1e-6)


def test_resuming_in_the_middle_of_an_epoch_sees_the_rest_of_it(tmp_path: Path, tokenizer: Any) -> None:
    fields = {"max_steps": 8, "save_steps": 5, "save_strategy": "steps", "rows": preference_rows(12)}
    fields |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole, resumed = (tiny_trainer(tmp_path, tokenizer, **fields) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert torch.equal(weights(resumed.model), weights(whole.model))
