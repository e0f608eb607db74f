"""From rows to records: one function a format, one registry line, and one place that decides what a bad row means."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from tdpo.data.sources import SourceRow, describe
from tdpo.errors import UserError, nearest
from tdpo.types import PreferenceRecord, Text

OnBadRow = Literal["error", "drop"]
Record = TypeVar("Record")
ROWS_NAMED = 10
"""How many bad rows one message names."""


class RowError(Exception):
    """A row that cannot be used; the message names the field and what was found."""


class RowDropped(Exception):
    """A row that says nothing and is left out with a count, whatever ``on_bad_row`` says; the message is the reason."""


@dataclass
class DataReport:
    """What became of a source's rows: counts and row numbers, for the log and for ``--json``.

    Attributes:
        source: The source, as messages name it.
        format: Name of the format it was read as.
        read: Rows read.
        kept: Pairs that remain.
        dropped: Row numbers by reason.
        truncated: Row numbers by what was cut: ``"prompt"`` or ``"response"``.
    """

    source: str
    format: str = ""
    read: int = 0
    kept: int = 0
    dropped: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    truncated: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    def lines(self) -> list[str]:
        """The report in words, one line each.

        Example:
            >>> report = DataReport("pairs.jsonl", "preference", read=3, kept=2)
            >>> report.dropped["chosen and rejected are identical"].append(2)
            >>> print("; ".join(report.lines()))
            pairs.jsonl (preference): 3 rows, 2 kept; dropped 1, chosen and rejected are identical: row 2
        """
        told = [f"{self.source} ({self.format}): {self.read} rows, {self.kept} kept"]
        told += [f"dropped {len(rows)}, {why}: {_row_list(rows)}" for why, rows in self.dropped.items()]
        told += [f"truncated {len(rows)} {part}s: {_row_list(rows)}" for part, rows in self.truncated.items()]
        return told


def to_records(
    rows: Sequence[SourceRow], format_name: str = "auto", on_bad_row: OnBadRow = "error"
) -> tuple[list[PreferenceRecord], DataReport]:
    """Converts rows of one source to preference records.

    Args:
        rows: At least one row.
        format_name: A key of :data:`FORMATS`, or ``"auto"`` to tell it from the first row's columns.
        on_bad_row: ``"error"`` raises after reading all rows and names up to ten bad ones; ``"drop"`` leaves them out.

    Returns:
        The records in order, and the report, whose ``kept`` counts them.

    Raises:
        UserError: for an unknown format, columns that fit no format, or bad rows.
    """
    if not rows:
        raise UserError("the dataset has no rows")
    readable = next((row for row in rows if not row.error), rows[0])
    name = detect_format(readable) if format_name == "auto" else format_name
    if name not in FORMATS:
        raise UserError(
            f"unknown dataset format {name!r}; there are: auto, {', '.join(FORMATS)}.{nearest(name, FORMATS)}"
        )
    report = DataReport(rows[0].source, name)
    return convert(rows, FORMATS[name].convert, report, on_bad_row), report


def convert(
    rows: Iterable[SourceRow], function: Callable[[SourceRow], Record], report: DataReport, on_bad_row: OnBadRow
) -> list[Record]:
    """Applies a format's function to every row and keeps account of those that fail it."""
    records, bad = [], []
    for row in rows:
        report.read += 1
        try:
            if row.error:
                raise RowError(row.error)
            records.append(function(row))
        except RowDropped as reason:
            report.dropped[str(reason)].append(row.row)
        except RowError as error:
            bad.append(f"{row.place}: {error}")
            report.dropped[f"bad row ({error})"].append(row.row)
    report.kept = len(records)
    if bad and on_bad_row == "error":
        more = f"\n... and {len(bad) - ROWS_NAMED} more" if len(bad) > ROWS_NAMED else ""
        raise UserError("\n".join(bad[:ROWS_NAMED]) + more + "\n(--on_bad_row drop leaves such rows out)")
    return records


def detect_format(row: SourceRow) -> str:
    """Names the format whose columns the row has.

    Raises:
        UserError: naming the columns found and those looked for.
    """
    if row.error:
        raise UserError(f"{row.place}: {row.error}")
    for name, known in FORMATS.items():
        if known.recognises(row.fields):
            return name
    missing = [c for c in ("prompt", "chosen", "rejected") if c not in row.fields]
    raise UserError(
        f"{row.source}: no column {', '.join(repr(c) for c in missing) or 'of the known kinds'}; found the columns "
        f"{', '.join(repr(c) for c in row.fields) or 'none'}. Known formats: "
        + "; ".join(f"{name} ({known.columns})" for name, known in FORMATS.items())
    )


@dataclass(frozen=True)
class Format:
    """One shape of preference data.

    Attributes:
        columns: Its columns in words, for messages.
        recognises: Whether a row of these columns is of this format.
        convert: The row as a record; raises :class:`RowError` or :class:`RowDropped`.
    """

    columns: str
    recognises: Callable[[dict[str, Any]], bool]
    convert: Callable[[SourceRow], PreferenceRecord]


def preference_record(row: SourceRow) -> PreferenceRecord:
    """TRL's explicit format: ``prompt``, ``chosen``, ``rejected``, all texts or all lists of chat messages."""
    prompt, chosen, rejected = (text_of(row, name) for name in ("prompt", "chosen", "rejected"))
    kinds = {name: type(value) for name, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected))}
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{name} {'text' if kind is str else 'messages'}" for name, kind in kinds.items())
        raise RowError(f"texts and chat messages are mixed: {found}")
    return checked(PreferenceRecord(prompt, chosen, rejected, row.source, row.row))


def hh_record(row: SourceRow) -> PreferenceRecord:
    """Anthropic HH: two whole dialogues as text that share all up to the last ``Assistant:``."""
    (prompt, chosen), (other, rejected) = (split_dialogue(text_of(row, name), name) for name in ("chosen", "rejected"))
    if prompt != other:
        raise RowDropped("the two dialogues do not share their prompt")
    if not (chosen.strip() and rejected.strip()):
        raise RowDropped("a dialogue ends without a response")
    return checked(PreferenceRecord(prompt, chosen, rejected, row.source, row.row))


FORMATS: dict[str, Format] = {
    "preference": Format(
        "prompt, chosen, rejected: texts or lists of chat messages",
        lambda fields: {"prompt", "chosen", "rejected"} <= fields.keys(),
        preference_record,
    ),
    "hh": Format(
        "chosen, rejected: whole dialogues with Human: and Assistant: turns",
        lambda fields: (
            "prompt" not in fields
            and all(isinstance(fields.get(k), str) and "\n\nAssistant:" in fields[k] for k in ("chosen", "rejected"))
        ),
        hh_record,
    ),
}


def text_of(row: SourceRow, name: str) -> Any:
    """The field as text or as chat messages with role and content.

    Raises:
        RowError: if it is missing, empty or of another type.
    """
    if name not in row.fields:
        raise RowError(f"field {name!r} is missing")
    value = row.fields[name]
    if isinstance(value, str):
        return _encodable(value, name)
    if not isinstance(value, list):
        raise RowError(f"field {name!r} must be a text or a list of chat messages, found {describe(value)}")
    if not value:
        raise RowError(f"field {name!r} is an empty list of messages")
    for place, message in enumerate(value, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowError(f"field {name!r}, message {place} is no chat message with a role: {describe(message)}")
        if not isinstance(message.get("content"), str):
            raise RowError(f"field {name!r}, message {place} has no text content: {describe(message.get('content'))}")
        _encodable(message["content"], name)
    return value


def _encodable(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"field {name!r} holds half a character (a lone surrogate) at position {error.start}") from error
    return text


def split_dialogue(text: Any, name: str) -> tuple[str, str]:
    """An HH dialogue as prompt (through the last ``Assistant:``) and response (its leading space included)."""
    marker = "\n\nAssistant:"
    if not isinstance(text, str) or marker not in text:
        raise RowError(f"field {name!r} must be a dialogue with an 'Assistant:' turn, found {describe(text)}")
    end = text.rindex(marker) + len(marker)
    return text[:end], text[end:]


def checked(record: PreferenceRecord) -> PreferenceRecord:
    """The record, unless it has an empty response (an error) or prefers nothing (dropped)."""
    for name in ("chosen", "rejected"):
        if is_empty(getattr(record, name)):
            raise RowError(f"field {name!r} is an empty response")
    if record.chosen == record.rejected:
        raise RowDropped("chosen and rejected are identical")
    return record


def is_empty(text: Text) -> bool:
    """Whether there is nothing but white space in a text or in the last of some messages."""
    return not (text if isinstance(text, str) else text[-1]["content"]).strip()


def _row_list(rows: list[int]) -> str:
    shown = ", ".join(str(row) for row in rows[:ROWS_NAMED])
    return f"row{'s' if len(rows) > 1 else ''} {shown}" + (", ..." if len(rows) > ROWS_NAMED else "")
