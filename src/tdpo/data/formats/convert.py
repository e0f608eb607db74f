"""Converts rows to records: recognises their format, and drops or refuses bad rows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from tdpo.data.formats.columns import SystemColumn, UnusedColumns
from tdpo.data.formats.fields import renamed
from tdpo.data.formats.prompts import SYSTEMS
from tdpo.data.formats.refused import refusal
from tdpo.data.formats.registry import AUTO, FORMATS, Format, find_format, recognise
from tdpo.data.formats.report import BadRows, DataReport, OnBadRow, RowDropped, RowError
from tdpo.data.row_spec import RowSpec
from tdpo.data.sources import SourceRow, groups_of
from tdpo.errors import UserError, nearest
from tdpo.types import PreferenceRecord, Text

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
    rows: Iterable[SourceRow], reading: str | RowSpec = AUTO, on_bad_row: OnBadRow = "error"
) -> tuple[list[PreferenceRecord], DataReport]:
    """Converts rows to preference records; see :func:`iter_records`.

    Returns:
        The records in order, and the report, whose ``kept`` counts them.
    """
    report = DataReport(name_of(rows))
    return list(iter_records(rows, reading, on_bad_row, report)), report


def iter_records(
    rows: Iterable[SourceRow], reading: str | RowSpec, on_bad_row: OnBadRow, report: DataReport
) -> Iterator[PreferenceRecord]:
    """Gives the records of rows one after the other, without holding them.

    Args:
        rows: Rows in memory, or a :class:`~tdpo.data.sources.Source`, whose parts may have readings of their own.
        reading: The reading of all others; a text is the name of a format.
        on_bad_row: ``"error"`` raises after reading all rows and names up to ten bad ones; ``"drop"`` leaves them out.
        report: Where all of it is counted.

    Raises:
        UserError: for no rows, an unknown format, columns that fit no format, options a format does not have, or bad
            rows.
    """
    yield from convert(rows, reading, on_bad_row, report, FORMATS, lambda record: record.prompt or record.chosen)


def convert(
    rows: Iterable[SourceRow],
    reading: str | RowSpec,
    on_bad_row: OnBadRow,
    report: DataReport,
    formats: Mapping[str, Format],
    key: Callable[[Any], Text],
) -> Iterator[Any]:
    """As :func:`iter_records` with other formats.

    Args:
        rows: The rows.
        reading: RowSpec of the rows whose source names none.
        on_bad_row: What happens to bad ones.
        report: Where all of it is counted.
        formats: The known formats.
        key: What decides of a record on which side of a split it is.
    """
    default = RowSpec(reading) if isinstance(reading, str) else reading
    bad = BadRows(report, on_bad_row)
    recognised: dict[str, str] = {}
    for own, group in groups_of(rows):
        yield from _convert_group(group, own or default, bad, recognised, formats, key)
    if not report.read:
        raise UserError(f"{report.source}: no rows in it")
    read = " and ".join(f"{name} ({columns})" for name, columns in recognised.items())
    read = f"; by their columns they were read as {read}, --dataset_format names another format" if read else ""
    bad.raise_error(BAD_ROW_ADVICE + read)


def name_of(rows: Iterable[SourceRow]) -> str:
    """What messages call these rows: the name of their source, or of the first row's."""
    first = rows[0].source if isinstance(rows, list) and rows else None
    return getattr(rows, "name", first) or "dataset"


def _convert_group(
    rows: Iterable[SourceRow],
    reading: RowSpec,
    bad: BadRows,
    recognised: dict[str, str],
    formats: Mapping[str, Format],
    key: Callable[[Any], Text],
) -> Iterator[Any]:
    """Yields the records of rows that share a reading."""
    usable = _usable(rows, reading, bad)
    head = list(itertools.islice(usable, LOOKED_AT))
    if not head:
        return
    name = _format_name(head, formats) if reading.format == AUTO else reading.format
    found = find_format(name, formats)
    _check_options(name, found, reading, formats)
    report = bad.report
    if reading.format == AUTO:
        recognised[name] = found.columns
    if name not in report.format.split(", "):
        report.format = f"{report.format}, {name}" if report.format else name
    made = _convert_rows(_checked_rows(name, found, head, usable, report), found, reading, bad)
    records = made if found.join is None else found.join(list(made), reading, report)
    for number, record in enumerate(records):
        if reading.side is not None and not reading.side.holds(key(record)):
            report.elsewhere += 1
            continue
        copies = reading.copies(number, key(record))
        report.kept += copies
        if copies and not bad.stop:
            if reading.truncation_mode is not None:
                record = replace(record, truncation_mode=reading.truncation_mode)
            yield from itertools.repeat(record, copies)


def _checked_rows(
    name: str, found: Format, head: list[SourceRow], others: Iterable[SourceRow], report: DataReport
) -> Iterator[SourceRow]:
    """Looks at the unused columns of rows; gives all of them a system prompt where one of the first has one."""
    if not found.uses:
        yield from itertools.chain(head, others)
        return
    systems = SystemColumn(head) if SYSTEMS in found.uses else None
    unused = UnusedColumns(name, found.uses, report)
    unused.check_head(head)
    for row in head:
        yield systems.fill(row) if systems else row
    for row in others:
        unused.check(row)
        yield systems.fill(row) if systems else row


def _usable(rows: Iterable[SourceRow], reading: RowSpec, bad: BadRows) -> Iterator[SourceRow]:
    """Rows that could be read, without the columns to ignore and with the others renamed.

    Raises:
        UserError: if a column to ignore is in none of them.
    """
    ignored, columns = set(reading.ignore_columns), {name for name, _ in reading.columns}
    pending, names, before = set(ignored), dict[str, None](), bad.report.read
    for row in rows:
        bad.report.read += 1
        if pending:
            pending -= row.fields.keys()
            names.update(dict.fromkeys(row.fields))
        if ignored:
            row = replace(row, fields={name: value for name, value in row.fields.items() if name not in ignored})
        try:
            if row.error:
                raise RowError(row.error)
            found = renamed(row, reading.columns)
        except RowError as error:
            bad.add(row, error)
            continue
        for name in columns and columns & row.fields.keys():
            if found.fields.get(name) is not row.fields[name]:
                bad.report.unused.setdefault(name, row.row)
        yield found
    if pending and bad.report.read > before:
        missing = sorted(pending)[0]
        listed = ", ".join(map(repr, names)) or "none"
        hint = nearest(missing, names)
        raise UserError(f"--ignore_columns: there is no column {missing!r}; found the columns {listed}.{hint}")


def _convert_rows(rows: Iterable[SourceRow], found: Format, reading: RowSpec, bad: BadRows) -> Iterator[Any]:
    for row in rows:
        try:
            made = found.convert(row, reading)
        except RowDropped as reason:
            bad.report.drop(row, str(reason))
        except RowError as error:
            bad.add(row, error)
        except RecursionError:
            bad.add(row, "it is nested too deeply")
        else:
            yield from made
        for note in row.notes:
            bad.report.notice(row, note)
        row.notes.clear()


def _format_name(head: list[SourceRow], formats: Mapping[str, Format]) -> str:
    """The format of the first row that has one.

    Raises:
        UserError: naming the columns found and those looked for.
    """
    name = next((name for name in (recognise(row.fields, formats) for row in head) if name), None)
    if name is not None:
        return name
    row = head[0]
    kind = refusal({name: value for name, value in row.fields.items() if value is not None})
    if kind is not None and formats is FORMATS:
        raise UserError(f"{row.source}: the rows are {kind}. Found the columns {', '.join(map(repr, row.fields))}")
    missing = [c for c in ("prompt", "chosen", "rejected") if c not in row.fields]
    raise UserError(
        f"{row.source}: no column {', '.join(repr(c) for c in missing) or 'of the known kinds'}; found the columns "
        f"{', '.join(repr(c) for c in row.fields) or 'none'}. Known formats:\n"
        + "".join(f"  {name}: {known.columns}\n" for name, known in formats.items())
        + f"(--columns {_suggested_columns(row.fields)} renames columns, --dataset_format module:function converts any "
        "other row)"
    )


def _suggested_columns(fields: Mapping[str, Any]) -> str:
    """Writes the option for columns that are a pair by their names, or an example of it."""
    better, worse = next((pair for pair in PAIRS_BY_NAME if {*pair} <= fields.keys()), ("chosen", "rejected"))
    wanted = {"prompt": "prompt", better: "chosen", worse: "rejected"}
    named = ((wanted.get(name.strip().lower()), name) for name in map(str, fields))
    found = {field: name for field, name in named if field and field != name}
    if any(name != name.strip() or "," in name for name in found.values()):
        return f"'{json.dumps(found, ensure_ascii=False)}'"
    return ",".join(f"{field}={name}" for field, name in found.items()) or "prompt=question,..."


def _check_options(name: str, found: Format, reading: RowSpec, formats: Mapping[str, Format]) -> None:
    for option in reading.given():
        if option not in found.options:
            having = ", ".join(other for other, known in formats.items() if option in known.options)
            raise UserError(f"--{option}: the format {name} has no such option ({having} have)")
