"""Errors of single rows, and the report that counts rows by what happened to them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal

from tdpo.errors import UserError

OnBadRow = Literal["error", "drop"]
ROWS_NAMED = 10
"""Rows that one message names at most, and reasons that a report lists."""
REASONS_KEPT = 1000
"""Reasons counted separately at most; a million bad rows may each have one of its own."""
OTHER_REASONS = "other reasons"
RowsByReason = dict[str, list[int]]


class RowError(Exception):
    """A row that cannot be used; the message names the field and what was found."""


class RowDropped(Exception):
    """A row without a preference, left out and counted whatever ``on_bad_row`` is; the message is the reason."""


@dataclass
class DataReport:
    """Counts and row numbers of a source's rows, used or not, for the log and for ``--json``.

    A row is named by anything with ``source`` and ``row``: the row itself or a record made of it.

    Attributes:
        source: The source, as messages name it.
        format: Name of the format it was read as.
        read: Rows read.
        kept: Pairs that remain.
        elsewhere: Pairs on the other side of a split.
        dropped: Row numbers by reason; the reason names the file where the source has several.
        truncated: Row numbers by what was cut: ``"prompt"`` or ``"response"``.
        noticed: Row numbers by warnings about rows that are used.
        unused: Columns that hold text and are not used, each with the first row where they do.
    """

    item = "pairs"
    source: str
    format: str = ""
    read: int = 0
    kept: int = 0
    elsewhere: int = 0
    dropped: RowsByReason = field(default_factory=lambda: defaultdict(list))
    truncated: RowsByReason = field(default_factory=lambda: defaultdict(list))
    noticed: RowsByReason = field(default_factory=lambda: defaultdict(list))
    unused: dict[str, int] = field(default_factory=dict)

    def notice(self, item: Any, what: str) -> None:
        """Counts a row that is used under a warning."""
        rows = _rows_of(self.noticed, what)
        if rows[-1:] != [item.row]:
            rows.append(item.row)

    def drop(self, item: Any, reason: str) -> None:
        """Counts a row as dropped."""
        reason = reason if item.source == self.source else f"{reason} ({item.source})"
        _rows_of(self.dropped, reason).append(item.row)

    def add(self, part: DataReport) -> None:
        """Adds the dropped, truncated and noticed rows of a report on a part of the source."""
        for name in ("dropped", "truncated", "noticed"):
            for reason, rows in getattr(part, name).items():
                _rows_of(getattr(self, name), reason).extend(rows)

    def lines(self) -> list[str]:
        """Returns the report as text, one line each.

        Examples:
            >>> report = DataReport("pairs.jsonl", "preference", read=3, kept=2)
            >>> report.dropped["chosen and rejected are identical"].append(2)
            >>> print("; ".join(report.lines()))
            pairs.jsonl (preference): 3 rows, 2 kept; dropped 1, chosen and rejected are identical: row 2
        """
        several = self.kept + self.elsewhere > self.read
        kept = f"{self.kept} {self.item} of them" if several else f"{self.kept} kept"
        other = f", {self.elsewhere} on the other side of the split" if self.elsewhere else ""
        lines = [f"{self.source} ({self.format}): {self.read} rows, {kept}{other}"]
        reasons = sorted(self.dropped.items(), key=lambda item: -len(item[1]))
        lines += [f"dropped {len(rows)}, {why}: {row_list(rows)}" for why, rows in reasons[:ROWS_NAMED]]
        if len(reasons) > ROWS_NAMED:
            rest = sum(len(rows) for _, rows in reasons[ROWS_NAMED:])
            lines.append(f"dropped {rest} more for {len(reasons) - ROWS_NAMED} other reasons")
        if self.unused:
            shown = [f"{name!r} (row {row})" for name, row in list(self.unused.items())[: 2 * ROWS_NAMED]]
            more = f" and {len(self.unused) - len(shown)} more" if len(self.unused) > len(shown) else ""
            lines.append(
                f"columns that hold text and are not used: {', '.join(shown)}{more}; --columns takes one for a field, "
                "--ignore_columns says that it is not needed"
            )
        lines += [f"truncated {len(rows)} {part}s: {row_list(rows)}" for part, rows in self.truncated.items()]
        lines += [f"warning, {what}: {row_list(rows)}" for what, rows in list(self.noticed.items())[:ROWS_NAMED]]
        return [line.encode("utf-8", "backslashreplace").decode() for line in lines]  # file names may be any bytes


@dataclass
class BadRows:
    """Rows that cannot be used, counted, with the messages of the first of them.

    Attributes:
        report: Counts them as dropped under ``on_bad_row: drop``.
        on_bad_row: ``"error"`` or ``"drop"``.
        count: Bad rows so far.
        messages: Messages of the first of them.
        stop: Set where the run will end in an error, so that no record is needed any more.
    """

    report: DataReport
    on_bad_row: OnBadRow = "error"
    count: int = 0
    messages: list[str] = field(default_factory=list)
    stop: bool = False

    def add(self, row: Any, error: object) -> None:
        """Adds a row."""
        if self.on_bad_row == "drop":
            self.report.drop(row, f"bad row ({error})")
            return
        self.count, self.stop = self.count + 1, True
        if len(self.messages) < ROWS_NAMED:
            self.messages.append(f"{row.source}, row {row.row}: {error}")

    def raise_error(self, advice: str) -> None:
        """Raises one message for all of them, with what to do, unless they are dropped."""
        if self.stop:
            more = f"\n... and {self.count - len(self.messages)} more" if self.count > len(self.messages) else ""
            raise UserError("\n".join(self.messages) + f"{more}\n({advice})")


def _rows_of(rows_by_reason: RowsByReason, reason: str) -> list[int]:
    known = reason in rows_by_reason or len(rows_by_reason) < REASONS_KEPT
    return rows_by_reason[reason if known else OTHER_REASONS]


def row_list(rows: list[int]) -> str:
    """Lists up to ten row numbers."""
    shown = ", ".join(str(row) for row in rows[:ROWS_NAMED])
    return f"row{'s' if len(rows) > 1 else ''} {shown}" + (", ..." if len(rows) > ROWS_NAMED else "")
