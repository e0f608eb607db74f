"""Layouts that files of one kind come in: rows of a JSON value, delimiters of a table, and files under a wrong name."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from typing import Any

from tdpo.errors import UserError

SPLITS = ("train", "test", "eval", "validation", "dev")
"""Names of splits: of a file or a list that has one, the rows are of that split alone."""
ROW_COLUMNS = (
    "prompt", "chosen", "rejected", "messages", "conversations", "instruction", "question", "query", "text", "input",
)  # fmt: skip
"""An object with one of these columns is a row, and lists in it are its values."""
TURN_KEYS = ("role", "from")
DELIMITERS = (",", ";", "\t", "|")
MAGIC = {
    b"\x1f\x8b": "gzip-compressed data; decompress it or add .gz to its name",
    b"BZh91AY&SY": "bzip2-compressed data; decompress it or add .bz2 to its name",
    b"\xfd7zXZ\x00": "xz-compressed data; decompress it or add .xz to its name",
    b"\x28\xb5\x2f\xfd": "zstd-compressed data; decompress it or add .zst to its name",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\xd0\xcf\x11\xe0": "an Excel workbook or another Office file; save it as CSV in UTF-8",
    b"PAR1": "a Parquet file; name it .parquet",
    b"ARROW1": "an Arrow file; name it .arrow",
    b"%PDF": "a PDF document",
}
"""First bytes of files of other kinds, and what to do with those."""
OFFICE_PARTS = (b"[Content_Types].xml", b"_rels/", b"xl/")
OWN_MAGIC = {"parquet": b"PAR1", "arrow": b"ARROW1"}
HTML = (b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--")


def foreign_content(head: bytes, kind: str) -> str:
    """Returns what a file holds, and what to do, if its first bytes show another kind than its name; else "".

    Example:
        >>> foreign_content(b"<!DOCTYPE html>", "jsonl")[:13]
        'an HTML page '
        >>> foreign_content(b"PAR1", "parquet")
        ''
    """
    if kind in OWN_MAGIC and head.startswith(OWN_MAGIC[kind]):
        return ""
    if head.startswith(b"PK\x03\x04") and any(part in head for part in OFFICE_PARTS):
        return MAGIC[b"\xd0\xcf\x11\xe0"]
    found = next((meaning for magic, meaning in MAGIC.items() if head.startswith(magic)), "")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(HTML):
        return "an HTML page and not the data; of a repository on the web, download the raw file (/resolve/ or /raw/)"
    if kind in ("csv", "tsv") and text.startswith((b'{"', b"[{", b"[\n")):
        return "JSON; name it .json or .jsonl"
    return found


def delimiter_of(line: str, usual: str) -> str:
    """Returns what separates the columns of a table's header line.

    Args:
        line: The header.
        usual: The delimiter of the file's kind; another one only where this leaves the header a single column.

    Example:
        >>> delimiter_of("prompt;chosen;rejected", ","), delimiter_of("text", ","), delimiter_of("a;b,c", ",")
        (';', ',', ',')
    """

    def columns(delimiter: str) -> int:
        return len(next(csv.reader([line], delimiter=delimiter), []))

    return usual if columns(usual) > 1 else max((usual, *DELIMITERS), key=columns)


def rows_of_json(value: Any, split: str | None, shown: str) -> list[Any]:
    """Returns the rows of a JSON file.

    A list is of rows. An object is one row, unless it holds a list of rows for each split, a list of rows beside other
    things, or columns as pandas writes them.

    Args:
        value: Content of the file.
        split: The split to take where there are several.
        shown: Name of the file for messages.

    Raises:
        UserError: if the object has no list of rows for the split, or several lists and none is of a split.
    """
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    table = _columnar(value, shown)
    if table is not None:
        return table
    parts = {} if _is_row(value) else {name: part for name, part in value.items() if _is_part(name, part)}
    if split in parts:
        return rows_of_json(parts[split], split, shown)
    if any(name in SPLITS for name in parts):
        raise UserError(f"{shown}: no split {split!r}; there are: {', '.join(parts)}")
    if len(parts) > 1:
        raise UserError(
            f"{shown}: it holds several lists of rows: {', '.join(parts)}; name the one to read as the split "
            "(--dataset_train_split, --dataset_test_split)"
        )
    return next(iter(parts.values()), [value])


def _columnar(value: Mapping[str, Any], shown: str) -> list[dict[str, Any]] | None:
    """Reads columns as pandas writes them (``orient`` columns, index, split, list); None if the object is no table."""
    values = list(value.values())
    if values and all(isinstance(part, dict) and part for part in values):
        return _by_index(value, shown)
    if not all(isinstance(column, list) and not _is_turns(column) for column in values):
        return None
    if set(value) == {"columns", "index", "data"} and all(isinstance(cells, list) for cells in value["data"]):
        return [dict(zip(map(str, value["columns"]), cells, strict=True)) for cells in value["data"]]
    if any(map(_is_rows, values)) and not _is_row(value):
        return None
    lengths = {name: len(column) for name, column in value.items()}
    if len(set(lengths.values())) > 1:
        if not _is_row(value):
            return None
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise UserError(f"{shown}: its columns have different lengths: {found}")
    return [dict(zip(value, cells, strict=True)) for cells in zip(*values, strict=True)]


def _by_index(value: Mapping[str, dict[str, Any]], shown: str) -> list[dict[str, Any]] | None:
    """Reads an object of objects: columns of cells by row number, or rows by number or name; None for any other."""
    columns = list(value.values())
    if all(map(_are_indices, columns)):
        if any(column.keys() != columns[0].keys() for column in columns):
            raise UserError(f"{shown}: its columns {', '.join(value)} do not have the same rows")
        return [{name: column[index] for name, column in value.items()} for index in columns[0]]
    are_rows = all(map(_is_row, columns)) and not _is_row(value) and not any(name in SPLITS for name in value)
    return columns if _are_indices(value) or are_rows else None


def _are_indices(names: Mapping[str, Any]) -> bool:
    return all(name.isdecimal() for name in names)


def _is_row(value: Mapping[str, Any]) -> bool:
    return any(name in value for name in ROW_COLUMNS)


def _is_part(name: str, value: Any) -> bool:
    """Returns whether a value is the rows of a split, or a list of rows under any other name."""
    return _is_rows(value) or (name in SPLITS and isinstance(value, list | dict))


def _is_rows(value: Any) -> bool:
    """Returns whether a value is a list of objects other than the turns of a chat."""
    objects = isinstance(value, list) and bool(value) and all(isinstance(entry, dict) for entry in value)
    return objects and not _is_turns(value)


def _is_turns(value: list[Any]) -> bool:
    return any(isinstance(entry, dict) and any(key in entry for key in TURN_KEYS) for entry in value)
