"""Reports on rows: the two ways a row is not used, and counts with row numbers of all of them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal, Protocol

from tdpo.errors import UserError

OnBadRow = Literal["error", "drop"]
ROWS_NAMED = 10
"""How many rows one message names, and how many reasons a report."""

REASONS_KEPT = 1000
"""How many reasons are kept apart; a million bad rows may each have one of its own."""
OTHER_REASONS = "other reasons"


class Placed(Protocol):
    """Anything that knows where it was read."""

    @property
    def source(self) -> str:
        """File or dataset."""

    @property
    def row(self) -> int:
        """Row number, from 1."""


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
        elsewhere: Pairs on the other side of a split.
        dropped: Row numbers by reason; the reason names the file where the source has several.
        truncated: Row numbers by what was cut: ``"prompt"`` or ``"response"``.
        noticed: Row numbers by what the user should know of rows that are used.
        unused: Columns that hold text and are not used, each with the first row where they do.
    """

    item = "pairs"
    source: str
    format: str = ""
    read: int = 0
    kept: int = 0
    elsewhere: int = 0
    dropped: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    truncated: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    noticed: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    unused: dict[str, int] = field(default_factory=dict)

    def notice(self, place: Placed, what: str) -> None:
        """Counts a row that is used under what the user should know of it."""
        rows = _rows_of(self.noticed, what)
        if rows[-1:] != [place.row]:
            rows.append(place.row)

    def drop(self, place: Placed, reason: str) -> None:
        """Counts a row as dropped."""
        reason = reason if place.source == self.source else f"{reason} ({place.source})"
        _rows_of(self.dropped, reason).append(place.row)

    def add(self, part: DataReport) -> None:
        """Adds the dropped, truncated and noticed rows of a report on a part of the source."""
        for name in ("dropped", "truncated", "noticed"):
            rows_by_reason = getattr(self, name)
            for reason, rows in getattr(part, name).items():
                _rows_of(rows_by_reason, reason).extend(rows)

    def lines(self) -> list[str]:
        """The report in words, one line each.

        Example:
            >>> report = DataReport("pairs.jsonl", "preference", read=3, kept=2)
            >>> report.dropped["chosen and rejected are identical"].append(2)
            >>> print("; ".join(report.lines()))
            pairs.jsonl (preference): 3 rows, 2 kept; dropped 1, chosen and rejected are identical: row 2
        """
        several = self.kept + self.elsewhere > self.read
        kept = f"{self.kept} {self.item} of them" if several else f"{self.kept} kept"
        counts = f"{self.source} ({self.format}): {self.read} rows, {kept}"
        lines = [counts + (f", {self.elsewhere} on the other side of the split" if self.elsewhere else "")]
        reasons = sorted(self.dropped.items(), key=lambda item: -len(item[1]))
        lines += [f"dropped {len(rows)}, {why}: {row_list(rows)}" for why, rows in reasons[:ROWS_NAMED]]
        if len(reasons) > ROWS_NAMED:
            rest = sum(len(rows) for _, rows in reasons[ROWS_NAMED:])
            lines.append(f"dropped {rest} more for {len(reasons) - ROWS_NAMED} other reasons")
        if self.unused:
            lines.append(self._unused_line())
        lines += [f"truncated {len(rows)} {part}s: {row_list(rows)}" for part, rows in self.truncated.items()]
        lines += [f"warning, {what}: {row_list(rows)}" for what, rows in list(self.noticed.items())[:ROWS_NAMED]]
        return [line.encode("utf-8", "backslashreplace").decode() for line in lines]  # file names may be any bytes

    def _unused_line(self) -> str:
        """The columns that are not used."""
        shown = [f"{name!r} (row {row})" for name, row in list(self.unused.items())[: 2 * ROWS_NAMED]]
        more = f" and {len(self.unused) - len(shown)} more" if len(self.unused) > len(shown) else ""
        return (
            f"columns that hold text and are not used: {', '.join(shown)}{more}; --columns takes one for a field, "
            "--ignore_columns says that it is not needed"
        )


class BadRows:
    """Counts rows that cannot be used and keeps the messages of the first of them.

    Args:
        report: Counts them as dropped under ``on_bad_row: drop``.
        on_bad_row: ``"error"`` or ``"drop"``.
    """

    def __init__(self, report: DataReport, on_bad_row: OnBadRow = "error") -> None:
        self.report, self.on_bad_row = report, on_bad_row
        self._count = 0
        self._named: list[str] = []

    @property
    def stop(self) -> bool:
        """Whether the run will end in an error, so that no record is needed any more."""
        return self._count > 0 and self.on_bad_row == "error"

    def add(self, row: Placed, error: object) -> None:
        """Adds a row."""
        self._count += 1
        if len(self._named) < ROWS_NAMED:
            self._named.append(f"{row.source}, row {row.row}: {error}")
        if self.on_bad_row == "drop":
            self.report.drop(row, f"bad row ({error})")

    def raise_error(self, advice: str) -> None:
        """Raises one message for all of them, with what could be done, unless they are dropped."""
        if self.stop:
            more = f"\n... and {self._count - len(self._named)} more" if self._count > len(self._named) else ""
            raise UserError("\n".join(self._named) + f"{more}\n({advice})")


def _rows_of(rows_by_reason: dict[str, list[int]], reason: str) -> list[int]:
    known = reason in rows_by_reason or len(rows_by_reason) < REASONS_KEPT
    return rows_by_reason[reason if known else OTHER_REASONS]


def row_list(rows: list[int]) -> str:
    """Up to ten row numbers in words."""
    shown = ", ".join(str(row) for row in rows[:ROWS_NAMED])
    return f"row{'s' if len(rows) > 1 else ''} {shown}" + (", ..." if len(rows) > ROWS_NAMED else "")
