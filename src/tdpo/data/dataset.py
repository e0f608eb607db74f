"""Turns data in any form the user passes into a dataset of tokenised pairs with a report on its rows."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch.utils.data import Dataset

from tdpo.config.row_spec import RowSpec
from tdpo.data.cache import PairCache, cache_key, in_memory, rows_fingerprint
from tdpo.data.formats import DataReport, OnBadRow, iter_records, name_of
from tdpo.data.sources import Source, SourceRow, from_memory
from tdpo.data.table import PairTable, record_batch
from tdpo.data.tokenise import Tokeniser, outside_vocabulary
from tdpo.data.workers import record_batches
from tdpo.errors import UserError
from tdpo.types import PackedBatch, PreferenceRecord, TokenisedPair

Example = TypeVar("Example")
TOKENISED_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
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


class ExampleDataset(Dataset[Example]):
    """Examples in their order with the report on their rows."""

    def __init__(self, examples: Sequence[Example], report: DataReport) -> None:
        self.examples, self.report = examples, report

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)


class PairDataset(ExampleDataset[TokenisedPair]):
    """Tokenised pairs with the report on their rows."""

    def __init__(self, pairs: Sequence[TokenisedPair], report: DataReport) -> None:
        if not len(pairs):
            raise NoPairLeft(report)
        super().__init__(pairs, report)

    @property
    def pairs(self) -> Sequence[TokenisedPair]:
        """The pairs in their order: a :class:`~tdpo.data.table.PairTable`, unless they were given as pairs."""
        return self.examples

    def lengths(self) -> list[int]:
        """Returns the tokens of each pair, its prompt counted once."""
        if isinstance(self.pairs, PairTable):
            return self.pairs.lengths().sum(1).tolist()
        return [len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in self.pairs]


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
    cache: PairCache | None = None,
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
        cache: Where pairs are looked for before they are tokenised, and kept; None keeps them in memory alone.

    Raises:
        UserError: for bad rows, unknown formats and when nothing is left.
    """
    if isinstance(data, PairDataset):
        return data
    spec = RowSpec(format_name) if isinstance(format_name, str) else format_name
    rows = data if isinstance(data, Source) and tokeniser is not None else _rows(data, name)
    if isinstance(rows, list) and isinstance(rows[0], TokenisedPair):
        return PairDataset(rows, DataReport(name, "tokenised", len(rows), len(rows)))
    if isinstance(rows, list) and _is_tokenised(rows[0]):
        return PairDataset([_tokenised(row) for row in rows], _tokenised_report(rows))
    if tokeniser is None:
        raise UserError(f"{name_of(rows)}: text has to be tokenised and there is no tokenizer; pass processing_class")
    build = partial(_build, rows, tokeniser, spec, on_bad_row)
    key = None if cache is None else _cache_key(rows, tokeniser, spec, on_bad_row)
    return PairDataset(*(in_memory(build) if cache is None or key is None else cache.fetch(key, build)))


def _rows(data: Iterable[Any], name: str) -> list[Any]:
    """Returns the rows of the data; dictionaries get their numbers."""
    rows = list(data)
    if not rows:
        raise UserError(f"{name}: no rows in it")
    return rows if isinstance(rows[0], TokenisedPair | PreferenceRecord | SourceRow) else from_memory(rows, name)


def _cache_key(rows: Source | list[Any], tokeniser: Tokeniser, spec: RowSpec, on_bad_row: OnBadRow) -> str | None:
    """Returns the key of the tokenised rows; None if something they depend on has no fingerprint."""
    backend = tokeniser.encode.spec
    if backend is None or ":" in spec.format:
        return None
    fingerprint = (rows.fingerprint() if isinstance(rows, Source) else None) or rows_fingerprint(rows)
    if fingerprint is None:
        return None
    return cache_key(
        tokeniser.tokenizer,
        backend,
        fingerprint,
        reading=repr(spec),
        on_bad_row=on_bad_row,
        source=name_of(rows),
        template_arguments=dict(tokeniser.rendering.template_arguments),
        special_tokens=tokeniser.rendering.special_tokens,
        **dataclasses.asdict(tokeniser.lengths),
    )


def _build(
    rows: Source | list[Any], tokeniser: Tokeniser, spec: RowSpec, on_bad_row: OnBadRow
) -> tuple[DataReport, Iterator[Any]]:
    """Returns the report, and the record batches whose iteration fills it; text is read as it is tokenised."""
    first = next(iter(rows), None)
    if _is_tokenised(first):
        found = list(rows)
        return _tokenised_report(found), iter([record_batch([_tokenised(row) for row in found])])
    if isinstance(first, PreferenceRecord):
        report = DataReport(first.source, "records", len(list(rows)))
        records: Iterable[Any] = rows
    else:
        report = DataReport(name_of(rows))
        records = iter_records(rows, spec, on_bad_row, report)
    if tokeniser.rendering.special_tokens is None:
        records = tokeniser.special.refuse_rendered(records)
    return report, _batches(records, tokeniser, report, on_bad_row)


def _batches(
    records: Iterable[PreferenceRecord], tokeniser: Tokeniser, report: DataReport, on_bad_row: OnBadRow
) -> Iterator[Any]:
    left, kept = iter(records), 0
    chunks = iter(lambda: list(itertools.islice(left, CHUNK)), [])
    for batch in record_batches(chunks, tokeniser, report, on_bad_row):
        kept += len(batch)
        yield batch
    report.kept = kept


def _is_tokenised(row: Any) -> bool:
    return isinstance(row, SourceRow) and row.fields.keys() >= set(TOKENISED_COLUMNS)


def _tokenised_report(rows: list[Any]) -> DataReport:
    return DataReport(rows[0].source, "tokenised", len(rows), len(rows))


def _tokenised(row: SourceRow) -> TokenisedPair:
    try:
        prompt, chosen, rejected = (list(row.fields[column]) for column in TOKENISED_COLUMNS)
        return TokenisedPair(prompt, chosen, rejected, row.row)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{row.location}: {', '.join(TOKENISED_COLUMNS)} must be lists of token ids: {error}"
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
    table = pairs.pairs if isinstance(pairs, PairDataset) else pairs
    if isinstance(table, PairTable) and _table_fits(table, vocab_size, positions):
        return
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
        raise UserError(f"{where}: {outside_vocabulary(stray, vocab_size, tokens)}")


def _table_fits(table: PairTable, vocab_size: int | None, positions: int | None) -> bool:
    lengths = table.lengths()
    longest = int((lengths[:, 0] + lengths[:, 1:].max(1)).max(initial=0))
    known = vocab_size is None or 0 <= table.smallest_id() <= table.largest_id() < vocab_size
    return known and (positions is None or longest <= positions)
