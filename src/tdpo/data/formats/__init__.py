"""From rows to records: a function and a line of :data:`FORMATS` for each shape of preference data."""

from tdpo.data.formats.convert import BAD_ROW_ADVICE, convert, iter_records, name_of, to_records
from tdpo.data.formats.fields import chat_options, is_empty, renamed, text_of
from tdpo.data.formats.registry import AUTO, FORMATS, Format, find_format
from tdpo.data.formats.report import BadRows, DataReport, OnBadRow, Placed, RowDropped, RowError

__all__ = [
    "AUTO",
    "BAD_ROW_ADVICE",
    "FORMATS",
    "BadRows",
    "DataReport",
    "Format",
    "OnBadRow",
    "Placed",
    "RowDropped",
    "RowError",
    "chat_options",
    "convert",
    "find_format",
    "is_empty",
    "iter_records",
    "name_of",
    "renamed",
    "text_of",
    "to_records",
]
