"""What a preference dataset is like, before a run is paid for it: by the very code that prepares it for training."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tdpo.data.cache import PairCache
from tdpo.data.dataset import PairDataset, prepare_pairs
from tdpo.data.formats import DataReport, OnBadRow, to_records
from tdpo.data.reading import Reading
from tdpo.data.sources import Source
from tdpo.data.table import PairTable
from tdpo.data.tokenise import Lengths, Tokeniser, Turns
from tdpo.errors import UserError
from tdpo.types import PreferenceRecord, Text, TokenisedPair

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
UNLIMITED = Lengths(max_length=2**31, max_prompt_length=2**30)
MEASURES = ("prompt", "chosen", "rejected", "sequence")
"""What lengths are told of; a sequence is the prompt with the longer of its responses."""
BIASED = 0.6
"""Share of longer chosen responses, or of shorter ones, from which length alone is worth a word."""


@dataclass
class DataCheck:
    """Findings about a dataset. Rows are numbers in the source, lengths are tokens before anything is cut.

    Attributes:
        report: What became of the rows, as training reports it.
        errors: The message training would stop with, empty if it would not.
        lengths: ``[P, 4]``, in the order of :data:`MEASURES`.
        repeated: Rows that repeat an earlier pair: same prompt, chosen and rejected but for white space and case.
        repeated_prompts: Rows whose prompt an earlier, different pair has.
        contradicted: Rows whose preference another row of the same prompt turns around.
        alike: Rows whose chosen and rejected differ in white space and case alone.
        special: Rows with special-token text in them, which is encoded as plain text.
        leaks: Rows whose prompt is in the evaluation data too.
        without_end: Rows with a response that has no end token.
        left_out: Places of the pairs that a clean dataset would not have: repetitions and leaks.
    """

    report: DataReport
    errors: str
    lengths: np.ndarray
    repeated: list[int] = field(default_factory=list)
    repeated_prompts: list[int] = field(default_factory=list)
    contradicted: list[int] = field(default_factory=list)
    alike: list[int] = field(default_factory=list)
    special: list[int] = field(default_factory=list)
    leaks: list[int] = field(default_factory=list)
    without_end: list[int] = field(default_factory=list)
    left_out: set[int] = field(default_factory=set)

    def percentiles(self) -> dict[str, dict[str, int]]:
        """Lengths of each measure by percentile."""
        return {
            name: {
                f"p{p}": int(value) for p, value in zip(PERCENTILES, np.percentile(column, PERCENTILES), strict=True)
            }
            for name, column in zip(MEASURES, self.lengths.T, strict=True)
        }

    def length_bias(self) -> dict[str, float]:
        """How far length alone tells chosen from rejected: shares of pairs, and mean tokens of each side."""
        chosen, rejected = self.lengths[:, 1], self.lengths[:, 2]
        return {
            "chosen_longer": float((chosen > rejected).mean()),
            "chosen_shorter": float((chosen < rejected).mean()),
            "chosen_mean": float(chosen.mean()),
            "rejected_mean": float(rejected.mean()),
        }

    def hints(self) -> list[str]:
        """What may be wrong with the labels, in words."""
        bias, told = self.length_bias(), []
        for share, word in ((bias["chosen_longer"], "longer"), (bias["chosen_shorter"], "shorter")):
            if share >= BIASED and len(self.lengths) >= 50:
                told.append(
                    f"chosen is the {word} response in {share:.0%} of pairs ({bias['chosen_mean']:.0f} against "
                    f"{bias['rejected_mean']:.0f} tokens on average): length alone would predict the preference"
                )
        if self.contradicted:
            told.append(f"{len(self.contradicted)} rows contradict another row of the same prompt")
        if self.alike:
            told.append(f"in {len(self.alike)} rows chosen and rejected differ in white space and case alone")
        return told

    def as_json(self) -> dict[str, Any]:
        """All of it for ``--json``."""
        rows = {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if item.name not in ("report", "errors", "lengths", "left_out")
        }
        return {
            **vars(self.report),
            "errors": self.errors.splitlines(),
            "rows": rows,
            "lengths": self.percentiles(),
            "length_bias": self.length_bias(),
            "hints": self.hints(),
        }


@dataclass
class Prepared:
    """A dataset as training would have it.

    Attributes:
        records: The record of each pair.
        pairs: The pairs; the two have one order.
        errors: What training would stop with, empty if it would not.
    """

    records: list[PreferenceRecord]
    pairs: PairDataset
    errors: str


def prepare(
    rows: Source, tokeniser: Tokeniser, reading: Reading, on_bad_row: OnBadRow, cache: PairCache | None
) -> Prepared:
    """Prepares rows as training does, and goes on without the bad ones where training would stop.

    Raises:
        UserError: where nothing is left to look at.
    """
    errors = ""
    try:
        pairs = prepare_pairs(rows, tokeniser, reading, on_bad_row, cache=cache)
    except UserError as error:
        if on_bad_row == "drop":
            raise
        errors = str(error)
        pairs = prepare_pairs(rows, tokeniser, reading, "drop", cache=cache)
    if pairs.report.format == "tokenised":
        raise UserError(f"{pairs.report.source}: the rows are token ids already; there is no text to check")
    records, _ = to_records(rows, reading, "drop")
    return Prepared(_of_pairs(records, pairs), pairs, errors)


def check(prepared: Prepared, tokeniser: Tokeniser, held_out: Iterable[PreferenceRecord] = ()) -> DataCheck:
    """Looks a prepared dataset over.

    Args:
        prepared: The dataset.
        tokeniser: What tokenised it.
        held_out: Records that must not share a prompt with it.
    """
    records, report = prepared.records, prepared.pairs.report
    found = DataCheck(report, prepared.errors, _whole_lengths(prepared, tokeniser))
    eval_prompts = {_plain(record.prompt) for record in held_out}
    seen: set[tuple[str, str, str]] = set()
    prompts: set[str] = set()
    sides: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for place, record in enumerate(records):
        if place and record is records[place - 1]:  # a weight makes it seen several times in an epoch
            found.left_out.add(place)
            continue
        prompt, chosen, rejected = _plain(record.prompt), _plain(record.chosen), _plain(record.rejected)
        if (prompt, chosen, rejected) in seen:
            found.repeated.append(record.row)
            found.left_out.add(place)
        elif prompt in prompts:
            found.repeated_prompts.append(record.row)
        if prompt in eval_prompts:
            found.leaks.append(record.row)
            found.left_out.add(place)
        if chosen == rejected:
            found.alike.append(record.row)
        if any(token in text for text in _texts(record) for token in tokeniser.chats.special):
            found.special.append(record.row)
        seen.add((prompt, chosen, rejected))
        prompts.add(prompt)
        sides[prompt][chosen].add(rejected)
    found.contradicted = [r.row for r in records if _contradicted(r, sides[_plain(r.prompt)])]
    found.without_end = _without_end(prepared.pairs, tokeniser)
    return found


def clean_rows(prepared: Prepared, found: DataCheck) -> list[dict[str, Any]]:
    """The records of the pairs in the format ``preference``, without those that ``found`` would leave out."""
    rows = []
    for place, record in enumerate(prepared.records):
        if place not in found.left_out:
            row: dict[str, Any] = {"prompt": record.prompt, "chosen": record.chosen, "rejected": record.rejected}
            more = {"tools": record.tools, "chat_template_kwargs": record.chat_template_kwargs}
            rows.append(row | {name: value for name, value in more.items() if value is not None})
    return rows


def whole(record: PreferenceRecord, tokeniser: Tokeniser) -> TokenisedPair:
    """A record tokenised without truncation."""
    (pair,) = Tokeniser(tokeniser.tokenizer, UNLIMITED, tokeniser.encode).pairs([record], DataReport(record.source))
    return pair


def _of_pairs(records: Sequence[PreferenceRecord], pairs: PairDataset) -> list[PreferenceRecord]:
    """The records that became pairs: both are in the order of the source, and some records were dropped between."""
    left = iter(records)
    rows = pairs.pairs.rows().tolist() if isinstance(pairs.pairs, PairTable) else [pair.row for pair in pairs]
    return [next(record for record in left if record.row == row) for row in rows]


def _whole_lengths(prepared: Prepared, tokeniser: Tokeniser) -> np.ndarray:
    """``[P, 4]``: lengths as they would be without truncation; only what was cut is tokenised again."""
    pairs = prepared.pairs
    assert isinstance(pairs.pairs, PairTable), "text is tokenised into a table"
    lengths = pairs.pairs.lengths()
    cut = {row for rows in pairs.report.truncated.values() for row in rows}
    places = [place for place, record in enumerate(prepared.records) if record.row in cut]
    unlimited = Tokeniser(tokeniser.tokenizer, UNLIMITED, tokeniser.encode)
    turns = [Turns.of(r, r.chosen, r.rejected) for r in (prepared.records[place] for place in places)]
    for place, ids in zip(places, unlimited.turns(turns, DataReport("")), strict=True):
        lengths[place] = [len(ids.prompt), *map(len, ids.responses)]
    return np.column_stack([lengths, lengths[:, 0] + lengths[:, 1:].max(1)])


def _without_end(pairs: PairDataset, tokeniser: Tokeniser) -> list[int]:
    """Rows of pairs with a response whose last token is no special one."""
    ends = set(tokeniser.tokenizer.all_special_ids)
    ends |= {number for number, token in tokeniser.tokenizer.added_tokens_decoder.items() if token.special}
    return [p.row for p in pairs if p.chosen_ids[-1] not in ends or p.rejected_ids[-1] not in ends]


def _contradicted(record: PreferenceRecord, sides: dict[str, set[str]]) -> bool:
    chosen, rejected = _plain(record.chosen), _plain(record.rejected)
    return chosen != rejected and chosen in sides.get(rejected, ())


def _plain(text: Text) -> str:
    """A text, or a chat, without differences of white space and case."""
    if not isinstance(text, str):
        text = "\n".join(f"{message['role']}: {message['content']}" for message in text)
    return " ".join(text.split()).casefold()


def _texts(record: PreferenceRecord) -> Iterable[str]:
    for text in (record.prompt, record.chosen, record.rejected):
        yield from [text] if isinstance(text, str) else (str(message["content"]) for message in text)
