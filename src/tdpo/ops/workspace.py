"""Memory for blocks of logits: rows that begin on a cache line, kept from one step to the next on a CPU.

Two costs that no profile names are avoided here. A matrix product into rows that do not begin on a cache line, as with
GPT-NeoX's 50,277 words, takes up to 1.6 times as long. And memory fresh from the system is handed out page by page
while it is first written, which for the logits of one step costs a fifth of the product that writes them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

CACHE_LINE = 64
"""Bytes; every row of a block begins on one."""

ABSENT = -1e30
"""Fills the logits between the vocabulary's end and the row's: no probability, and finite, so that 0 times it is 0."""

KEPT = 2
"""Idle buffers kept for each dtype: as many as one step takes."""

_idle: dict[torch.dtype, list[Tensor]] = defaultdict(list)


def padded_vocab(vocab_size: int, dtype: torch.dtype) -> int:
    """Logits from the beginning of one row to that of the next.

    Example:
        >>> padded_vocab(50_277, torch.float32), padded_vocab(50_277, torch.float64)
        (50288, 50280)
    """
    step = CACHE_LINE // dtype.itemsize
    return -(-vocab_size // step) * step


@contextmanager
def logits_buffers(
    count: int, rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> Iterator[list[Tensor]]:
    """Some buffers ``[rows, V']`` for logits, V' being :func:`padded_vocab`, with whatever is in them.

    On a CPU they are taken from the idle ones and given back at the end, so nothing may hold on to them; a GPU's
    allocator does the same by itself.
    """
    width = padded_vocab(vocab_size, dtype)
    pooled = device.type == "cpu"
    flat = [
        _taken(rows * width, dtype) if pooled else torch.empty(rows * width, dtype=dtype, device=device)
        for _ in range(count)
    ]
    try:
        yield [buffer[: rows * width].view(rows, width) for buffer in flat]
    finally:
        if pooled:
            _idle[dtype].extend(flat)
            del _idle[dtype][:-KEPT]


def release() -> None:
    """Gives the idle buffers back to the system."""
    _idle.clear()


def _taken(elements: int, dtype: torch.dtype) -> Tensor:
    """An idle buffer if it is large enough, a new one otherwise; one that is too small is let go first."""
    with suppress(IndexError):  # none is left; another thread may have taken the last one
        while (buffer := _idle[dtype].pop()).numel() < elements:
            pass
        return buffer
    return torch.empty(elements, dtype=dtype)
