"""Formats of preference data: each a function from a row to records, and an entry of :data:`FORMATS`."""

from tdpo.data.formats.convert import BAD_ROW_ADVICE, iter_records, name_of, to_records, usable_rows
from tdpo.data.formats.fields import chat_options, is_empty, renamed, without
from tdpo.data.formats.registry import AUTO, FORMATS, Format, find_format
from tdpo.data.formats.report import BadRows, DataReport, OnBadRow, RowDropped, RowError

__all__ = [
    "AUTO",
    "BAD_ROW_ADVICE",
    "FORMATS",
    "BadRows",
    "DataReport",
    "Format",
    "OnBadRow",
    "RowDropped",
    "RowError",
    "chat_options",
    "find_format",
    "is_empty",
    "iter_records",
    "name_of",
    "renamed",
    "to_records",
    "usable_rows",
    "without",
]
