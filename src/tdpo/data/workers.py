"""Chunks of records to record batches, here or in several processes, which give them back in their order.

A process starts anew, imports the package and gets the tokenizer, which takes seconds before its first row; so it is
asked for (``--dataset_num_proc``) and pays from some hundred thousand pairs on.
"""

from __future__ import annotations

import gc
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tdpo.data.formats import DataReport, OnBadRow
from tdpo.data.table import record_batch
from tdpo.data.tokenise import Lengths, Rendering, Tokeniser
from tdpo.errors import UserError
from tdpo.files import check_shared_memory
from tdpo.types import PreferenceRecord

AHEAD = 2
"""Chunks handed out per process before the first of them is waited for; bounds the memory."""

_tokeniser: Tokeniser | None = None
"""The tokeniser of this process, where it is a worker."""


def batches_made_here(
    chunks: Iterable[list[PreferenceRecord]], tokeniser: Tokeniser, report: DataReport, on_bad_row: OnBadRow
) -> Iterator[Any]:
    """A record batch per chunk, made in this process; see :func:`batches_of_workers`."""
    for chunk in chunks:
        yield _batch(chunk, tokeniser, report, on_bad_row)


def batches_of_workers(
    chunks: Iterable[list[PreferenceRecord]], tokeniser: Tokeniser, report: DataReport, on_bad_row: OnBadRow
) -> Iterator[Any]:
    """A record batch per chunk, as one process would make it, in ``tokeniser.processes`` processes.

    Args:
        chunks: Records, read as they are handed out.
        tokeniser: Its tokenizer and limits go to every process.
        report: Gets what every chunk's report says, in the order of the chunks.
        on_bad_row: ``"error"`` or ``"drop"``.

    Raises:
        UserError: of the first chunk that has one; or if a process ended without a word.
    """
    check_shared_memory("--dataset_num_proc", tokeniser.processes)
    context = multiprocessing.get_context("spawn")  # threads may have started here, which a fork would not survive
    pool = ProcessPoolExecutor(
        tokeniser.processes,
        context,
        initializer=_begin,
        initargs=(tokeniser.tokenizer, tokeniser.lengths, tokeniser.rendering),
    )
    waiting: deque[Future[tuple[Any, DataReport]]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_tokenised, chunk, report.source, on_bad_row))
            if len(waiting) >= AHEAD * tokeniser.processes:
                yield _collected(waiting.popleft(), report)
        while waiting:
            yield _collected(waiting.popleft(), report)
    except BrokenProcessPool as error:
        raise UserError(
            f"{report.source}: a process that tokenised it ended without a word, for want of memory? A smaller "
            "--dataset_num_proc needs less. From Python, a script that asks for processes has to begin with "
            "if __name__ == '__main__'"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _collected(future: Future[tuple[Any, DataReport]], report: DataReport) -> Any:
    batch, told = future.result()
    report.add(told)
    return batch


def _begin(tokenizer: Any, lengths: Lengths, rendering: Rendering) -> None:
    """Makes this process's tokeniser."""
    global _tokeniser
    _tokeniser = Tokeniser(tokenizer, lengths, rendering=rendering)


def _tokenised(records: list[PreferenceRecord], source: str, on_bad_row: OnBadRow) -> tuple[Any, DataReport]:
    """A chunk's record batch, and what there is to report of it."""
    if _tokeniser is None:
        raise RuntimeError("this process has no tokeniser; it was not started by batches_of_workers")
    report = DataReport(source)
    return _batch(records, _tokeniser, report, on_bad_row), report


def _batch(records: list[PreferenceRecord], tokeniser: Tokeniser, report: DataReport, on_bad_row: OnBadRow) -> Any:
    """Holds the garbage collector back: a chunk makes many lists and no cycles; looking for some doubles its time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        return record_batch(tokeniser.pairs(records, report, on_bad_row))
    finally:
        if was_on:
            gc.enable()
