"""Rows of one file, one after the other and numbered: JSON, JSONL, CSV, TSV, Parquet and Arrow, compressed or not."""

from __future__ import annotations

import bz2
import csv
import functools
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from tdpo.data.json_layouts import rows_of_json
from tdpo.errors import UserError, first_line

Rows = Iterator[tuple[int, Any]]
BATCH = 512
"""Rows of a table that are turned into objects at a time."""
SUFFIXES = ("gz", "bz2", "xz", "zst")
HEAD = 1024
"""Bytes that show which kind of file it is."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
FOREIGN = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file; git lfs pull fetches that",
    b"\x1f\x8b": "gzip-compressed data; decompress it or add .gz to its name",
    b"BZh91AY&SY": "bzip2-compressed data; decompress it or add .bz2 to its name",
    b"\xfd7zXZ\x00": "xz-compressed data; decompress it or add .xz to its name",
    b"\x28\xb5\x2f\xfd": "zstd-compressed data; decompress it or add .zst to its name",
    b"PK\x03\x04": "a zip archive or an Excel workbook; unpack the one, save the other as CSV in UTF-8",
    b"\xd0\xcf\x11\xe0": "an Excel workbook or another Office file; save it as CSV in UTF-8",
    b"%PDF": "a PDF document",
    b"PAR1": "a Parquet file; name it .parquet",
    b"ARROW1": "an Arrow file; name it .arrow",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
}
"""First bytes of files of other kinds, and what to do with those."""
HTML = (b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--")
EXCEL_DELIMITER = re.compile(r"sep=[,;|\t]\r?\n", re.IGNORECASE)
"""The line by which spreadsheets name the delimiter of the lines behind it."""


class Unreadable(NamedTuple):
    """Stands where a row's value would be.

    Attributes:
        reason: What is wrong with it.
        line: The line of it where that is, from 1.
    """

    reason: str
    line: int = 1


def kind_of(path: Path) -> str:
    """Returns the suffix of a file's name without that of compression: ``"jsonl"`` for ``pairs.jsonl.gz``."""
    found = re.search(rf"\.([^.]*)(\.({'|'.join(SUFFIXES)}))*$", path.name.lower())
    return found[1] if found else ""


def check_kind(path: Path) -> None:
    """Refuses a file that no reader is for, by its name, and a pointer of Git LFS.

    Raises:
        UserError: naming the known kinds, and what the file is where its first bytes show that.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD)
    foreign = _foreign_content(head, "")
    if "Git LFS" in foreign:
        raise UserError(f"{path}: it is {foreign}")
    if kind_of(path) not in READERS:
        raise UserError(
            f"{path}: cannot read files of this kind{f' (it is {foreign})' if foreign else ''}; known are "
            f"{', '.join('.' + k for k in READERS)}, also with {', '.join('.' + s for s in SUFFIXES)}"
        )


def read_values(path: Path, shown: str, split: str | None = None) -> Rows:
    """Yields the values of a file's rows with their numbers from 1.

    Args:
        path: The file; its suffix says how it is read.
        shown: What messages call it.
        split: The split to read where a JSON file holds several.

    Raises:
        UserError: if it cannot be read, naming the row where there is one.
    """
    import pyarrow

    kind, compression = kind_of(path), path.suffix.lower().removeprefix(".")
    read = functools.partial(_read_json, split=split) if kind == "json" else READERS[kind]
    try:
        if compression == "zst":
            stream = pyarrow.input_stream(str(path), compression="zstd")
            opened = cast("IO[bytes]", io.BufferedReader(cast("Any", stream)))
        else:
            openers: dict[str, Any] = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}
            opened = openers.get(compression, open)(path, "rb")
        with opened as file:
            head = file.peek(HEAD)  # type: ignore[attr-defined]
            foreign = _foreign_content(head, kind)
            if foreign:
                raise UserError(f"{shown}: it is {foreign}")
            if head.startswith(BYTE_ORDER_MARK):
                file.read(len(BYTE_ORDER_MARK))
            whole = kind in TABLES and compression in SUFFIXES  # tables are not read from one end to the other
            yield from read(io.BytesIO(file.read()) if whole else file, shown)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{shown}: not {TABLES.get(kind, kind)}: {first_line(error)}") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        raise UserError(f"{shown}: cannot be read: {first_line(error)}") from error


def table_values(batches: Iterable[Any]) -> Rows:
    """Yields rows of Arrow record batches or tables as objects."""
    number = 0
    for batch in batches:
        batch.validate(full=True)  # without it offsets that a damaged file holds are followed into foreign memory
        for start in range(0, batch.num_rows, BATCH):
            for value in batch.slice(start, BATCH).to_pylist():
                number += 1
                yield number, value


def _foreign_content(head: bytes, kind: str) -> str:
    """Returns what a file holds, and what to do, if its first bytes show another kind than its name; else ""."""
    text = head.removeprefix(BYTE_ORDER_MARK).lstrip().lower()
    if text.startswith(HTML):
        return "an HTML page and not the data; of a repository on the web, download the raw file (/resolve/ or /raw/)"
    if kind in ("csv", "tsv") and text.startswith((b'{"', b"[{", b"[\n")):
        return "JSON; name it .json or .jsonl"
    if kind in READERS and kind not in TABLES and b"\0" in head[:2]:
        return FOREIGN[b"\xff\xfe"]
    found = next((meaning for magic, meaning in FOREIGN.items() if head.startswith(magic)), "")
    return "" if found.endswith(f".{kind}") else found


def _read_json(file: IO[bytes], shown: str, split: str | None = None) -> Rows:
    """Reads an object a line, or one JSON value over one line or several.

    Args:
        file: The file.
        shown: What messages call it.
        split: The split to read of an object that holds several; None takes an object for a row, whatever it holds.
    """
    lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
    number, first = next(lines, (0, b""))
    value = _parse(first)
    if not first:
        return
    if not isinstance(value, dict):
        content = first + file.read()
        value = _parse(content)
        if not isinstance(value, Unreadable):
            yield from enumerate(rows_of_json(value, split, shown), 1)
        elif first.lstrip().startswith(b"[") or first.strip() == b"{":
            raise UserError(f"{shown}, line {number + value.line - 1}: {value.reason}")
        else:
            rest = enumerate(content.splitlines(), number)
            yield from ((place, _parse(line)) for place, line in rest if line.strip())
        return
    second = next(lines, None)
    rows = [value] if second or split is None else rows_of_json(value, split, shown)
    yield from [(number, value)] if rows == [value] else enumerate(rows, 1)
    for place, line in itertools.chain([second] if second else [], lines):
        yield place, _parse(line)


def _parse(content: bytes) -> Any:
    """Parses JSON; returns the reason as :class:`Unreadable` where it cannot."""
    try:
        return _DECODER.decode(content.decode("utf-8"))
    except json.JSONDecodeError as error:
        return Unreadable(f"not valid JSON: {error.msg} at character {error.colno}", error.lineno)
    except UnicodeDecodeError as error:
        before = content[: error.start]
        position = len(before) - before.rfind(b"\n")
        reason = f"not UTF-8 text: byte {content[error.start]:#04x} at position {position}"
        return Unreadable(reason, before.count(b"\n") + 1)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end, twice a key
        return Unreadable(f"not readable JSON: {error}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object, and refuses a repeated key, of whose values one would be lost."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _read_csv(file: IO[bytes], shown: str, delimiter: str = ",") -> Rows:
    """Reads a table as text, under another delimiter where its own leaves the header a single column."""
    csv.field_size_limit(2**31 - 1)
    lines = _decoded(file, shown)
    first = next(lines, "")
    if EXCEL_DELIMITER.fullmatch(first):
        delimiter, first = first[4], next(lines, "")

    def columns(separator: str) -> int:
        return len(next(csv.reader([first], delimiter=separator), []))

    if columns(delimiter) <= 1:
        delimiter = max((delimiter, *",;\t|"), key=columns)
    number = 0
    try:
        reader = csv.DictReader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
        header = list(reader.fieldnames or [])
        _check_names(header, shown)
        for number, fields in enumerate(reader, 1):
            if None in fields or None in fields.values():
                yield number, Unreadable(f"not as many cells as the header has columns ({len(header)})")
            else:
                yield number, fields
    except csv.Error as error:
        raise UserError(f"{shown}, row {number + 1}: not valid CSV: {error}; is a quotation mark missing?") from error


def _decoded(file: IO[bytes], shown: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{shown}, line {number}: not UTF-8 text: byte {line[error.start]:#04x}; save it as UTF-8"
            ) from error


def _read_table(file: IO[bytes], shown: str) -> Rows:
    """Reads a Parquet file, an Arrow file, or the Arrow stream that ``datasets`` writes."""
    import pyarrow.parquet

    magic = file.read(6)
    file.seek(0)
    table: Any
    if magic == b"ARROW1":
        table = pyarrow.ipc.open_file(file)
        schema, batches = table.schema, map(table.get_batch, range(table.num_record_batches))
    elif magic.startswith(b"PAR1"):
        table = pyarrow.parquet.ParquetFile(file)
        schema, batches = table.schema_arrow, table.iter_batches(batch_size=BATCH)
    else:
        table = batches = pyarrow.ipc.open_stream(file)
        schema = table.schema
    _check_names(schema.names, shown)
    yield from table_values(batches)


def _check_names(names: list[str], shown: str) -> None:
    if len(set(names)) < len(names):
        raise UserError(f"{shown}: a column name stands twice: {', '.join(names)}")


TABLES = {"parquet": "a Parquet file", "arrow": "an Arrow file"}
READERS: dict[str, Callable[[IO[bytes], str], Rows]] = {
    "jsonl": _read_json,
    "ndjson": _read_json,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": functools.partial(_read_csv, delimiter="\t"),
    "parquet": _read_table,
    "arrow": _read_table,
}
