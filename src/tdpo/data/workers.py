"""Tokenises chunks of records into Arrow record batches, in this process or in several, in the order of the chunks.

A new process imports the package and receives the tokenizer, which takes seconds before its first row; so processes
are optional (``--dataset_num_proc``) and pay from some hundred thousand pairs on.
"""

from __future__ import annotations

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
from tdpo.types import PreferenceRecord

AHEAD = 2
"""Chunks handed out per process before the first of them is waited for; bounds the memory."""

_tokeniser: Tokeniser | None = None
"""The tokeniser of this process, where it is a worker."""


def record_batches(
    chunks: Iterable[list[PreferenceRecord]], tokeniser: Tokeniser, report: DataReport, on_bad_row: OnBadRow
) -> Iterator[Any]:
    """Yields a record batch of token ids for each chunk, made in ``tokeniser.processes`` processes.

    Args:
        chunks: Records, read as they are handed out.
        tokeniser: Its tokenizer and limits go to every process.
        report: The reports of the chunks are added to it, in their order.
        on_bad_row: ``"error"`` or ``"drop"``.

    Raises:
        UserError: of the first chunk that has one; or if a process ended without a message.
    """
    if tokeniser.processes == 1:
        for chunk in chunks:
            yield record_batch(tokeniser.pairs(chunk, report, on_bad_row))
        return
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
            f"{report.source}: a process that tokenised it ended without a message, perhaps out of memory. A smaller "
            "--dataset_num_proc needs less. From Python, a script that asks for processes has to begin with "
            "if __name__ == '__main__'"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _collected(future: Future[tuple[Any, DataReport]], report: DataReport) -> Any:
    batch, part = future.result()
    report.add(part)
    return batch


def _begin(tokenizer: Any, lengths: Lengths, rendering: Rendering) -> None:
    global _tokeniser
    _tokeniser = Tokeniser(tokenizer, lengths, rendering=rendering)


def _tokenised(records: list[PreferenceRecord], source: str, on_bad_row: OnBadRow) -> tuple[Any, DataReport]:
    if _tokeniser is None:
        raise RuntimeError("this process has no tokeniser; it was not started by record_batches")
    report = DataReport(source)
    return record_batch(_tokeniser.pairs(records, report, on_bad_row)), report
