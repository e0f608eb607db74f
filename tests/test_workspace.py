"""Buffers of logits: rows on cache lines, and none shared by threads that use them at once."""

from __future__ import annotations

import threading

import pytest
import torch
from numeric_worlds import head_problem

from tdpo import objectives, ops
from tdpo.ops.heads import CACHE_LINE, BlockwiseHeads, padded_vocab


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("vocab", [2, 16, 17, 50_257])
def test_rows_begin_on_cache_lines(vocab: int, dtype: torch.dtype) -> None:
    problem = head_problem(tokens=3, vocab=vocab, dtype=dtype)
    heads = BlockwiseHeads(problem.policy, problem.reference, None)
    for logits in (heads.logits(slice(0, 3)), heads.ref_logits(slice(0, 3))):
        assert logits.shape == (3, padded_vocab(vocab, dtype)) and logits.is_contiguous()
        assert all(logits[row].data_ptr() % CACHE_LINE == 0 for row in range(3))
    assert vocab <= padded_vocab(vocab, dtype) < vocab + CACHE_LINE


def test_threads_do_not_share_them() -> None:
    """Eight threads score problems of their own repeatedly; each gets what it gets alone."""
    problems = [head_problem(seed=seed, tokens=12, vocab=50 + seed) for seed in range(8)]

    def loss(number: int) -> float:
        problem = problems[number]
        arguments = problem.policy, problem.reference, problem.labels, [3, 4, 2, 3], objectives.tdpo2()
        return ops.pair_loss(*arguments)[0].item()

    alone, together = [loss(number) for number in range(8)], [[0.0]] * 8

    def repeat(number: int) -> None:
        together[number] = [loss(number) for _ in range(20)]

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [[value] * 20 for value in alone]
