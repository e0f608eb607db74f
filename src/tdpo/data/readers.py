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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from tdpo.data.dialects import delimiter_of, foreign_content, rows_of_json
from tdpo.errors import UserError

Rows = Iterator[tuple[int, Any]]
BATCH = 512
"""Rows of a table that are turned into objects at a time."""
SUFFIXES = ("gz", "bz2", "xz", "zst")
HEAD = 1024
"""Bytes that show which kind of file it is."""
EXCEL_DELIMITER = re.compile(r"sep=[,;|\t]\r?\n", re.IGNORECASE)
"""The line by which spreadsheets name the delimiter of the lines behind it."""


class Unreadable(str):
    """Stands where a row's value would be, and says why there is none."""


def kind_of(path: Path) -> str:
    """Returns the suffix of a file's name without that of compression: ``"jsonl"`` for ``pairs.jsonl.gz``."""
    name = path.name.lower()
    for suffix in SUFFIXES:
        name = name.removesuffix("." + suffix)
    return name.rpartition(".")[2] if "." in name else ""


def read_values(path: Path, shown: str | None = None, split: str | None = None) -> Rows:
    """Yields the values of a file's rows with their numbers from 1.

    Args:
        path: The file; its suffix says how it is read.
        shown: What messages call it.
        split: The split to read where a JSON file holds several.

    Raises:
        UserError: if it cannot be read, naming the row where there is one.
    """
    shown, kind = shown or str(path), kind_of(path)
    if kind not in READERS:
        raise UserError(
            f"{shown}: cannot read files of this kind{_foreign_hint(path)}; known are "
            f"{', '.join('.' + k for k in READERS)}, also with {', '.join('.' + s for s in SUFFIXES)}"
        )
    read = functools.partial(_read_json, split=split) if kind == "json" else READERS[kind]
    import pyarrow

    try:
        with open(path, "rb") as plain:
            if plain.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(f"{shown}: it is a pointer of Git LFS, not the file; git lfs pull fetches that")
        with _open(path) as file:
            foreign = foreign_content(file.peek(HEAD), kind)  # type: ignore[attr-defined]
            if foreign:
                raise UserError(f"{shown}: it is {foreign}")
            yield from read(file, shown)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{shown}: not {NAMES.get(kind, kind)}: {first_line(error)}") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        raise UserError(f"{shown}: cannot be read: {first_line(error)}") from error


def table_values(batches: Iterator[Any]) -> Rows:
    """Yields rows of Arrow record batches or tables as objects."""
    number = 0
    for batch in batches:
        batch.validate(full=True)  # without it offsets that a damaged file holds are followed into foreign memory
        for start in range(0, batch.num_rows, BATCH):
            for value in batch.slice(start, BATCH).to_pylist():
                number += 1
                yield number, value


def _foreign_hint(path: Path) -> str:
    with open(path, "rb") as file:
        found = foreign_content(file.read(HEAD), "")
    return f" (it is {found})" if found else ""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its type."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def _open(path: Path) -> IO[bytes]:
    """Opens a file's bytes, decompressed."""
    suffix = path.suffix.lower().removeprefix(".")
    if suffix == "zst":
        import pyarrow

        return cast("IO[bytes]", io.BufferedReader(cast("Any", pyarrow.input_stream(str(path), compression="zstd"))))
    openers: dict[str, Any] = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}
    return openers.get(suffix, open)(path, "rb")


def _lines(file: IO[bytes], shown: str) -> Iterator[bytes]:
    """Yields lines without a byte order mark."""
    for number, line in enumerate(file):
        if number == 0:
            if line.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in line[:2]:
                raise UserError(f"{shown}: it is UTF-16 text; save it as UTF-8")
            line = line.removeprefix(b"\xef\xbb\xbf")
        yield line


def _read_jsonl(file: IO[bytes], shown: str) -> Rows:
    """Reads an object a line, or a list of objects over one line or several."""
    lines = ((number, line) for number, line in enumerate(_lines(file, shown), 1) if line.strip())
    number, first = next(lines, (0, b""))
    if first.lstrip()[:1] == b"[" or first.strip() == b"{":
        yield from _whole(number, first, file, shown, lambda value: value if isinstance(value, list) else [value])
        return
    for place, line in itertools.chain([(number, first)] if first else [], lines):
        yield place, _value(line)


def _value(line: bytes) -> Any:
    """Parses one line of JSON; returns the reason as :class:`Unreadable` where it cannot."""
    try:
        return _DECODER.decode(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        return Unreadable(f"not valid JSON: {error.msg} at character {error.pos + 1}")
    except UnicodeDecodeError as error:
        return Unreadable(f"not UTF-8 text: byte {error.object[error.start]:#04x} at position {error.start + 1}")
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


def _read_json(file: IO[bytes], shown: str, split: str | None = None) -> Rows:
    """Reads one value in any of the layouts of :func:`~tdpo.data.dialects.rows_of_json`, or an object a line."""
    lines = ((number, line) for number, line in enumerate(_lines(file, shown), 1) if line.strip())
    number, first = next(lines, (0, b""))
    if not first:
        return
    rows_of = functools.partial(rows_of_json, split=split, shown=shown)
    value = _value(first)
    if isinstance(value, Unreadable | list):
        yield from _whole(number, first, file, shown, rows_of)
        return
    second = next(lines, None)
    if second is None:
        rows = rows_of(value)
        yield from [(number, value)] if rows == [value] else enumerate(rows, 1)
        return
    yield number, value
    for number, line in itertools.chain([second], lines):
        yield number, _value(line)


def _whole(number: int, first: bytes, file: IO[bytes], shown: str, rows_of: Callable[[Any], list[Any]]) -> Rows:
    """Yields the rows of a file that is one JSON value over several lines, or else an object a line after all.

    Args:
        number: Number of the first line that is not blank.
        first: That line.
        file: The file behind it.
        shown: What messages call it.
        rows_of: Returns the rows of the value.
    """
    content = first + file.read()
    try:
        value = _DECODER.decode(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + number
        raise UserError(
            f"{shown}, line {line}: not UTF-8 text: byte {content[error.start]:#04x}; save it as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        if first.lstrip()[:1] == b"[":
            line = error.lineno + number - 1
            raise UserError(f"{shown}, line {line}: not valid JSON: {error.msg}") from error
        lines = enumerate(content.splitlines(), number)
        yield from ((place, _value(line)) for place, line in lines if line.strip())
        return
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shown}: not readable JSON: {error}") from error
    yield from enumerate(rows_of(value), 1)


def _read_csv(file: IO[bytes], shown: str, delimiter: str = ",") -> Rows:
    csv.field_size_limit(2**31 - 1)
    lines = _decoded(file, shown)
    first = next(lines, "")
    if EXCEL_DELIMITER.fullmatch(first):
        delimiter, first = first[4], next(lines, "")
    number = 0
    try:
        reader = csv.DictReader(itertools.chain([first], lines), delimiter=delimiter_of(first, delimiter), strict=True)
        header = list(reader.fieldnames or [])
        if len(set(header)) < len(header):
            raise UserError(f"{shown}: a column name stands twice in the header: {', '.join(header)}")
        for number, fields in enumerate(reader, 1):
            if None in fields or None in fields.values():
                yield number, Unreadable(f"not as many cells as the header has columns ({len(header)})")
            else:
                yield number, dict(fields)
    except csv.Error as error:
        raise UserError(f"{shown}, row {number + 1}: not valid CSV: {error}; is a quotation mark missing?") from error


def _decoded(file: IO[bytes], shown: str) -> Iterator[str]:
    for number, line in enumerate(_lines(file, shown), 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{shown}, line {number}: not UTF-8 text: byte {line[error.start]:#04x}; save it as UTF-8"
            ) from error


def _read_parquet(file: IO[bytes], shown: str) -> Rows:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(pyarrow.PythonFile(_seekable(file), mode="r"))
    _check_names(table.schema_arrow.names, shown)
    yield from table_values(table.iter_batches(batch_size=BATCH))


def _read_arrow(file: IO[bytes], shown: str) -> Rows:
    """Reads an Arrow file, or the stream of one that ``datasets`` writes."""
    import pyarrow

    seekable = _seekable(file)
    is_file = seekable.read(6) == b"ARROW1"
    seekable.seek(0)
    source = pyarrow.PythonFile(seekable, mode="r")
    if is_file:
        table = pyarrow.ipc.open_file(source)
        batches = (table.get_batch(i) for i in range(table.num_record_batches))
    else:
        table = pyarrow.ipc.open_stream(source)
        batches = iter(table)
    _check_names(table.schema.names, shown)
    yield from table_values(batches)


def _seekable(file: IO[bytes]) -> IO[bytes]:
    """Returns a file on disk as it is, and the content of a compressed one in memory."""
    on_disk = isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO)
    return file if on_disk else io.BytesIO(file.read())


def _check_names(names: list[str], shown: str) -> None:
    if len(set(names)) < len(names):
        raise UserError(f"{shown}: a column name stands twice: {', '.join(names)}")


READERS: dict[str, Callable[[IO[bytes], str], Rows]] = {
    "jsonl": _read_jsonl,
    "ndjson": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": functools.partial(_read_csv, delimiter="\t"),
    "parquet": _read_parquet,
    "arrow": _read_arrow,
}
NAMES = {"parquet": "a Parquet file", "arrow": "an Arrow file"}
LFS_POINTER = b"version https://git-lfs"
