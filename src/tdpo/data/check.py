"""Checks a preference dataset before a run, with the code that prepares it for training."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tdpo.config.row_spec import RowSpec
from tdpo.data.calls import as_object, map_arguments, without_nulls
from tdpo.data.dataset import NoPairLeft, PairDataset, check_fits, prepare_pairs
from tdpo.data.formats import DataReport, OnBadRow, RowError, to_records
from tdpo.data.sources import Source
from tdpo.data.table import SCHEMA
from tdpo.data.tokenise import Tokeniser, Turns
from tdpo.errors import UserError
from tdpo.types import WEIGHTS, Message, PreferenceRecord, Text, TokenisedPair

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
MEASURES = ("prompt", "chosen", "rejected", "sequence")
"""Columns of the lengths; a sequence is the prompt with the longer of its responses."""
BIASED = 0.6
"""Share of longer chosen responses, or of shorter ones, from which length alone is worth a word."""
FINDINGS = {
    "without_end": "with a response that has no end token, because it is cut",
    "repeated": "that repeat an earlier pair",
    "repeated_prompts": "with the prompt of an earlier pair",
    "leaks": "whose prompt is in the evaluation data",
    "contradicted": "that contradict another row of the same prompt",
    "alike": "whose responses differ in white space and case alone",
    "special": "with special-token text, which is encoded as plain text",
}
"""Findings about single rows. Pairs are compared without differences of white space and case."""


@dataclass
class DataCheck:
    """A dataset as training would have it, with findings. Lengths are tokens before anything is cut.

    Attributes:
        records: The record of each pair.
        pairs: The pairs; the two have one order.
        report: What became of the rows.
        errors: The message training would stop with, empty if it would not.
        lengths: ``[P, 4]``, in the order of :data:`MEASURES`.
        rows: Row numbers in the source by finding, see :data:`FINDINGS`.
        left_out: Indices of the pairs that a clean dataset would not have: repetitions and leaks.
    """

    records: list[PreferenceRecord]
    pairs: PairDataset
    report: DataReport
    errors: str
    lengths: np.ndarray
    rows: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in FINDINGS})
    left_out: set[int] = field(default_factory=set)

    def percentiles(self) -> dict[str, dict[str, int]]:
        """Lengths of each measure by percentile; empty without pairs."""
        if not len(self.lengths):
            return {}
        columns = np.percentile(self.lengths, PERCENTILES, axis=0).astype(int).T.tolist()
        names = [f"p{percentile}" for percentile in PERCENTILES]
        return {
            measure: dict(zip(names, column, strict=True)) for measure, column in zip(MEASURES, columns, strict=True)
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
        if rows := self.rows["contradicted"]:
            hints.append(f"{len(rows)} rows contradict another row of the same prompt")
        if rows := self.rows["alike"]:
            hints.append(f"in {len(rows)} rows chosen and rejected differ in white space and case alone")
        return hints

    def as_json(self) -> dict[str, Any]:
        """Returns everything for ``--json``."""
        return {
            **vars(self.report),
            "errors": self.errors.splitlines(),
            "rows": self.rows,
            "lengths": self.percentiles(),
            "length_bias": self.length_bias(),
            "hints": self.hints(),
        }

    def examples(self, tokeniser: Tokeniser, count: int) -> list[dict[str, Any]]:
        """Returns the first pairs with ids as they are trained on, and their text with special tokens."""
        found = []
        for record, pair in zip(self.records[:count], self.pairs[:count], strict=True):
            shown: dict[str, Any] = {"row": record.row, "source": record.source}
            for name in ("prompt", "chosen", "rejected"):
                shown[f"{name}_ids"] = ids = getattr(pair, f"{name}_ids")
                shown[name] = tokeniser.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            shown |= {name: getattr(pair, name) for name in WEIGHTS if getattr(pair, name) is not None}
            found.append(shown)
        return found

    def clean_rows(self) -> list[dict[str, Any]]:
        """Returns the pairs as rows of the format ``preference``, without repetitions and leaks."""
        names = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
        return [
            {name: value for name in names if (value := getattr(record, name)) is not None} | (record.weights or {})
            for index, record in enumerate(self.records)
            if index not in self.left_out
        ]


def check(
    rows: Source,
    tokeniser: Tokeniser,
    spec: RowSpec,
    on_bad_row: OnBadRow,
    cache: Path | None,
    limits: tuple[int | None, int | None] = (None, None),
    held_out: Iterable[PreferenceRecord] = (),
) -> DataCheck:
    """Prepares rows as training does, without the bad ones where training would stop, and looks the pairs over.

    Args:
        rows: The rows.
        tokeniser: Tokenizer and truncation.
        spec: How rows are read.
        on_bad_row: ``"error"`` or ``"drop"``.
        cache: Where tokenised pairs are kept.
        limits: Vocabulary size and positions of the model, None where they are not known.
        held_out: Records that must not share a prompt with the rows.

    Raises:
        UserError: for rows that are token ids already.
    """
    errors: list[str] = []
    dataset = PairDataset(SCHEMA.empty_table(), DataReport(rows.name))
    for how in dict.fromkeys((on_bad_row, "drop")):
        try:
            dataset = prepare_pairs(rows, tokeniser, spec, how, cache=cache)
        except UserError as error:
            errors.append(str(error))
            if isinstance(error, NoPairLeft):
                dataset.report = error.report
            continue
        if dataset.report.format == "tokenised":
            raise UserError(f"{dataset.report.source}: the rows are token ids already; there is no text to check")
        break
    try:
        check_fits(dataset, *limits, dataset.report.source, len(tokeniser.tokenizer))
    except UserError as error:
        errors.append(str(error))
    records = _of_pairs(to_records(rows, spec, "drop")[0] if len(dataset) else [], dataset, tokeniser)
    lengths = _whole_lengths(records, dataset, tokeniser)
    found = DataCheck(records, dataset, dataset.report, "\n".join(dict.fromkeys(errors)), lengths)
    _look_over(found, tokeniser, {_plain_prompt(record) for record in held_out})
    return found


def _look_over(found: DataCheck, tokeniser: Tokeniser, held_out: set[str]) -> None:
    """Adds the findings about single rows."""
    plain = [(_plain_prompt(record), _plain(record.chosen), _plain(record.rejected)) for record in found.records]
    all_pairs, seen, prompts = set(plain), set[tuple[str, str, str]](), set[str]()
    ends = special_ids(tokeniser.tokenizer)
    as_tokens = tokeniser.rendering.special_tokens == "tokens"
    for index, (record, pair) in enumerate(zip(found.records, found.pairs, strict=True)):
        if index and record is found.records[index - 1]:  # a weight makes it seen several times in an epoch
            found.left_out.add(index)
            continue
        prompt, chosen, rejected = plain[index]
        literal = not (as_tokens and isinstance(record.prompt, str))
        findings = {
            "without_end": pair.chosen_ids[-1] not in ends or pair.rejected_ids[-1] not in ends,
            "repeated": plain[index] in seen,
            "repeated_prompts": plain[index] not in seen and prompt in prompts,
            "leaks": prompt in held_out,
            "contradicted": chosen != rejected and (prompt, rejected, chosen) in all_pairs,
            "alike": chosen == rejected,
            "special": literal and any(token in text for text in _texts(record) for token in tokeniser.special.texts),
        }
        for name in filter(findings.get, findings):
            found.rows[name].append(record.row)
        if findings["repeated"] or findings["leaks"]:
            found.left_out.add(index)
        seen.add(plain[index])
        prompts.add(prompt)


def whole(record: PreferenceRecord, tokeniser: Tokeniser) -> TokenisedPair:
    """Tokenises a record without truncation."""
    (pair,) = tokeniser.unlimited().pairs([record], DataReport(record.source))
    return pair


def _of_pairs(records: Sequence[PreferenceRecord], pairs: PairDataset, tokeniser: Tokeniser) -> list[PreferenceRecord]:
    """Returns the records that became pairs: both are in the order of the source, some records were dropped between."""
    rows = pairs.table["row"].to_pylist()
    made, became = Counter(record.row for record in records), Counter(rows)

    def becomes_a_pair(record: PreferenceRecord) -> bool:
        if made[record.row] == became[record.row]:
            return True
        # Of a row that made several records and fewer pairs, tokenising shows which of them.
        return record.row in became and bool(tokeniser.pairs([record], DataReport(record.source), "drop"))

    left = filter(becomes_a_pair, records)
    return [next(record for record in left if record.row == row) for row in rows]


def _whole_lengths(records: Sequence[PreferenceRecord], pairs: PairDataset, tokeniser: Tokeniser) -> np.ndarray:
    """Computes ``[P, 4]`` lengths without truncation; only what was cut is tokenised again."""
    lengths = pairs.side_lengths()
    cut = {row for rows in pairs.report.truncated.values() for row in rows}
    indices = [index for index, record in enumerate(records) if record.row in cut]
    turns = [Turns(r, r.prompt, (r.chosen, r.rejected)) for r in (records[index] for index in indices)]
    for index, ids in zip(indices, tokeniser.encode_turns(turns, DataReport("")), strict=True):
        lengths[index] = [len(ids.prompt), *map(len, ids.responses)]
    return np.column_stack([lengths, lengths[:, 0] + lengths[:, 1:].max(1)])


def special_ids(tokenizer: Any) -> set[int]:
    """Returns the ids of all special tokens."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}


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
