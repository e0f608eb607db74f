"""The order of training: nothing is lost or visited twice, steps keep their pairs, micro-batches carry equal work."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, preference_rows

from tdpo import TDPOConfig, TDPOTrainer
from tdpo.train.sampling import BalancedSampler, deal


def lengths_of(seed: int, count: int) -> list[int]:
    generator = random.Random(seed)
    return [round(generator.lognormvariate(4, 0.8)) + 4 for _ in range(count)]


@pytest.mark.parametrize("count", [1, 7, 8, 63, 64, 100])
@pytest.mark.parametrize("seed", [None, 3])
def test_an_epoch_visits_every_pair_once(count: int, seed: int | None) -> None:
    sampler = BalancedSampler(lengths_of(0, count), micro_batch=4, micro_batches=4, seed=seed)
    assert sorted(sampler) == list(range(count)) and len(sampler) == count


def test_steps_keep_the_pairs_of_the_plain_order() -> None:
    lengths = lengths_of(1, 100)
    balanced, plain = BalancedSampler(lengths, 4, 4, seed=5), BalancedSampler(lengths, 1, 1, seed=5)
    ours, theirs = list(balanced), list(plain)
    for start in range(0, 100, 16):
        assert sorted(ours[start : start + 16]) == sorted(theirs[start : start + 16])
    assert ours != theirs


def test_epochs_differ_and_are_reproducible() -> None:
    first, again = (BalancedSampler(lengths_of(2, 50), 4, 2, seed=7) for _ in range(2))
    zero = list(first)
    first.set_epoch(1)
    again.set_epoch(1)
    assert list(first) == list(again) != zero
    assert list(BalancedSampler(lengths_of(2, 50), 4, 1, seed=None)) == list(range(50))


def test_micro_batches_carry_more_equal_work_than_chance_gives() -> None:
    """Largest micro-batch of a step over the mean: what one waits for, and what sets the memory."""

    def excess(order: list[int], lengths: list[int]) -> float:
        steps = []
        for start in range(0, len(order), 64):
            work = [sum(lengths[i] for i in order[s : s + 8]) for s in range(start, start + 64, 8)]
            steps.append(max(work) / (sum(work) / len(work)))
        return sum(steps) / len(steps)

    lengths = lengths_of(3, 1024)
    plain, balanced = (list(BalancedSampler(lengths, 8, n, seed=1)) for n in (1, 8))
    assert excess(plain, lengths) > 1.3
    assert excess(balanced, lengths) < 1.1


def test_a_short_last_block_gets_its_share() -> None:
    lengths = [10] * 9 + [1] * 9
    order = deal(range(18), lengths, size=8)
    assert sorted(order) == list(range(18))
    assert 1 <= sum(lengths[i] == 10 for i in order[16:]) <= 2


def test_accumulated_training_is_that_of_the_large_batch_with_shuffling(tmp_path: Path, tokenizer: Any) -> None:
    ends = []
    for micro, steps in ((8, 1), (2, 4)):
        model = make_model(len(tokenizer))
        args = TDPOConfig(
            output_dir=str(tmp_path), num_train_epochs=2, learning_rate=0.1, optim="sgd", save_strategy="no",
            per_device_train_batch_size=micro, gradient_accumulation_steps=steps, use_cpu=True, disable_tqdm=True,
            max_length=96, max_prompt_length=48,
        )  # fmt: skip
        TDPOTrainer(model, None, args, None, preference_rows(20), None, tokenizer).train()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-6)


def test_resuming_in_the_middle_of_an_epoch_sees_the_rest_of_it(tmp_path: Path, tokenizer: Any) -> None:
    def run(resume: str | None) -> torch.Tensor:
        args = TDPOConfig(
            output_dir=str(tmp_path), max_steps=8, learning_rate=1e-2, save_steps=5, use_cpu=True, disable_tqdm=True,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, max_length=96, max_prompt_length=48,
        )  # fmt: skip
        model = make_model(len(tokenizer))
        trainer = TDPOTrainer(model, None, args, None, preference_rows(12), None, tokenizer)
        trainer.train(resume_from_checkpoint=resume)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole = run(None)
    assert torch.equal(run(str(tmp_path / "checkpoint-5")), whole)
