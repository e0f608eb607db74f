"""Converts rows to records: recognises their format, and drops or refuses bad rows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from tdpo.config.row_spec import RowSpec
from tdpo.data.formats.columns import UnusedColumns, with_system_column
from tdpo.data.formats.fields import renamed
from tdpo.data.formats.prompts import SYSTEMS
from tdpo.data.formats.refused import refusal
from tdpo.data.formats.registry import AUTO, FORMATS, Format, find_format, recognise
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
        yield from _convert_group(group, own or default, bad, recognised, formats)
    if not report.read:
        raise UserError(f"{report.source}: no rows in it")
    if bad.stop:
        found = " and ".join(f"{name} ({columns})" for name, columns in recognised.items())
        found = f"; by their columns they were read as {found}, --dataset_format names another format" if found else ""
        bad.raise_error(BAD_ROW_ADVICE + found)


def name_of(rows: Iterable[SourceRow]) -> str:
    """Returns the name of these rows in messages: that of their source, or of the first row's."""
    first = rows[0].source if isinstance(rows, list) and rows else None
    return getattr(rows, "name", first) or "dataset"


def _convert_group(
    rows: Iterable[SourceRow], spec: RowSpec, bad: BadRows, recognised: dict[str, str], formats: Mapping[str, Format]
) -> Iterator[Any]:
    """Yields the records of rows that share a spec."""
    report = bad.report
    usable = _usable(rows, spec, bad)
    head = list(itertools.islice(usable, LOOKED_AT))
    if not head:
        return
    name = spec.format
    if name == AUTO:
        name = next(filter(None, (recognise(row.fields, formats) for row in head)), "")
        if not name:
            raise _unknown_columns(head[0], formats)
    known = find_format(name, formats)
    for option in spec.given():
        if option not in known.options:
            having = ", ".join(other for other, one in formats.items() if option in one.options)
            raise UserError(f"--{option}: the format {name} has no such option ({having} have)")
    if spec.format == AUTO:
        recognised[name] = known.columns
    if name not in report.format.split(", "):
        report.format = f"{report.format}, {name}" if report.format else name
    records = _convert_rows(name, known, head, usable, spec, bad)
    for index, record in enumerate(records if known.join is None else known.join(list(records), spec, report)):
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


def _usable(rows: Iterable[SourceRow], spec: RowSpec, bad: BadRows) -> Iterator[SourceRow]:
    """Yields rows that could be read, without the columns to ignore and with other columns renamed.

    Raises:
        UserError: if a column to ignore is in none of them.
    """
    ignored = set(spec.ignore_columns)
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


def _convert_rows(
    name: str, known: Format, head: list[SourceRow], others: Iterable[SourceRow], spec: RowSpec, bad: BadRows
) -> Iterator[Any]:
    """Yields what the rows of a format give; checks their unused columns and gives all of them a system column."""
    unused = UnusedColumns(name, known.uses, bad.report)
    if known.uses:
        unused.check_head(head)
    systems = SYSTEMS in known.uses
    chats = systems and any(row.fields.get(name) is not None for row in head for name in SYSTEMS)
    for index, row in enumerate(itertools.chain(head, others)):
        if known.uses and index >= len(head):
            unused.check(row)
        if chats or (systems and any(map(row.fields.get, SYSTEMS))):
            row = with_system_column(row, head, chats)
        try:
            made = known.convert(row, spec)
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


def _unknown_columns(row: SourceRow, formats: Mapping[str, Format]) -> UserError:
    """Makes the error for rows of no known format, naming the columns found and those looked for."""
    kind = refusal({name: value for name, value in row.fields.items() if value is not None})
    if kind is not None and formats is FORMATS:
        return UserError(f"{row.source}: the rows are {kind}. Found the columns {', '.join(map(repr, row.fields))}")
    missing = [c for c in ("prompt", "chosen", "rejected") if c not in row.fields]
    return UserError(
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
