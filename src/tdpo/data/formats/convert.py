"""Rows to records: formats told from the rows, and one place that decides what a bad row means."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar

from tdpo.data.formats.columns import SystemColumn, UnusedColumns
from tdpo.data.formats.fields import renamed
from tdpo.data.formats.prompts import SYSTEMS
from tdpo.data.formats.refused import refusal
from tdpo.data.formats.registry import AUTO, FORMATS, Format, find_format, recognise
from tdpo.data.formats.report import ROWS_NAMED, DataReport, Placed, RowDropped, RowError
from tdpo.data.reading import Reading
from tdpo.data.sources import SourceRow
from tdpo.errors import UserError, nearest
from tdpo.types import PreferenceRecord, Text

OnBadRow = Literal["error", "drop"]
Made = TypeVar("Made")
PAIRS_BY_NAME = (
    ("chosen_response", "rejected_response"), ("response_chosen", "response_rejected"), ("preferred", "dispreferred"),
    ("positive", "negative"), ("pos", "neg"), ("pos_resp", "neg_resp"), ("winner", "loser"), ("better", "worse"),
    ("accepted", "rejected"), ("good", "bad"), ("win", "lose"),
)  # fmt: skip
"""Names of the columns of pairs in other datasets, which messages recognise."""
LOOKED_AT = 100
"""Rows among which the first of a known format decides for all."""


def to_records(
    rows: Iterable[SourceRow], reading: str | Reading = AUTO, on_bad_row: OnBadRow = "error"
) -> tuple[list[PreferenceRecord], DataReport]:
    """Converts rows to preference records; see :func:`iter_records`.

    Returns:
        The records in order, and the report, whose ``kept`` counts them.
    """
    report = DataReport(name_of(rows))
    return list(iter_records(rows, reading, on_bad_row, report)), report


def iter_records(
    rows: Iterable[SourceRow], reading: str | Reading, on_bad_row: OnBadRow, report: DataReport
) -> Iterator[PreferenceRecord]:
    """Gives the records of rows one after the other, without holding them.

    Args:
        rows: Rows of one source or several; one that carries a reading of its own is read by it.
        reading: The reading of all others; a text is the name of a format.
        on_bad_row: ``"error"`` raises after reading all rows and names up to ten bad ones; ``"drop"`` leaves them out.
        report: Where all of it is counted.

    Raises:
        UserError: for no rows, an unknown format, columns that fit no format, options a format does not have, or bad
            rows.
    """

    def prompt(record: PreferenceRecord) -> Text:
        return record.prompt or record.chosen

    yield from convert(rows, reading, on_bad_row, report, FORMATS, prompt)


def convert(
    rows: Iterable[SourceRow],
    reading: str | Reading,
    on_bad_row: OnBadRow,
    report: DataReport,
    formats: Mapping[str, Format],
    key: Callable[[Any], Text],
) -> Iterator[Any]:
    """As :func:`iter_records` with other formats.

    Args:
        rows: The rows.
        reading: Reading of the rows that carry none.
        on_bad_row: What happens to bad ones.
        report: Where all of it is counted.
        formats: The known formats.
        key: What decides of a record on which side of a split it is.
    """
    default = Reading(reading) if isinstance(reading, str) else reading
    account = _Account(report, on_bad_row)
    for _, group in itertools.groupby(rows, key=lambda row: id(row.reading)):
        yield from _convert_source(group, default, account, formats, key)
    if not report.read:
        raise UserError(f"{report.source}: no rows in it")
    account.settle()


def name_of(rows: Iterable[SourceRow]) -> str:
    """What messages call these rows: the name of their source, or of the first row's."""
    name = getattr(rows, "name", None)
    if name is None and isinstance(rows, list):
        name = rows[0].source if rows else None
    return name or "dataset"


class _Account:
    """Keeps account of rows that were read and of those that failed, in bounded memory."""

    def __init__(self, report: DataReport, on_bad_row: OnBadRow) -> None:
        self.report, self.on_bad_row = report, on_bad_row
        self._named: list[str] = []
        self._bad = 0
        self.recognised: dict[str, str] = {}

    @property
    def lost(self) -> bool:
        """Whether the run will end in an error, so that no record is needed any more."""
        return self._bad > 0 and self.on_bad_row == "error"

    def bad(self, row: Placed, error: object) -> None:
        """A row that cannot be used."""
        self._bad += 1
        if len(self._named) < ROWS_NAMED:
            self._named.append(f"{row.source}, row {row.row}: {error}")
        if self.on_bad_row == "drop":
            self.report.drop(row, f"bad row ({error})")

    def settle(self) -> None:
        """Raises what there is to raise."""
        if self.lost:
            more = f"\n... and {self._bad - len(self._named)} more" if self._bad > len(self._named) else ""
            read = " and ".join(f"{name} ({columns})" for name, columns in self.recognised.items())
            read = f"; by their columns they were read as {read}, --dataset_format names another format" if read else ""
            raise UserError("\n".join(self._named) + more + f"\n(--on_bad_row drop leaves such rows out{read})")


def _convert_source(
    rows: Iterable[SourceRow],
    default: Reading,
    account: _Account,
    formats: Mapping[str, Format],
    key: Callable[[Any], Text],
) -> Iterator[Any]:
    """Records of rows that are read alike."""
    rows = iter(rows)
    first = next(rows)
    reading = first.reading or default
    usable = _usable(itertools.chain([first], rows), reading, account)
    head = list(itertools.islice(usable, LOOKED_AT))
    if not head:
        return
    name = _format_name(head, formats) if reading.format == AUTO else reading.format
    found = find_format(name, formats)
    _check_options(name, found, reading, formats)
    report = account.report
    if reading.format == AUTO:
        account.recognised[name] = found.columns
    if name not in report.format.split(", "):
        report.format = f"{report.format}, {name}" if report.format else name
    made = _convert_rows(_checked_rows(name, found, head, usable, report), found, reading, account)
    records = made if found.join is None else found.join(list(made), reading, report)
    for number, record in enumerate(records):
        if reading.side is not None and not reading.side.holds(key(record)):
            report.elsewhere += 1
            continue
        copies = reading.copies(number, key(record))
        report.kept += copies
        if copies and not account.lost:
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


def _usable(rows: Iterable[SourceRow], reading: Reading, account: _Account) -> Iterator[SourceRow]:
    """Rows that could be read, without the columns to ignore and with the others renamed.

    Raises:
        UserError: if a column to ignore is in none of them.
    """
    ignored, columns = set(reading.ignore_columns), {name for name, _ in reading.columns}
    pending, names = set(ignored), dict[str, None]()
    for row in rows:
        account.report.read += 1
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
            account.bad(row, error)
            continue
        for name in columns and columns & row.fields.keys():
            if found.fields.get(name) is not row.fields[name]:
                account.report.unused.setdefault(name, row.row)
        yield found
    if pending:
        missing = sorted(pending)[0]
        listed = ", ".join(map(repr, names)) or "none"
        hint = nearest(missing, names)
        raise UserError(f"--ignore_columns: there is no column {missing!r}; found the columns {listed}.{hint}")


def _convert_rows(rows: Iterable[SourceRow], found: Format, reading: Reading, account: _Account) -> Iterator[Any]:
    for row in rows:
        try:
            made = found.convert(row, reading)
        except RowDropped as reason:
            account.report.drop(row, str(reason))
        except RowError as error:
            account.bad(row, error)
        except RecursionError:
            account.bad(row, "it is nested too deeply")
        else:
            yield from made
        for note in row.notes:
            account.report.notice(row, note)
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


def _check_options(name: str, found: Format, reading: Reading, formats: Mapping[str, Format]) -> None:
    for option in reading.given():
        if option not in found.options:
            having = ", ".join(other for other, known in formats.items() if option in known.options)
            raise UserError(f"--{option}: the format {name} has no such option ({having} have)")
