"""Buffers of logits: rows on cache lines, kept on a CPU, and never shared by two who use them at once."""

from __future__ import annotations

import threading

import pytest
import torch
from numeric_worlds import head_problem

from tdpo import objectives, ops
from tdpo.ops import workspace
from tdpo.ops.workspace import CACHE_LINE, logits_buffers, padded_vocab

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("vocab", [1, 16, 17, 50_257])
def test_rows_begin_on_cache_lines(vocab: int, dtype: torch.dtype) -> None:
    with logits_buffers(2, 3, vocab, dtype, CPU) as buffers:
        for buffer in buffers:
            assert buffer.shape == (3, padded_vocab(vocab, dtype)) and buffer.is_contiguous()
            assert all(buffer[row].data_ptr() % CACHE_LINE == 0 for row in range(3))
    assert vocab <= padded_vocab(vocab, dtype) < vocab + CACHE_LINE


def test_buffers_are_used_again_and_no_more_are_kept_than_a_step_takes() -> None:
    workspace.release()
    with logits_buffers(2, 8, 100, torch.float32, CPU) as first:
        places = {buffer.data_ptr() for buffer in first}
    with logits_buffers(2, 5, 90, torch.float32, CPU) as smaller:
        assert {buffer.data_ptr() for buffer in smaller} == places
    with logits_buffers(2, 80, 100, torch.float32, CPU) as larger:
        assert not {buffer.data_ptr() for buffer in larger} & places
    with logits_buffers(3, 8, 100, torch.float32, CPU):
        pass
    assert len(workspace._idle[torch.float32]) == workspace.KEPT
    workspace.release()
    assert not workspace._idle


def test_an_error_inside_gives_the_buffers_back() -> None:
    workspace.release()
    with pytest.raises(ZeroDivisionError), logits_buffers(2, 8, 100, torch.float32, CPU):
        1 / 0  # noqa: B018
    assert len(workspace._idle[torch.float32]) == 2


def test_threads_do_not_share_them() -> None:
    """Eight threads score problems of their own over and over; each gets what it gets alone."""
    problems = [head_problem(seed=seed, tokens=12, vocab=50 + seed) for seed in range(8)]

    def loss(number: int) -> float:
        problem = problems[number]
        return ops.pair_loss(
            problem.policy, problem.reference, problem.labels, [3, 4, 2, 3], objectives.tdpo2()
        ).total.item()

    alone, together = [loss(number) for number in range(8)], [[0.0]] * 8

    def repeat(number: int) -> None:
        together[number] = [loss(number) for _ in range(20)]

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [[value] * 20 for value in alone]
