"""From whatever the user hands over to a dataset of tokenised pairs and a report of what became of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from tdpo.data.formats import DataReport, OnBadRow, to_records
from tdpo.data.reading import Reading
from tdpo.data.sources import SourceRow, from_memory
from tdpo.data.tokenise import Tokeniser
from tdpo.errors import UserError
from tdpo.types import PackedBatch, PreferenceRecord, TokenisedPair

TOKENISED_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


class PairDataset(Dataset[TokenisedPair]):
    """Tokenised pairs with the report of how they came about.

    Attributes:
        pairs: The pairs in their order.
        report: Counts and row numbers.
    """

    def __init__(self, pairs: Sequence[TokenisedPair], report: DataReport) -> None:
        if not pairs:
            raise UserError(f"{report.source}: no pair is left. " + "; ".join(report.lines()))
        self.pairs, self.report = pairs, report

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> TokenisedPair:
        return self.pairs[index]

    def __iter__(self) -> Iterator[TokenisedPair]:
        return iter(self.pairs)

    def lengths(self) -> list[int]:
        """Tokens of each pair, its prompt counted once."""
        return [len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in self.pairs]


@dataclass(frozen=True)
class Collator:
    """Makes a batch as the loader delivers it: the fields of a :class:`~tdpo.types.PackedBatch`.

    Attributes:
        pack: Lays the pairs out.
    """

    pack: Callable[[Sequence[TokenisedPair]], PackedBatch]

    def __call__(self, pairs: Sequence[TokenisedPair]) -> dict[str, Any]:
        """The batch of some pairs."""
        return self.pack(pairs).as_dict()


def prepare_pairs(
    data: Iterable[Any],
    tokeniser: Tokeniser | None,
    format_name: str | Reading = "auto",
    on_bad_row: OnBadRow = "error",
    name: str = "dataset",
) -> PairDataset:
    """Tokenises data in any form a trainer accepts.

    Args:
        data: A ``PairDataset``, or an iterable of :class:`~tdpo.types.TokenisedPair`,
            :class:`~tdpo.types.PreferenceRecord`, :class:`~tdpo.data.sources.SourceRow` or dictionaries of columns
            (a ``datasets.Dataset`` is one), whose columns may also be ``prompt_ids``, ``chosen_ids``, ``rejected_ids``.
        tokeniser: Tokenizer and truncation; None will do for data that is tokenised.
        format_name: A key of :data:`tdpo.data.formats.FORMATS`, ``"auto"``, or a whole reading.
        on_bad_row: ``"error"`` or ``"drop"``.
        name: What messages call rows that come from memory.

    Raises:
        UserError: for bad rows, unknown formats and when nothing is left.
    """
    if isinstance(data, PairDataset):
        return data
    rows = list(data)
    if not rows:
        raise UserError(f"{name}: no rows in it")
    if isinstance(rows[0], TokenisedPair):
        return PairDataset(rows, DataReport(name, "tokenised", len(rows), len(rows)))
    if not isinstance(rows[0], PreferenceRecord | SourceRow):
        rows = from_memory(rows, name)
    source = rows[0].source
    if isinstance(rows[0], SourceRow) and rows[0].fields.keys() >= set(TOKENISED_COLUMNS):
        return PairDataset([_tokenised(row) for row in rows], DataReport(source, "tokenised", len(rows), len(rows)))
    if tokeniser is None:
        raise UserError(f"{source}: text has to be tokenised and there is no tokenizer; pass processing_class")
    if isinstance(rows[0], PreferenceRecord):
        records, report = rows, DataReport(source, "records", len(rows))
    else:
        records, report = to_records(rows, format_name, on_bad_row)
    return PairDataset(tokeniser.pairs(records, report), report)


def _tokenised(row: SourceRow) -> TokenisedPair:
    try:
        prompt, chosen, rejected = (list(row.fields[column]) for column in TOKENISED_COLUMNS)
        return TokenisedPair(prompt, chosen, rejected, row.row)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{row.place}: {', '.join(TOKENISED_COLUMNS)} must be lists of token ids: {error}") from error


def check_fits(
    pairs: Iterable[TokenisedPair], vocab_size: int, positions: int | None = None, source: str = "pairs"
) -> None:
    """Refuses what would fail deep inside the model: ids outside its vocabulary, sequences beyond its positions.

    Raises:
        UserError: naming the source, the pair's row (its place where the row is unknown) and what is too large.
    """
    for number, pair in enumerate(pairs, 1):
        ids = (*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids)
        length = len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
        stray = max(ids) if max(ids) >= vocab_size else min(ids)
        place = f"{source}, row {pair.row or number}"
        if positions is not None and length > positions:
            raise UserError(
                f"{place}: {length} tokens, but the model has {positions} positions; set --max_length to at most "
                f"{positions}"
            )
        if not 0 <= stray < vocab_size:
            raise UserError(
                f"{place}: token id {stray} is outside the model's vocabulary of {vocab_size}; tokenizer and model do "
                "not belong together"
            )
