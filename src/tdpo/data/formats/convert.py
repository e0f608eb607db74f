"""Converts rows to records: recognises their format, and drops or refuses bad rows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from tdpo.config.row_spec import RowSpec
from tdpo.data.formats.columns import UnusedColumns
from tdpo.data.formats.fields import CHAT_AS_TEXT, first_of, renamed, without
from tdpo.data.formats.prompts import ASKED, SYSTEMS
from tdpo.data.formats.registry import AUTO, FORMATS, Format, find_format, recognise, with_weights
from tdpo.data.formats.report import BadRows, DataReport, OnBadRow, RowDropped, RowError
from tdpo.data.sources import SourceRow, groups_of
from tdpo.errors import UserError, nearest
from tdpo.types import PreferenceRecord

BAD_ROW_ADVICE = "--on_bad_row drop leaves such rows out"
PAIRS_BY_NAME = (
    ("chosen_response", "rejected_response"), ("response_chosen", "response_rejected"), ("preferred", "dispreferred"),
    ("positive", "negative"), ("pos", "neg"), ("pos_resp", "neg_resp"), ("winner", "loser"), ("better", "worse"),
    ("accepted", "rejected"), ("good", "bad"), ("win", "lose"),
)  # fmt: skip
"""Names of the columns of pairs in other datasets, which messages recognise."""
LOOKED_AT = 100
"""Rows among which the first of a known format decides for all."""


def to_records(
    rows: Iterable[SourceRow], spec: str | RowSpec = AUTO, on_bad_row: OnBadRow = "error"
) -> tuple[list[PreferenceRecord], DataReport]:
    """Converts rows to preference records; see :func:`iter_records`.

    Returns:
        The records in order, and the report, whose ``kept`` counts them.
    """
    report = DataReport(name_of(rows))
    return list(iter_records(rows, spec, on_bad_row, report)), report


def iter_records(
    rows: Iterable[SourceRow],
    spec: str | RowSpec,
    on_bad_row: OnBadRow,
    report: DataReport,
    formats: Mapping[str, Format] = FORMATS,
) -> Iterator[Any]:
    """Yields the records of rows one after the other, without holding them.

    Args:
        rows: Rows in memory, or a :class:`~tdpo.data.sources.Source`, whose parts may have specs of their own.
        spec: The spec of all others; a text is the name of a format.
        on_bad_row: ``"error"`` raises after reading all rows and names up to ten bad ones; ``"drop"`` leaves them out.
        report: Counts the rows.
        formats: The known formats: those of pairs, or those of supervised rows.

    Raises:
        UserError: for no rows, an unknown format, columns that fit no format, options a format does not have, or bad
            rows.
    """
    default = RowSpec(spec) if isinstance(spec, str) else spec
    bad = BadRows(report, on_bad_row)
    recognised: dict[str, str] = {}
    for own, group in groups_of(rows):
        spec = own or default
        usable = usable_rows(group, spec, bad)
        head = list(itertools.islice(usable, LOOKED_AT))
        if not head:
            continue
        name, known = _format_of(head, spec, formats)
        if spec.format == AUTO:
            recognised[name] = known.columns
        if name not in report.format.split(", "):
            report.format = f"{report.format}, {name}" if report.format else name
        records = _convert(name, known, head, usable, spec, bad)
        for index, record in enumerate(known.join(list(records), spec, report) if known.join else records):
            text = record.prompt or record.chosen
            if spec.side is not None and not spec.side.holds(text):
                report.elsewhere += 1
                continue
            copies = 1 if spec.weight == 1 else spec.copies(index, text)
            report.kept += copies
            if copies and not bad.stop:
                if spec.truncation_mode is not None:
                    record = replace(record, truncation_mode=spec.truncation_mode)
                yield from itertools.repeat(record, copies)
    if not report.read:
        raise UserError(f"{report.source}: no rows in it")
    found = " and ".join(f"{name} ({columns})" for name, columns in recognised.items())
    found = f"; by their columns they were read as {found}, --dataset_format names another format" if found else ""
    bad.raise_error(BAD_ROW_ADVICE + found)


def name_of(rows: Iterable[SourceRow]) -> str:
    """Returns the name of these rows in messages: that of their source, or of the first row's."""
    first = rows[0].source if isinstance(rows, list) and rows else None
    return getattr(rows, "name", first) or "dataset"


def usable_rows(rows: Iterable[SourceRow], spec: RowSpec, bad: BadRows) -> Iterator[SourceRow]:
    """Yields rows that could be read, without the columns to ignore and with other columns renamed.

    Raises:
        UserError: if a column to ignore is in none of them.
    """
    pending, names, before = set(spec.ignore_columns), dict[str, None](), bad.report.read
    for row in rows:
        bad.report.read += 1
        if pending:
            pending -= row.fields.keys()
            names.update(dict.fromkeys(row.fields))
        row = without(row, spec.ignore_columns)
        try:
            if row.error:
                raise RowError(row.error)
            found = renamed(row, spec.columns) if spec.columns else row
        except RowError as error:
            bad.add(row, error)
            continue
        for name, _ in spec.columns:
            if name in row.fields and found.fields.get(name) is not row.fields[name]:
                bad.report.unused.setdefault(name, row.row)
        yield found
    if pending and bad.report.read > before:
        missing = sorted(pending)[0]
        listed = ", ".join(map(repr, names)) or "none"
        hint = nearest(missing, names)
        raise UserError(f"--ignore_columns: there is no column {missing!r}; found the columns {listed}.{hint}")


def _format_of(head: list[SourceRow], spec: RowSpec, formats: Mapping[str, Format]) -> tuple[str, Format]:
    """Returns the format that was asked for, or that of the first row that has one.

    Raises:
        UserError: if there is none, or it has no such option.
    """
    name = spec.format
    if name == AUTO:
        name = next(filter(None, (recognise(row.fields, formats) for row in head)), "")
        if not name:
            raise _unknown_columns(head[0], formats)
    known = formats[name] if name in formats else find_format(name, formats)
    for option in spec.given():
        if option not in known.options:
            having = ", ".join(other for other, one in formats.items() if option in one.options)
            raise UserError(f"--{option}: the format {name} has no such option ({having} have)")
    return name, known


def _convert(
    name: str, known: Format, head: list[SourceRow], others: Iterable[SourceRow], spec: RowSpec, bad: BadRows
) -> Iterator[Any]:
    """Yields what the rows of a format give; checks their unused columns and gives all of them a system column."""
    unused = UnusedColumns(name, known.uses, bad.report)
    if known.uses:
        unused.check(head, answers=True)
    systems = SYSTEMS if SYSTEMS in known.uses else ()
    chats = any(row.fields.get(column) is not None for row in head for column in systems)
    for index, row in enumerate(itertools.chain(head, others)):
        if known.uses and index >= len(head):
            unused.check([row])
        filled = next((column for column in systems if row.fields.get(column)), None)
        if chats and not filled:  # all rows of a source are chats where one has a system prompt
            row = replace(row, fields={**row.fields, SYSTEMS[0]: ""})
        elif filled and not chats:
            _check_late_system(row, filled)
        try:
            records = known.convert(row, spec)  # a user's function, which names no columns, gives weights of its own
            yield from with_weights(records, row) if known.uses else records
        except RowDropped as reason:
            bad.report.drop(row, str(reason))
        except RowError as error:
            bad.add(row, error)
        except RecursionError:
            bad.add(row, "it is nested too deeply")
        for note in row.notes:
            bad.report.notice(row, note)
        row.notes.clear()


def _check_late_system(row: SourceRow, column: str) -> None:
    """Refuses a system prompt beside a text, if the first rows, which had none, were read as texts."""
    name = first_of(row.fields, ASKED)
    value = row.fields.get(name)
    if name == "prompt" and isinstance(value, str) and not CHAT_AS_TEXT.match(value):
        raise UserError(
            f"{row.location}: field {column!r} holds a system prompt, and none of the first {LOOKED_AT} rows does, "
            f"which were read as plain texts; give {column!r} there too (an empty text will do), or leave it out with "
            f"--ignore_columns {column}"
        )


def _unknown_columns(row: SourceRow, formats: Mapping[str, Format]) -> UserError:
    """Makes the error for rows of no known format, naming the columns found and those looked for."""
    from tdpo.data.formats.refused import refusal

    kind = refusal({name: value for name, value in row.fields.items() if value is not None})
    found = ", ".join(map(repr, row.fields)) or "none"
    if kind is not None and formats is FORMATS:
        return UserError(f"{row.source}: the rows are {kind}. Found the columns {found}")
    missing = ", ".join(repr(name) for name in ("prompt", "chosen", "rejected") if name not in row.fields)
    better, worse = next((pair for pair in PAIRS_BY_NAME if {*pair} <= row.fields.keys()), ("chosen", "rejected"))
    wanted = {"prompt": "prompt", better: "chosen", worse: "rejected"}
    named = ((wanted.get(name.strip().lower()), name) for name in map(str, row.fields))
    renaming = {field: name for field, name in named if field and field != name}
    option = ",".join(f"{field}={name}" for field, name in renaming.items()) or "prompt=question,..."
    if any(name != name.strip() or "," in name for name in renaming.values()):
        option = f"'{json.dumps(renaming, ensure_ascii=False)}'"
    return UserError(
        f"{row.source}: no column {missing or 'of the known kinds'}; found the columns {found}. Known formats:\n"
        + "".join(f"  {name}: {known.columns}\n" for name, known in formats.items())
        + f"(--columns {option} renames columns, --dataset_format module:function converts any other row)"
    )
