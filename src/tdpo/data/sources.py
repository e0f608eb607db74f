"""Opens sources of rows: files, folders, globs, standard input, the hub, or a mixture. Every row keeps its number."""

from __future__ import annotations

import atexit
import functools
import glob
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tdpo.config.row_spec import RowSpec
from tdpo.data.json_layouts import SPLITS
from tdpo.data.readers import READERS, Unreadable, check_kind, kind_of, read_values, table_values
from tdpo.errors import UserError, first_line

STDIN = "-"
ENTRY_FIELDS = [
    "name",
    "split",
    "config",
    *(item.name for item in fields(RowSpec) if item.name not in ("seed", "side", "best_alone")),
]
"""Fields of an entry of the option ``datasets``: what :func:`open_source` takes, and how its rows become records."""


@dataclass(frozen=True)
class SourceRow:
    """One row as it was found.

    Attributes:
        source: File or dataset, as messages name it.
        row: Number of the row, from 1: the line of a JSONL file, the data row of a table.
        fields: The row's columns by name.
        error: What made the row unreadable (then ``fields`` is empty), or an empty text.
        notes: What a format leaves out of the row while it uses the rest, for the report.
    """

    source: str
    row: int
    fields: dict[str, Any]
    error: str = ""
    notes: list[str] = field(default_factory=list, compare=False, repr=False)

    @property
    def location(self) -> str:
        """Source and row, the beginning of a message."""
        return f"{self.source}, row {self.row}"


@dataclass(frozen=True)
class Part:
    """One dataset of a source: rows that become records in one way.

    Attributes:
        read: Reads them.
        files: All that they depend on; none where that is not known.
        spec: How they become records; None leaves it to the caller of the conversion.
        split: The split that is read of files that may hold several.
    """

    read: Callable[[], Iterator[SourceRow]]
    files: Sequence[Path] = ()
    spec: RowSpec | None = None
    split: str | None = None


@dataclass(frozen=True)
class Source:
    """Rows of one dataset or of a mixture, read again by every iteration and never all in memory.

    Attributes:
        name: Its name in messages.
        parts: Its datasets.
    """

    name: str
    parts: Sequence[Part]

    def __iter__(self) -> Iterator[SourceRow]:
        for part in self.parts:
            yield from part.read()


def open_source(name: str, split: str, config: str | None = None, spec: RowSpec | None = None) -> Source:
    """Finds a dataset given by name; its rows are read when they are asked for.

    Args:
        name: A local file (``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet``, ``.arrow``, each also ``.gz``,
            ``.bz2``, ``.xz``, ``.zst``), a folder (of such files, or as ``datasets`` saves one), a glob, ``-`` for
            standard input, or the name of a dataset on the hub.
        split: Split of a hub or saved dataset. In a folder: files whose name starts with it (``train.jsonl``,
            ``train-00000.parquet``), or, where no file does and the folder holds one dataset file, that one. Of a
            JSON object with a list of rows for each split, that list. All else has no splits and is read whole.
        config: Configuration of a hub dataset.
        spec: How the rows become records; None leaves it to the caller of the conversion.

    Raises:
        UserError: naming what is missing; reading raises it for what is unreadable, with the row where there is one.
    """
    path = Path(name).expanduser()
    shown = f"{name} ({split})"
    try:
        if "[" in split and (name == STDIN or path.exists() or glob.has_magic(name)):
            raise UserError(
                f"{name}: a part of a split, as in {split!r}, exists for hub datasets alone; give a smaller file, or "
                "in --datasets a split= of its own to each hub dataset"
            )
        if name == STDIN:
            path, shown = _copied_input(int(os.environ.get("WORLD_SIZE", "1"))), "standard input"
        elif (path / "dataset_dict.json").is_file():
            if not (path / split / "state.json").is_file():
                there = ", ".join(sorted(inner.parent.name for inner in path.glob("*/state.json"))) or "none"
                raise UserError(f"{path}: no split {split!r}; there are: {there}")
            path = path / split
        if (path / "state.json").is_file():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            return Source(str(path), [Part(functools.partial(_dataset_rows, str(path), path), files, spec)])
        found = _local_files(path, name, split)
        for file in found or ():
            check_kind(file)
    except OSError as error:
        raise UserError(f"{name[:200]}: cannot be read: {error.strerror}") from error
    if found is None:
        return Source(shown, [Part(functools.partial(_dataset_rows, shown, name, split, config), spec=spec)])
    one_name = shown if name == STDIN else str(found[0]) if len(found) == 1 else ""
    read = functools.partial(_file_rows, found, split, one_name)
    chosen = split if any(kind_of(file) == "json" for file in found) else None
    return Source(one_name or name, [Part(read, found, spec, chosen)])


def groups_of(rows: Iterable[Any]) -> list[tuple[RowSpec | None, Iterable[Any]]]:
    """Returns the rows of each dataset with their specification, which is None for rows in memory."""
    return [(part.spec, part.read()) for part in rows.parts] if isinstance(rows, Source) else [(None, rows)]


def read_source(name: str, split: str) -> list[SourceRow]:
    """Reads all rows of a dataset at once; see :func:`open_source`.

    Raises:
        UserError: also if there are none.
    """
    rows = list(open_source(name, split))
    if not rows:
        raise UserError(f"{name}: no rows in it")
    return rows


def from_memory(rows: Iterable[Any], source: str) -> list[SourceRow]:
    """Numbers rows that are already in memory (a list of dictionaries or a ``datasets.Dataset``) from 1."""
    return list(_source_rows(source, enumerate(rows, 1)))


def describe(value: Any) -> str:
    """Describes a value's type and content in a few words for messages.

    Examples:
        >>> describe(17), describe(None), describe("x" * 60)
        ('the number 17', 'null', "the text 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...'")
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {value if len(value) <= 40 else value[:40] + '...'!r}" if value else "an empty text"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def _local_files(path: Path, name: str, split: str) -> list[Path] | None:
    """Returns the files that a name means, or None if it can only be a hub name."""
    if path.is_dir():
        return _files_of_folder(path, split)
    if path.exists():
        return [path]
    if glob.has_magic(name):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not found:
            raise UserError(f"{name}: no file matches")
        return found
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or kind_of(path) in READERS:
        raise UserError(f"{name}: no such file or folder")
    return None


def _files_of_folder(folder: Path, split: str) -> list[Path]:
    files: list[Path] = []
    for inner in (folder, folder / "data"):
        if not files and inner.is_dir():
            files = sorted(path for path in inner.iterdir() if path.is_file() and kind_of(path) in READERS)
    of_split = [path for path in files if re.match(re.escape(split) + r"($|[^a-zA-Z_]|_[0-9])", path.name)]
    if of_split:
        return of_split
    if len(files) == 1 and not files[0].name.startswith(SPLITS):
        return files
    names = ", ".join(path.name for path in files[:8]) or "none"
    raise UserError(f"{folder}: no file whose name starts with the split {split!r}; dataset files there: {names}")


@functools.cache
def _copied_input(processes: int) -> Path:
    """Copies standard input to a file, because rows may be read more than once; it lasts as long as the process."""
    if processes > 1:
        raise UserError("standard input cannot be read by several processes; write it to a file first")
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = Path(folder) / "standard-input.json"
    with open(copy, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return copy


def _file_rows(files: Sequence[Path], split: str, one_name: str) -> Iterator[SourceRow]:
    for path in files:
        shown = one_name or str(path)
        yield from _source_rows(shown, read_values(path, shown, split))


def _dataset_rows(
    shown: str, name: str | Path, split: str | None = None, config: str | None = None
) -> Iterator[SourceRow]:
    """Yields rows of a saved or a hub dataset, which stays on disk, in Arrow batches instead of its decoded columns."""
    import datasets

    try:
        if isinstance(name, Path):
            loaded = datasets.load_from_disk(str(name))
        else:
            loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises many kinds, all about the user's folder, name, split or network
        failed = f"dataset {name!r}: neither a local file nor loadable from the hub"
        failed = f"{name}: cannot be read as a saved dataset" if isinstance(name, Path) else failed
        raise UserError(f"{failed}: {first_line(error)}") from error
    yield from _source_rows(shown, table_values(loaded.with_format("arrow").iter(1000)))


def _source_rows(source: str, values: Iterable[tuple[int, Any]]) -> Iterator[SourceRow]:
    for number, value in values:
        if isinstance(value, dict):
            yield SourceRow(source, number, value)
        else:
            readable = not isinstance(value, Unreadable)
            error = f"expected an object with fields, found {describe(value)}" if readable else value.reason
            yield SourceRow(source, number, {}, error)
