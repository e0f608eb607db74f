"""Turns data in any form the user passes into a dataset of tokenised pairs with a report on its rows."""

from __future__ import annotations

import hashlib
import multiprocessing
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tdpo.config.row_spec import RowSpec
from tdpo.data.cache import cache_key, cached_pairs, in_memory
from tdpo.data.formats import (
    BAD_ROW_ADVICE,
    BadRows,
    DataReport,
    OnBadRow,
    RowError,
    iter_records,
    name_of,
    usable_rows,
)
from tdpo.data.sources import Source, SourceRow, from_memory, groups_of
from tdpo.data.table import SIDES, record_batch
from tdpo.data.tokenise import Tokeniser
from tdpo.errors import UserError
from tdpo.types import WEIGHTS, PackedBatch, PreferenceRecord, TokenisedPair

CHUNK = 2048
"""Records tokenised at a time: what bounds the memory that text and lists of ids take on their way."""


class NoPairLeft(UserError):
    """A dataset without a pair to train on.

    Attributes:
        report: The report on its rows.
    """

    def __init__(self, report: DataReport) -> None:
        super().__init__(f"{report.source}: no pair is left. " + "; ".join(report.lines()))
        self.report = report


class PairDataset(Sequence[TokenisedPair]):
    """Tokenised pairs with the report on their rows: an Arrow table of which a pair is made when it is asked for.

    Args:
        pairs: A table of :data:`tdpo.data.table.SCHEMA`, or a file of one, which is mapped into memory; a copy sent to
            another process maps it again instead of carrying the ids.
        report: The report.

    Examples:
        >>> pairs = [TokenisedPair([5, 6], [7], [8, 9], row=3)]
        >>> dataset = PairDataset(pa.Table.from_batches([record_batch(pairs)]), DataReport("pairs.jsonl"))
        >>> dataset[0]
        TokenisedPair(prompt_ids=[5, 6], chosen_ids=[7], rejected_ids=[8, 9], row=3)
        >>> dataset.side_lengths().tolist(), dataset.lengths()
        ([[2, 1, 2]], [5])
    """

    def __init__(self, pairs: pa.Table | Path, report: DataReport) -> None:
        self.report, self._pairs = report, pairs
        mapped = isinstance(pairs, Path)
        table: Any = pa.ipc.open_file(pa.memory_map(str(pairs))).read_all() if mapped else pairs
        self.table, self.weights = table, [name for name in WEIGHTS if table[name].null_count < len(table)]

    def __reduce__(self) -> tuple[Any, ...]:
        return PairDataset, (self._pairs, self.report)

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, index: int) -> TokenisedPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenisedPair]: ...
    def __getitem__(self, index: int | slice) -> TokenisedPair | list[TokenisedPair]:
        found = range(len(self))[index]  # raises IndexError
        if isinstance(found, range):
            return [self[row] for row in found]
        ids = {name: self.table[name][found].values.to_numpy().tolist() for name in SIDES}  # faster than as_py
        others = {name: self.table[name][found].as_py() for name in ("row", *self.weights)}
        return TokenisedPair(**ids, **others)

    def fingerprint(self) -> str:
        """Returns a hash of ids and weights of all pairs in their order, 16 hexadecimal digits."""
        digest = hashlib.blake2b(digest_size=8)
        for column in (self.table[name] for name in (*SIDES, *self.weights)):
            # All lengths before all values, so that chunks of a table make no difference.
            for part in (pc.list_value_length(column).fill_null(0), pc.list_flatten(column)):
                for chunk in part.chunks:
                    digest.update(chunk.to_numpy(zero_copy_only=False).tobytes())
        return digest.hexdigest()

    def side_lengths(self) -> np.ndarray:
        """Returns ``[P, 3]`` int64: tokens of prompt, chosen and rejected response of each pair."""
        return np.stack([pc.list_value_length(self.table[name]).to_numpy() for name in SIDES], 1).astype(np.int64)

    def lengths(self) -> list[int]:
        """Returns the tokens of each pair, its prompt counted once."""
        return self.side_lengths().sum(1).tolist()


@dataclass(frozen=True)
class Collator:
    """Makes a batch as the loader delivers it: the fields of a :class:`~tdpo.types.PackedBatch`.

    Attributes:
        pack: Lays the pairs out.
    """

    pack: Callable[[Sequence[TokenisedPair]], PackedBatch]

    def __call__(self, pairs: Sequence[TokenisedPair]) -> dict[str, Any]:
        """Packs pairs into a batch."""
        return self.pack(pairs).as_dict()


def prepare_pairs(
    data: Iterable[Any],
    tokeniser: Tokeniser | None,
    format_name: str | RowSpec = "auto",
    on_bad_row: OnBadRow = "error",
    name: str = "dataset",
    cache: Path | None = None,
) -> PairDataset:
    """Tokenises data in any form a trainer accepts.

    Args:
        data: A ``PairDataset``, or an iterable of :class:`~tdpo.types.TokenisedPair`,
            :class:`~tdpo.types.PreferenceRecord`, :class:`~tdpo.data.sources.SourceRow` (a
            :class:`~tdpo.data.sources.Source` reads them when they are needed) or dictionaries of columns (a
            ``datasets.Dataset`` is one), whose columns may also be ``prompt_ids``, ``chosen_ids``, ``rejected_ids``.
        tokeniser: Tokenizer and truncation; None will do for data that is tokenised.
        format_name: A key of :data:`tdpo.data.formats.FORMATS`, ``"auto"``, or a complete ``RowSpec``.
        on_bad_row: ``"error"`` or ``"drop"``.
        name: What messages call rows that come from memory.
        cache: Folder where pairs are looked for before they are tokenised, and kept; None keeps them in memory alone.

    Raises:
        UserError: for bad rows, unknown formats and when nothing is left.
    """
    if isinstance(data, PairDataset):
        return data
    spec = RowSpec(format_name) if isinstance(format_name, str) else format_name
    rows = data if isinstance(data, Source) else list(data)
    if isinstance(rows, list):
        if not rows:
            raise UserError(f"{name}: no rows in it")
        if isinstance(rows[0], TokenisedPair):
            report = DataReport(name, "tokenised", len(rows), len(rows))
            return PairDataset(pa.Table.from_batches([record_batch(rows)]), report)
        if not isinstance(rows[0], PreferenceRecord | SourceRow):
            rows = from_memory(rows, name)
    starting = getattr(multiprocessing.current_process(), "_inheriting", False)  # a worker that imports the main script
    if starting and tokeniser is not None and tokeniser.processes > 1:
        raise UserError(  # it would wait for the cache that the main process is making
            "a script that asks for several processes (dataset_num_proc) must begin with if __name__ == '__main__'"
        )
    build = partial(_build, rows, tokeniser, spec, on_bad_row)
    key = None if cache is None or tokeniser is None else cache_key(rows, tokeniser, spec, on_bad_row)
    dataset = PairDataset(*(in_memory(build) if cache is None or key is None else cached_pairs(cache, key, build)))
    if not len(dataset):
        raise NoPairLeft(dataset.report)
    return dataset


def _build(
    rows: Source | list[Any], tokeniser: Tokeniser | None, spec: RowSpec, on_bad_row: OnBadRow
) -> tuple[DataReport, Iterable[Any]]:
    """Returns the report, and the record batches whose iteration fills it; text is read as it is tokenised."""
    first, report = next(iter(rows), None), DataReport(name_of(rows))
    if isinstance(first, SourceRow) and first.fields.keys() >= set(SIDES):
        report = DataReport(first.source, "tokenised")
        return report, [record_batch(list(_tokenised_pairs(rows, spec, report, on_bad_row)))]
    if tokeniser is None:
        raise UserError(f"{report.source}: text has to be tokenised and there is no tokenizer; pass processing_class")
    if isinstance(first, PreferenceRecord):
        report.format, report.read = "records", len(list(rows))
        records: Iterable[Any] = rows
    else:
        records = iter_records(rows, spec, on_bad_row, report)
    if tokeniser.rendering.special_tokens is None:
        records = tokeniser.special.refuse_rendered(records)
    return report, _batches(iter(records), tokeniser, report, on_bad_row)


def _batches(
    records: Iterator[PreferenceRecord], tokeniser: Tokeniser, report: DataReport, on_bad_row: OnBadRow
) -> Iterator[Any]:
    chunks = iter(lambda: list(islice(records, CHUNK)), [])
    if tokeniser.processes == 1:
        batches: Iterator[Any] = (record_batch(tokeniser.pairs(chunk, report, on_bad_row)) for chunk in chunks)
    else:
        from tdpo.data.workers import record_batches

        batches = record_batches(chunks, tokeniser, report, on_bad_row)
    kept = 0
    for batch in batches:
        kept += len(batch)
        yield batch
    report.kept = kept


def _tokenised_pairs(
    rows: Iterable[SourceRow], spec: RowSpec, report: DataReport, on_bad_row: OnBadRow
) -> Iterator[TokenisedPair]:
    """Yields the pairs of rows that are token ids already: those of the spec's side, as often as its weight says."""
    bad = BadRows(report, on_bad_row)
    for own, group in groups_of(rows):
        used = own or spec
        for index, row in enumerate(usable_rows(group, used, bad)):
            try:
                pair = _tokenised(row)
            except RowError as error:
                bad.add(row, error)
                continue
            prompt = str(pair.prompt_ids)
            if used.side is not None and not used.side.holds(prompt):
                report.elsewhere += 1
                continue
            copies = 1 if used.weight == 1 else used.copies(index, prompt)
            report.kept += copies
            yield from repeat(pair, copies)
    bad.raise_error(BAD_ROW_ADVICE)


def _tokenised(row: SourceRow) -> TokenisedPair:
    if missing := [name for name in SIDES if name not in row.fields]:
        raise RowError(f"no column {missing[0]!r}, and the first row has token ids; do not mix them")
    try:
        prompt, chosen, rejected = (array("i", row.fields[column]).tolist() for column in SIDES)
        weights = {name: list(row.fields[name]) for name in WEIGHTS if row.fields.get(name) is not None}
        return TokenisedPair(prompt, chosen, rejected, row.row, **weights)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise RowError(
            f"{', '.join(SIDES)} must be lists of token ids, weights lists of as many numbers: {error}"
        ) from error


def check_fits(
    pairs: Iterable[TokenisedPair],
    vocab_size: int | None,
    positions: int | None = None,
    source: str = "pairs",
    tokens: int | None = None,
) -> None:
    """Refuses what would fail deep inside the model: ids outside its vocabulary, sequences beyond its positions.

    The ids that occur decide: a tokenizer may have more tokens than the model, as long as no pair holds them.

    Args:
        pairs: The pairs.
        vocab_size: Entries of the model's vocabulary; None is not checked.
        positions: Positions of the model; None is not checked.
        source: What messages call the data.
        tokens: Tokens of the tokenizer, for the message.

    Raises:
        UserError: naming the source, the pair's row (its number where the row is unknown) and what is too large.
    """
    if isinstance(pairs, PairDataset) and len(pairs):
        lengths = pairs.side_lengths()
        longest = (lengths[:, 0] + lengths[:, 1:].max(1)).max()
        extremes = [pc.min_max(pc.list_flatten(pairs.table[name])).as_py() for name in SIDES]
        known = vocab_size is None or all(side["min"] >= 0 and side["max"] < vocab_size for side in extremes)
        if known and (positions is None or longest <= positions):
            return  # else the loop names the row
    for number, pair in enumerate(pairs, 1):
        ids = (*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids)
        length = len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
        check_limits(f"{source}, row {pair.row or number}", ids, length, vocab_size, positions, tokens)


def check_limits(
    where: str, ids: Sequence[int], length: int, vocab_size: int | None, positions: int | None, tokens: int | None
) -> None:
    """Refuses one example with more tokens than positions or an id outside the vocabulary; see :func:`check_fits`."""
    if positions is not None and length > positions:
        raise UserError(
            f"{where}: {length} tokens, but the model has {positions} positions; set --max_length to at most "
            f"{positions}"
        )
    stray = max(ids) if vocab_size is not None and max(ids) >= vocab_size else min(ids)
    if vocab_size is not None and not 0 <= stray < vocab_size:
        sizes = f"the tokenizer has {tokens} tokens, the model's vocabulary {vocab_size} entries" if tokens else ""
        raise UserError(
            f"{where}: token id {stray} is outside the model's vocabulary of {vocab_size}; tokenizer and model do not "
            "belong together" + (f" ({sizes}; --tokenizer_name_or_path names another tokenizer)" if sizes else "")
        )
