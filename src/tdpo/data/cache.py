"""Keeps tokenised pairs on disk under a key of all they depend on; one process makes them while others wait.

A cache entry is two files, the pairs as an Arrow file and a JSON file beside it with their report, size and checksum.
Both are written atomically, and an entry that does not match is made again. Entries can be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pyarrow as pa
import tokenizers
import transformers

from tdpo.data.formats import DataReport
from tdpo.data.sources import SourceRow, groups_of
from tdpo.data.table import SCHEMA, PairTable
from tdpo.files import atomic_write
from tdpo.types import PreferenceRecord

logger = logging.getLogger("tdpo")

VERSION = 3
"""Raised whenever the same data and options would become other ids."""
FOLDER_VARIABLE = "TDPO_CACHE"
Build = Callable[[], tuple[DataReport, Iterable[Any]]]
"""Starts to tokenise: the report, which is complete once the record batches are read."""


class PairCache:
    """A folder of tokenised pairs.

    Args:
        folder: The folder; by default ``$TDPO_CACHE``, or ``~/.cache/tdpo``.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        chosen = folder or os.environ.get(FOLDER_VARIABLE) or "~/.cache/tdpo"
        self.folder = Path(chosen).expanduser() / "pairs"

    def fetch(self, key: str, build: Build) -> tuple[PairTable, DataReport]:
        """Returns the pairs of a key, read from the cache or made.

        Of several processes that ask at once, one makes them while the rest wait and then read. A folder that cannot be
        written costs a warning, not the run: the pairs then stay in memory.
        """
        found = self._read(key)
        if found is not None:
            return found
        try:
            with self._locked(key):
                return self._read(key, quiet=True) or self._make(key, build)
        except _NotWritten as error:
            logger.warning(
                "%s: the tokenised pairs cannot be kept there (%s); the run continues without. --cache_dir or %s names "
                "another folder",
                self.folder,
                error,
                FOLDER_VARIABLE,
            )
            return in_memory(build)

    def _read(self, key: str, quiet: bool = False) -> tuple[PairTable, DataReport] | None:
        """Returns the entry of a key, or None if there is none or it is damaged."""
        about, pairs = self._about(key), self._pairs(key)
        if not about.is_file():
            return None
        try:
            entry = json.loads(about.read_text(encoding="utf-8"))
            if (entry["bytes"], entry["crc32"]) != _size_and_checksum(pairs):
                raise ValueError("its checksum is another")
            return PairTable.mapped(pairs), _report(entry["report"])
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            if not quiet:
                logger.warning("%s is damaged (%s); the pairs are tokenised again", pairs, error)
            return None

    def _make(self, key: str, build: Build) -> tuple[PairTable, DataReport]:
        partial = self._pairs(key).with_suffix(".partial")
        try:
            report, batches = build()
            with _writing():
                sink = pa.OSFile(str(partial), "wb")
                writer = pa.ipc.new_file(sink, SCHEMA)
            for batch in batches:  # an error of the iterator is the source's
                with _writing():
                    writer.write_batch(batch)
            with _writing():
                writer.close()
                sink.close()
                size, checksum = _size_and_checksum(partial)
                about = {"source": report.source, "bytes": size, "crc32": checksum, "report": vars(report)}
                partial.replace(self._pairs(key))
                atomic_write(self._about(key), json.dumps(about, indent=1) + "\n")
                return PairTable.mapped(self._pairs(key)), report
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        lock = filelock.FileLock(self._pairs(key).with_suffix(".lock"))
        with _writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0.1)
            except filelock.Timeout:
                logger.warning("another process tokenises the same pairs; waiting for it")
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _pairs(self, key: str) -> Path:
        return self.folder / f"{key}.arrow"

    def _about(self, key: str) -> Path:
        return self.folder / f"{key}.json"


def in_memory(build: Build) -> tuple[PairTable, DataReport]:
    """Makes the pairs and keeps them in memory."""
    report, batches = build()
    return PairTable(list(batches)), report


def cache_key(tokenizer: Any, spec: str, data: str, **options: Any) -> str:
    """Returns the key of pairs in the cache: the same on every process and in every run.

    Args:
        tokenizer: The transformers tokenizer, for its special tokens and chat template.
        spec: Its backend as ``tokenizer.json`` holds it.
        data: Fingerprint of the data.
        options: Whatever else decides over the ids; values that JSON can hold.
    """
    parts = {
        "version": VERSION,
        "libraries": [tokenizers.__version__, transformers.__version__],
        "tokenizer": spec,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
        "data": data,
        "options": options,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def rows_fingerprint(rows: Iterable[Any]) -> str | None:
    """Hashes rows by their content; None if JSON has no form for it, or a user's function reads them."""
    digest = hashlib.sha256()
    try:
        for spec, group in groups_of(rows):
            if spec is not None and ":" in spec.format:
                return None
            digest.update(repr(spec).encode() + b"\n")
            for row in group:
                fields: Any = vars(row) if isinstance(row, PreferenceRecord) else row
                if isinstance(row, SourceRow):
                    fields = [row.source, row.row, row.fields, row.error]
                digest.update(json.dumps(fields, sort_keys=True).encode() + b"\n")
    except (TypeError, ValueError, RecursionError):
        return None
    return digest.hexdigest()


class _NotWritten(Exception):
    """The folder cannot be written; the message is the reason."""


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Marks errors that the system raises as errors of the cache's folder."""
    try:
        yield
    except (OSError, NotImplementedError) as error:
        raise _NotWritten(getattr(error, "strerror", None) or str(error)) from error


def _size_and_checksum(path: Path) -> tuple[int, int]:
    size = checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return size, checksum


def _report(fields: dict[str, Any]) -> DataReport:
    values: Any = {name: defaultdict(list, v) if isinstance(v, dict) else v for name, v in fields.items()}
    return DataReport(**values)
