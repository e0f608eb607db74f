"""Checks a preference dataset before a run, with the code that prepares it for training."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tdpo.config.row_spec import RowSpec
from tdpo.data.cache import PairCache
from tdpo.data.calls import as_object, map_arguments, without_nulls
from tdpo.data.dataset import NoPairLeft, check_fits, prepare_pairs
from tdpo.data.formats import DataReport, OnBadRow, RowError, to_records
from tdpo.data.sources import Source
from tdpo.data.table import PairTable
from tdpo.data.tokenise import Tokeniser, Turns
from tdpo.errors import UserError
from tdpo.types import Message, PreferenceRecord, Text, TokenisedPair

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
MEASURES = ("prompt", "chosen", "rejected", "sequence")
"""Columns of the lengths; a sequence is the prompt with the longer of its responses."""
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
        """Lengths of each measure by percentile; empty without pairs."""
        if not len(self.lengths):
            return {}
        return {
            name: {
                f"p{p}": int(value) for p, value in zip(PERCENTILES, np.percentile(column, PERCENTILES), strict=True)
            }
            for name, column in zip(MEASURES, self.lengths.T, strict=True)
        }

    def length_bias(self) -> dict[str, float]:
        """Returns how far length alone predicts the preference: shares of pairs, and mean tokens of each side."""
        if not len(self.lengths):
            return {}
        chosen, rejected = self.lengths[:, 1], self.lengths[:, 2]
        return {
            "chosen_longer": float((chosen > rejected).mean()),
            "chosen_shorter": float((chosen < rejected).mean()),
            "chosen_mean": float(chosen.mean()),
            "rejected_mean": float(rejected.mean()),
        }

    def hints(self) -> list[str]:
        """Describes what may be wrong with the labels."""
        bias, hints = self.length_bias(), []
        for word in ("longer", "shorter") if len(self.lengths) >= 50 else ():
            share = bias[f"chosen_{word}"]
            if share >= BIASED:
                hints.append(
                    f"chosen is the {word} response in {share:.0%} of pairs ({bias['chosen_mean']:.0f} against "
                    f"{bias['rejected_mean']:.0f} tokens on average): length alone would predict the preference"
                )
        if self.contradicted:
            hints.append(f"{len(self.contradicted)} rows contradict another row of the same prompt")
        if self.alike:
            hints.append(f"in {len(self.alike)} rows chosen and rejected differ in white space and case alone")
        return hints

    def as_json(self) -> dict[str, Any]:
        """Returns everything for ``--json``."""
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
        report: What became of the rows.
        errors: What training would stop with, empty if it would not.
    """

    records: list[PreferenceRecord]
    pairs: PairTable
    report: DataReport
    errors: str


def prepare(
    rows: Source,
    tokeniser: Tokeniser,
    spec: RowSpec,
    on_bad_row: OnBadRow,
    cache: PairCache | None,
    limits: tuple[int | None, int | None] = (None, None),
) -> Prepared:
    """Prepares rows as training does, and continues without the bad ones where training would stop.

    Args:
        rows: The rows.
        tokeniser: Tokenizer and truncation.
        spec: How rows are read.
        on_bad_row: ``"error"`` or ``"drop"``.
        cache: Where tokenised pairs are kept.
        limits: Vocabulary size and positions of the model, None where they are not known.

    Raises:
        UserError: for rows that are token ids already.
    """
    errors: list[str] = []
    table, report = PairTable([]), DataReport(rows.name)
    for how in dict.fromkeys((on_bad_row, "drop")):
        try:
            dataset = prepare_pairs(rows, tokeniser, spec, how, cache=cache)
        except UserError as error:
            errors.append(str(error))
            report = error.report if isinstance(error, NoPairLeft) else report
            continue
        if not isinstance(dataset.pairs, PairTable) or dataset.report.format == "tokenised":
            raise UserError(f"{dataset.report.source}: the rows are token ids already; there is no text to check")
        table, report = dataset.pairs, dataset.report
        break
    try:
        check_fits(table, *limits, report.source, len(tokeniser.tokenizer))
    except UserError as error:
        errors.append(str(error))
    records = to_records(rows, spec, "drop")[0] if len(table) else []
    return Prepared(_of_pairs(records, table, tokeniser), table, report, "\n".join(dict.fromkeys(errors)))


def check(prepared: Prepared, tokeniser: Tokeniser, held_out: Iterable[PreferenceRecord] = ()) -> DataCheck:
    """Looks a prepared dataset over.

    Args:
        prepared: The dataset.
        tokeniser: What tokenised it.
        held_out: Records that must not share a prompt with it.
    """
    records = prepared.records
    found = DataCheck(prepared.report, prepared.errors, _whole_lengths(prepared, tokeniser))
    eval_prompts = {_plain_prompt(record) for record in held_out}
    seen: set[tuple[str, str, str]] = set()
    prompts: set[str] = set()
    sides: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    plain = [(_plain_prompt(record), _plain(record.chosen), _plain(record.rejected)) for record in records]
    for place, (record, whole_pair) in enumerate(zip(records, plain, strict=True)):
        prompt, chosen, rejected = whole_pair
        if place and record is records[place - 1]:  # a weight makes it seen several times in an epoch
            found.left_out.add(place)
            continue
        if whole_pair in seen:
            found.repeated.append(record.row)
            found.left_out.add(place)
        elif prompt in prompts:
            found.repeated_prompts.append(record.row)
        if prompt in eval_prompts:
            found.leaks.append(record.row)
            found.left_out.add(place)
        if chosen == rejected:
            found.alike.append(record.row)
        as_tokens = isinstance(record.prompt, str) and tokeniser.rendering.special_tokens == "tokens"
        if not as_tokens and any(token in text for text in _texts(record) for token in tokeniser.special.texts):
            found.special.append(record.row)
        seen.add(whole_pair)
        prompts.add(prompt)
        sides[prompt][chosen].add(rejected)
    found.contradicted = [
        record.row
        for record, (prompt, chosen, rejected) in zip(records, plain, strict=True)
        if chosen != rejected and chosen in sides[prompt].get(rejected, ())
    ]
    found.without_end = _without_end(prepared.pairs, tokeniser)
    return found


def examples(prepared: Prepared, tokeniser: Tokeniser, count: int) -> list[dict[str, Any]]:
    """Returns the first pairs with ids as they are trained on, and their text with special tokens."""
    found = []
    for record, pair in zip(prepared.records[:count], prepared.pairs[:count], strict=True):
        sides = {name: getattr(pair, f"{name}_ids") for name in ("prompt", "chosen", "rejected")}
        decode = tokeniser.tokenizer.decode
        texts = {name: decode(ids, clean_up_tokenization_spaces=False) for name, ids in sides.items()}
        ids = {f"{name}_ids": ids for name, ids in sides.items()}
        found.append({"row": record.row, "source": record.source, **ids, **texts})
    return found


def clean_rows(prepared: Prepared, found: DataCheck) -> list[dict[str, Any]]:
    """Returns the pairs as rows of the format ``preference``, without those that ``found`` would leave out."""
    rows = []
    for place, record in enumerate(prepared.records):
        if place not in found.left_out:
            row: dict[str, Any] = {"prompt": record.prompt, "chosen": record.chosen, "rejected": record.rejected}
            more = {"tools": record.tools, "chat_template_kwargs": record.chat_template_kwargs}
            rows.append(row | {name: value for name, value in more.items() if value is not None})
    return rows


def whole(record: PreferenceRecord, tokeniser: Tokeniser) -> TokenisedPair:
    """Tokenises a record without truncation."""
    (pair,) = tokeniser.unlimited().pairs([record], DataReport(record.source))
    return pair


def _of_pairs(records: Sequence[PreferenceRecord], pairs: PairTable, tokeniser: Tokeniser) -> list[PreferenceRecord]:
    """Returns the records that became pairs: both are in the order of the source, some records were dropped between."""
    rows = pairs.rows().tolist()
    made, became = Counter(record.row for record in records), Counter(rows)

    def becomes_a_pair(record: PreferenceRecord) -> bool:
        if made[record.row] == became[record.row]:
            return True
        # Of a row that made several records and fewer pairs, tokenising shows which of them.
        return record.row in became and bool(tokeniser.pairs([record], DataReport(record.source), "drop"))

    left = filter(becomes_a_pair, records)
    return [next(record for record in left if record.row == row) for row in rows]


def _whole_lengths(prepared: Prepared, tokeniser: Tokeniser) -> np.ndarray:
    """Computes ``[P, 4]`` lengths without truncation; only what was cut is tokenised again."""
    lengths = prepared.pairs.lengths()
    cut = {row for rows in prepared.report.truncated.values() for row in rows}
    places = [place for place, record in enumerate(prepared.records) if record.row in cut]
    turns = [Turns(r, r.prompt, (r.chosen, r.rejected)) for r in (prepared.records[place] for place in places)]
    for place, ids in zip(places, tokeniser.encode_turns(turns, DataReport("")), strict=True):
        lengths[place] = [len(ids.prompt), *map(len, ids.responses)]
    return np.column_stack([lengths, lengths[:, 0] + lengths[:, 1:].max(1)])


def _without_end(pairs: PairTable, tokeniser: Tokeniser) -> list[int]:
    """Returns the rows of pairs with a response whose last token is not a special one."""
    ends = set(tokeniser.tokenizer.all_special_ids)
    ends |= {number for number, token in tokeniser.tokenizer.added_tokens_decoder.items() if token.special}
    return [p.row for p in pairs if p.chosen_ids[-1] not in ends or p.rejected_ids[-1] not in ends]


def _plain_prompt(record: PreferenceRecord) -> str:
    """Returns a prompt with everything that the template receives for it."""
    more = [without_nulls(record.tools), record.chat_template_kwargs]
    return _plain(record.prompt) + (json.dumps(more, sort_keys=True) if any(more) else "")


def _plain(text: Text) -> str:
    """Returns a text, or whole messages, without differences of white space and case."""
    if not isinstance(text, str):
        text = "\n".join(f"{message['role']}: {message['content']}{_more_of(message)}" for message in text)
    return " ".join(text.split()).casefold()


def _more_of(message: Message) -> str:
    """Returns what a message holds beside its content, tool calls in one form."""
    if len(message) <= 2:
        return ""
    try:
        message = map_arguments(message, as_object)
    except RowError:  # arguments that are not JSON are compared as they are
        message = map_arguments(message, lambda arguments: arguments)
    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    return " " + json.dumps(rest, sort_keys=True, ensure_ascii=False)


def _texts(record: PreferenceRecord) -> Iterable[str]:
    for text in (record.prompt, record.chosen, record.rejected):
        yield from [text] if isinstance(text, str) else (str(message["content"]) for message in text)
