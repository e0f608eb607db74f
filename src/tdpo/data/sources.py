"""Opens sources of rows: files, folders, globs, standard input, the hub, or a mixture. Every row keeps its number."""

from __future__ import annotations

import functools
import glob
import hashlib
import itertools
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tdpo.config.row_spec import RowSpec, parse_columns, parse_json, parse_names
from tdpo.data.dialects import SPLITS
from tdpo.data.readers import READERS, Unreadable, first_line, kind_of, read_values, table_values
from tdpo.errors import UserError

STDIN = "-"


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
class Source:
    """Rows of a dataset, read again by every iteration and never all in memory.

    Attributes:
        name: Its name in messages.
        parts: The files or datasets that hold its rows, in their order.
    """

    name: str
    parts: tuple[Part, ...]

    def __iter__(self) -> Iterator[SourceRow]:
        for part in self.parts:
            yield from part.read()

    def read_by(self, spec: RowSpec) -> Source:
        """Returns the same rows, to be converted as one specification says."""
        return Source(self.name, tuple(replace(part, spec=spec) for part in self.parts))

    def fingerprint(self) -> str | None:
        """Hashes the files and specifications; None for the hub, and where code of the user's converts the rows."""
        digest = hashlib.sha256(self.name.encode("utf-8", "surrogatepass"))
        for part in self.parts:
            if not part.files or (part.spec is not None and ":" in part.spec.format):
                return None
            digest.update(f"\n{part.spec}\n{part.split}".encode("utf-8", "surrogatepass"))
            for path in part.files:
                try:
                    with open(path, "rb") as file:
                        digest.update(f"\n{path}\n".encode("utf-8", "surrogatepass"))
                        digest.update(hashlib.file_digest(file, "sha256").digest())
                except OSError:
                    return None
        return digest.hexdigest()


@dataclass(frozen=True)
class Part:
    """Rows that are read together.

    Attributes:
        read: Reads them.
        files: All that they depend on; none where that is not known.
        spec: How they become records; None leaves it to the caller of the conversion.
        split: The split that is read of files that may hold several.
    """

    read: Callable[[], Iterator[SourceRow]]
    files: tuple[Path, ...] = ()
    spec: RowSpec | None = None
    split: str | None = None


@dataclass(frozen=True)
class MixedDataset:
    """One dataset of a mixture, as the option ``datasets`` lists it.

    Attributes:
        name: As ``dataset_name``.
        weight: How often each of its records is seen in an epoch; 0.5 takes a seeded half.
        split: As ``dataset_train_split``.
        config: As ``dataset_config``.
        format: As ``dataset_format``.
        columns: As the option of that name.
        ignore_columns: As the option of that name.
        pairs_from: As the option of that name.
        min_margin: As the option of that name.
        min_score_ratio: As the option of that name.
        truncation_mode: As the option of that name.
    """

    name: str
    weight: float = 1.0
    split: str | None = None
    config: str | None = None
    format: str = "auto"
    columns: str | Mapping[str, str] | None = None
    ignore_columns: str | list[str] | None = None
    pairs_from: Any = None
    min_margin: float | None = None
    min_score_ratio: float | None = None
    truncation_mode: Any = None

    def spec(self, seed: int) -> RowSpec:
        """Returns how its rows become records."""
        names = {item.name for item in fields(RowSpec)} & vars(self).keys()
        columns, ignored = parse_columns(self.columns), parse_names(self.ignore_columns)
        given = {name: getattr(self, name) for name in names}
        return RowSpec(**{**given, "columns": columns, "ignore_columns": ignored, "seed": seed})


def open_source(name: str, split: str, config: str | None = None) -> Source:
    """Finds a dataset given by name; its rows are read when they are asked for.

    Args:
        name: A local file (``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet``, ``.arrow``, each also ``.gz``,
            ``.bz2``, ``.xz``, ``.zst``), a folder (of such files, or as ``datasets`` saves one), a glob, ``-`` for
            standard input, or the name of a dataset on the hub.
        split: Split of a hub or saved dataset. In a folder: files whose name starts with it (``train.jsonl``,
            ``train-00000.parquet``), or, where no file does and the folder holds one dataset file, that one. Of a
            JSON object with a list of rows for each split, that list. All else has no splits and is read whole.
        config: Configuration of a hub dataset.

    Raises:
        UserError: naming what is missing; reading raises it for what is unreadable, with the row where there is one.
    """
    try:
        return _open(name, split, config)
    except OSError as error:
        raise UserError(f"{name[:200]}: cannot be read: {error.strerror}") from error


def _open(name: str, split: str, config: str | None) -> Source:
    if name == STDIN:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("standard input cannot be read by several processes; write it to a file first")
        path = Path(_copied_input().name) / "standard-input.json"
        return Source("standard input", (_file_part(path, "standard input", split),))
    saved = _saved_folder(Path(name).expanduser(), split)
    if saved is not None:
        files = tuple(sorted(path for path in saved.rglob("*") if path.is_file()))
        return Source(str(saved), (Part(functools.partial(_saved_rows, saved), files),))
    paths = _local_paths(name, split)
    if paths is None:
        return Source(f"{name} ({split})", (Part(functools.partial(_hub_rows, name, split, config)),))
    for path in paths:
        if path.is_file() and kind_of(path) not in READERS:
            next(read_values(path))  # raises, naming the known kinds
    shown = str(paths[0]) if len(paths) == 1 else name
    return Source(shown, tuple(_file_part(path, str(path), split) for path in paths))


def groups_of(rows: Iterable[Any]) -> Iterator[tuple[RowSpec | None, Iterable[Any]]]:
    """Yields the rows that share a specification, with it; None where a source names none, and for rows in memory."""
    if not isinstance(rows, Source):
        yield None, rows
        return
    for _, parts in itertools.groupby(rows.parts, key=lambda part: id(part.spec)):
        together = tuple(parts)
        yield together[0].spec, Source(rows.name, together)


def read_source(name: str, split: str, config: str | None = None) -> list[SourceRow]:
    """Reads all rows of a dataset at once; see :func:`open_source`.

    Raises:
        UserError: also if there are none.
    """
    rows = list(open_source(name, split, config))
    if not rows:
        raise UserError(f"{name}: no rows in it")
    return rows


def open_mixture(datasets: Sequence[Any], split: str, with_options: Callable[[RowSpec], RowSpec], seed: int) -> Source:
    """Opens several datasets as one source, each with its own specification.

    Args:
        datasets: Mappings with the fields of :class:`MixedDataset`, or texts: a JSON object, or
            ``name,field=value,...``.
        split: Split of those that name none.
        with_options: Changes the specification of each, such as taking one side of a split.
        seed: Seed of weights that are not whole numbers.

    Raises:
        UserError: naming the entry and what is wrong with it.
    """
    if not datasets:
        raise UserError("--datasets names no dataset")
    opened = []
    for number, entry in enumerate(datasets, 1):
        known = mixed_dataset(entry, number)
        try:
            spec = with_options(known.spec(seed))
        except UserError as error:
            raise UserError(f"--datasets, entry {number} ({known.name}): {error}") from error
        opened.append(open_source(known.name, known.split or split, known.config).read_by(spec))
    parts = [part for source in opened for part in source.parts]
    return Source(" + ".join(source.name for source in opened), tuple(parts))


def mixed_dataset(entry: Any, number: int) -> MixedDataset:
    """Parses one entry of the option ``datasets``.

    Example:
        >>> mixed_dataset("pairs.jsonl,weight=0.5,format=hh", 1).weight
        0.5

    Raises:
        UserError: naming the entry, the unknown field and the nearest known one.
    """
    where = f"--datasets, entry {number}"
    content = _entry_fields(entry, where)
    kinds = {item.name: item.type for item in fields(MixedDataset)}
    for key in content:
        if key not in kinds:
            from tdpo.counterparts import ENTRY_SPELLINGS, hint

            raise UserError(f"{where}: unknown field {key!r}.{hint(str(key), kinds, ENTRY_SPELLINGS)}")
    if not isinstance(content.get("name"), str) or not content["name"]:
        raise UserError(f"{where}: no name; expected a file, folder, glob or hub name in its field 'name'")
    for key, value in content.items():
        if "float" in str(kinds[key]) and value is not None:
            content[key] = _entry_number(value, f"{where}: {key}")
        elif key not in ("columns", "ignore_columns") and value is not None and not isinstance(value, str):
            raise UserError(f"{where}: {key} must be a text, found {describe(value)}")
    return MixedDataset(**content)


def from_memory(rows: Iterable[Any], source: str) -> list[SourceRow]:
    """Numbers rows that are already in memory (a list of dictionaries or a ``datasets.Dataset``) from 1."""
    return [_source_row(source, number, fields) for number, fields in enumerate(rows, 1)]


def describe(value: Any) -> str:
    """Describes a value's type and content in a few words for messages.

    Example:
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


def _entry_fields(entry: Any, where: str) -> dict[str, Any]:
    if isinstance(entry, MixedDataset):
        return {item.name: getattr(entry, item.name) for item in fields(entry)}
    if isinstance(entry, Mapping):
        return dict(entry)
    if not isinstance(entry, str):
        raise UserError(f"{where}: expected an object or a text, found {describe(entry)}")
    if entry.lstrip().startswith("{"):
        return dict(parse_json(entry, f"{where}:", UserError))
    name, *rest = entry.split(",")
    parts = [part.partition("=") for part in rest]
    for key, equals, _ in parts:
        if not equals:
            raise UserError(f"{where}: expected name,field=value,..., found {key!r} without a value")
        if [other.strip() for other, _, _ in parts].count(key.strip()) > 1:
            raise UserError(f"{where}: {key.strip()} stands twice")
    return {"name": name, **{key.strip(): value.strip() for key, _, value in parts}}


def _entry_number(value: Any, what: str) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{what} must be a number, found {describe(value)}") from error


def _local_paths(name: str, split: str) -> list[Path] | None:
    """Returns the files that ``name`` means, or None if it can only be a hub name."""
    path = Path(name).expanduser()
    if path.is_dir():
        return _files_of_folder(path, split)
    if path.exists():
        return [path]
    if glob.has_magic(name):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not found:
            raise UserError(f"{name}: no file matches")
        return found
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if looks_local or kind_of(path) in READERS:
        raise UserError(f"{name}: no such file or folder")
    return None


def _files_of_folder(folder: Path, split: str) -> list[Path]:
    def readable(path: Path) -> bool:
        return path.is_file() and kind_of(path) in READERS

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


def _file_part(path: Path, shown: str, split: str) -> Part:
    read = functools.partial(_file_rows, path, shown, split)
    return Part(read, (path,), split=split if kind_of(path) == "json" else None)


def _file_rows(path: Path, shown: str, split: str) -> Iterator[SourceRow]:
    return (_source_row(shown, number, value) for number, value in read_values(path, shown, split))


@functools.cache
def _copied_input() -> tempfile.TemporaryDirectory[str]:
    """Copies standard input to a file, because rows may be read more than once; it lasts as long as the process."""
    folder = tempfile.TemporaryDirectory()
    with open(Path(folder.name) / "standard-input.json", "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return folder


def _saved_folder(folder: Path, split: str) -> Path | None:
    """Returns the folder of a split as ``datasets`` saves it to disk, or None if this is another folder."""
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return folder
    if not (folder / "dataset_dict.json").is_file():
        return None
    if not (folder / split / "state.json").is_file():
        there = ", ".join(sorted(path.parent.name for path in folder.glob("*/state.json"))) or "none"
        raise UserError(f"{folder}: no split {split!r}; there are: {there}")
    return folder / split


def _saved_rows(folder: Path) -> Iterator[SourceRow]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises many kinds, all of them about what is in the folder
        raise UserError(f"{folder}: cannot be read as a saved dataset: {first_line(error)}") from error
    yield from _dataset_rows(loaded, str(folder))


def _hub_rows(name: str, split: str, config: str | None) -> Iterator[SourceRow]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises many kinds, all of them about the user's name, split or network
        raise UserError(
            f"dataset {name!r}: neither a local file nor loadable from the hub: {first_line(error)}"
        ) from error
    yield from _dataset_rows(loaded, f"{name} ({split})")


def _dataset_rows(loaded: Any, shown: str) -> Iterator[SourceRow]:
    """Yields rows of a ``datasets.Dataset``, which stays on disk; batches are Arrow's, not its own decoded columns."""
    tables = loaded.with_format("arrow").iter(1000)
    return (_source_row(shown, number, value) for number, value in table_values(tables))


def _source_row(source: str, number: int, value: Any) -> SourceRow:
    if isinstance(value, dict):
        return SourceRow(source, number, value)
    error = str(value) if isinstance(value, Unreadable) else f"expected an object with fields, found {describe(value)}"
    return SourceRow(source, number, {}, error)
