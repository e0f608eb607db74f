"""Tokenises chunks of records in several processes, in the order of the chunks.

A new process imports the package and receives the tokenizer, which takes seconds before its first row; so processes
are optional (``--dataset_num_proc``) and pay from some hundred thousand pairs on.
"""

from __future__ import annotations

import itertools
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

_tokeniser: Tokeniser
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
    context = multiprocessing.get_context("spawn")  # threads may have started here, which a fork would not survive
    given = (tokeniser.tokenizer, tokeniser.lengths, tokeniser.rendering)
    pool = ProcessPoolExecutor(tokeniser.processes, context, initializer=_begin, initargs=given)
    waiting: deque[Future[tuple[Any, DataReport]]] = deque()
    try:
        for chunk in itertools.chain(chunks, [None] * AHEAD * tokeniser.processes):
            if chunk is not None:
                waiting.append(pool.submit(_tokenised, chunk, report.source, on_bad_row))
            if waiting and (chunk is None or len(waiting) >= AHEAD * tokeniser.processes):
                batch, part = waiting.popleft().result()
                report.add(part)
                yield batch
    except BrokenProcessPool as error:
        raise UserError(
            f"{report.source}: a process that tokenised it ended without a message, perhaps out of memory. A smaller "
            "--dataset_num_proc needs less. From Python, a script that asks for processes has to begin with "
            "if __name__ == '__main__'"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(tokenizer: Any, lengths: Lengths, rendering: Rendering) -> None:
    global _tokeniser
    _tokeniser = Tokeniser(tokenizer, lengths, rendering=rendering)


def _tokenised(records: list[PreferenceRecord], source: str, on_bad_row: OnBadRow) -> tuple[Any, DataReport]:
    report = DataReport(source)
    return record_batch(_tokeniser.pairs(records, report, on_bad_row)), report
