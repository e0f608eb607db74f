"""Where rows come from: a local file, a folder or a glob, or a dataset of the hub. Every row keeps its number."""

from __future__ import annotations

import csv
import glob
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from tdpo.errors import UserError

SPLITS = ("train", "test", "eval", "validation", "dev")
"""A lone file of a folder stands for any split, unless its name says which one it is."""


@dataclass(frozen=True)
class SourceRow:
    """One row as it was found.

    Attributes:
        source: File or dataset, as messages name it.
        row: Number of the row, from 1: the line of a JSONL file, the data row of a table.
        fields: The row's columns by name.
        error: What made the row unreadable (then ``fields`` is empty), or an empty text.
    """

    source: str
    row: int
    fields: dict[str, Any]
    error: str = ""

    @property
    def place(self) -> str:
        """Source and row, for the beginning of a message."""
        return f"{self.source}, row {self.row}"


def read_source(name: str, split: str, config: str | None = None) -> list[SourceRow]:
    """Reads all rows of a dataset given by name.

    Args:
        name: A local file (``.jsonl``, ``.json``, ``.csv``, ``.parquet``, each also ``.gz``), a folder, a glob, or the
            name of a dataset on the hub.
        split: Split of a hub dataset. In a folder: files whose name starts with it (``train.jsonl``,
            ``train-00000.parquet``), or, where no file does and the folder holds one dataset file, that one. A single
            file or a glob has no splits and is read whole.
        config: Configuration of a hub dataset.

    Raises:
        UserError: naming what is missing or unreadable, with the row where there is one.
    """
    paths = _local_paths(name, split)
    if paths is None:
        return _hub_rows(name, split, config)
    rows = [row for path in paths for row in read_file(path)]
    if not rows:
        raise UserError(f"{name}: no rows in it")
    return rows


def read_file(path: Path) -> list[SourceRow]:
    """Reads one local file by its suffix."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if kind not in READERS:
        raise UserError(f"{path}: cannot read files of this kind; known are {', '.join('.' + k for k in READERS)}")
    try:
        return [_source_row(str(path), number, value) for number, value in READERS[kind](path)]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def from_memory(rows: Iterable[Any], source: str) -> list[SourceRow]:
    """Numbers rows that are already in memory (a list of dictionaries or a ``datasets.Dataset``) from 1."""
    return [_source_row(source, number, fields) for number, fields in enumerate(rows, 1)]


def describe(value: Any) -> str:
    """A short name of a value's type and content for messages.

    Example:
        >>> describe(17), describe(None), describe("x" * 60)
        ('the number 17', 'null', "the text 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...'")
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {value if len(value) <= 40 else value[:40] + '...'!r}" if value else "an empty text"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def _local_paths(name: str, split: str) -> list[Path] | None:
    """The files ``name`` means, or None if it can only be a hub name."""
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _files_of_folder(path, split)
    if glob.has_magic(name):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        if not found:
            raise UserError(f"{name}: no file matches")
        return found
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if looks_local or path.name.removesuffix(".gz").rpartition(".")[2].lower() in READERS:
        raise UserError(f"{name}: no such file or folder")
    return None


def _files_of_folder(folder: Path, split: str) -> list[Path]:
    def readable(path: Path) -> bool:
        return path.is_file() and path.name.removesuffix(".gz").rpartition(".")[2].lower() in READERS

    files = sorted(path for path in folder.iterdir() if readable(path))
    if not files and (folder / "data").is_dir():
        files = sorted(path for path in (folder / "data").iterdir() if readable(path))
    of_split = [path for path in files if re.match(re.escape(split) + r"($|[^a-zA-Z_]|_[0-9])", path.name)]
    if of_split:
        return of_split
    if len(files) == 1 and not files[0].name.startswith(SPLITS):
        return files
    names = ", ".join(path.name for path in files[:8]) or "none"
    raise UserError(f"{folder}: no file whose name starts with the split {split!r}; dataset files there: {names}")


def _hub_rows(name: str, split: str, config: str | None) -> list[SourceRow]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises many kinds, all of them about the user's name, split or network
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"dataset {name!r}: neither a local file nor loadable from the hub: {reason}") from error
    return from_memory(cast("Iterable[Any]", loaded), f"{name} ({split})")


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


class _Unreadable(str):
    """Stands where a row's value would be, and says why there is none."""


def _source_row(source: str, number: int, value: Any) -> SourceRow:
    if isinstance(value, dict):
        return SourceRow(source, number, value)
    error = str(value) if isinstance(value, _Unreadable) else f"expected an object with fields, found {describe(value)}"
    return SourceRow(source, number, {}, error)


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with _open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                yield number, _Unreadable(f"not valid JSON: {error.msg} at character {error.pos + 1}")
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nesting without end
                yield number, _Unreadable(f"not readable JSON: {error}")


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """A JSON file holds a list of objects; one that holds an object a line is read as JSONL."""
    with _open_text(path) as file:
        first = file.read(4096).lstrip()[:1]
    if first != "[":
        yield from _read_jsonl(path)
        return
    with _open_text(path) as file:
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error
    yield from enumerate(rows, 1)


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)
    with _open_text(path) as file:
        reader = csv.DictReader(file, strict=True)
        header = list(reader.fieldnames or [])
        if len(set(header)) < len(header):
            raise UserError(f"{path}: a column name stands twice in the header: {', '.join(header)}")
        number = 0
        try:
            for number, fields in enumerate(reader, 1):
                if None in fields or None in fields.values():
                    yield number, _Unreadable(f"not as many cells as the header has columns ({len(header)})")
                else:
                    yield number, dict(fields)
        except csv.Error as error:
            raise UserError(
                f"{path}, row {number + 1}: not valid CSV: {error}; is a quotation mark missing?"
            ) from error


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            table = pyarrow.parquet.read_table(pyarrow.BufferReader(file.read()))
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file: {error}") from error
    yield from enumerate(table.to_pylist(), 1)


READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
}
