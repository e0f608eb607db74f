"""Keeps tokenised pairs on disk under a key of all they depend on; one process makes them while others wait.

A cache entry is two files: the pairs as an Arrow file, and a JSON file with their checksum and report. Both are written
atomically, and an entry that does not match is made again. Entries can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import filelock
import pyarrow as pa
import tokenizers
import transformers

from tdpo.config.row_spec import RowSpec
from tdpo.data.formats import DataReport, OnBadRow, name_of
from tdpo.data.sources import Part, Source, SourceRow
from tdpo.data.table import SCHEMA
from tdpo.data.tokenise import Tokeniser
from tdpo.files import atomic_write

logger = logging.getLogger("tdpo")

VERSION = 6
"""Raised whenever the same data and options would become other ids."""
Build = Callable[[], tuple[DataReport, Iterable[Any]]]
"""Starts to tokenise: the report, which is complete once the record batches are read."""


def cached_pairs(folder: Path, key: str, build: Build) -> tuple[Path | pa.Table, DataReport]:
    """Returns the pairs of a key, read from the cache or made, and their report.

    Of several processes that ask at once, one makes the pairs while the rest wait and then read. A folder that cannot
    be written costs a warning, not the run: the pairs then stay in memory.

    Args:
        folder: The folder of the cache.
        key: What :func:`cache_key` returns.
        build: Makes the pairs.
    """
    try:
        return _read(folder / key) or _make(folder / key, build)
    except (OSError, NotImplementedError) as error:
        logger.warning(
            "%s: the tokenised pairs cannot be kept there (%s); the run continues without. --cache_dir or TDPO_CACHE "
            "names another folder",
            folder,
            getattr(error, "strerror", None) or error,
        )
        return in_memory(build)


def in_memory(build: Build) -> tuple[pa.Table, DataReport]:
    """Makes the pairs and keeps them in memory."""
    report, batches = build()
    return pa.Table.from_batches(batches, SCHEMA), report


def cache_key(rows: Source | list[Any], tokeniser: Tokeniser, spec: RowSpec, on_bad_row: OnBadRow) -> str | None:
    """Returns the key of tokenised rows, the same in every process and run; None if they depend on anything unknown."""
    data, tokenizer = fingerprint(rows), tokeniser.tokenizer
    if data is None or tokeniser.encode.spec is None or ":" in spec.format:
        return None
    parts = {
        "version": [VERSION, tokenizers.__version__, transformers.__version__],
        "tokenizer": tokeniser.encode.spec,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
        "data": [name_of(rows), data, repr(spec), on_bad_row],
        "options": [vars(tokeniser.lengths), vars(tokeniser.rendering)],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def fingerprint(rows: Source | list[Any]) -> str | None:
    """Hashes how rows are read and the files they are read from, or else the rows themselves.

    Returns:
        The hash; None if JSON has no form for the rows, or code of the user's converts them.
    """
    digest = hashlib.sha256()
    try:
        for part in rows.parts if isinstance(rows, Source) else [Part(rows.__iter__)]:
            if part.spec is not None and ":" in part.spec.format:
                return None
            digest.update(f"\n{part.spec}\n{part.split}\n".encode("utf-8", "surrogatepass"))
            for path in part.files:
                with open(path, "rb") as file:
                    digest.update(f"{path}\n".encode("utf-8", "surrogatepass"))
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            for row in () if part.files else part.read():
                content: Any = vars(row)
                if isinstance(row, SourceRow):
                    content = [row.source, row.row, row.fields, row.error]
                digest.update(json.dumps(content, sort_keys=True).encode() + b"\n")
    except (OSError, TypeError, ValueError, RecursionError):
        return None
    return digest.hexdigest()


def _read(entry: Path) -> tuple[Path, DataReport] | None:
    """Returns the entry, or None if there is none or it is damaged."""
    pairs, about = entry.with_suffix(".arrow"), entry.with_suffix(".json")
    if not about.is_file():
        return None
    try:
        known = json.loads(about.read_text(encoding="utf-8"))
        if known["crc32"] != _checksum(pairs):
            raise ValueError("its checksum is another")
        report: Any = {name: defaultdict(list, v) if isinstance(v, dict) else v for name, v in known["report"].items()}
        return pairs, DataReport(**report)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        logger.warning("%s is damaged (%s); the pairs are tokenised again", pairs, error)
        about.unlink(missing_ok=True)
        return None


def _make(entry: Path, build: Build) -> tuple[Path, DataReport]:
    """Makes the entry, unless another process has made it in the meantime."""
    pairs, partial = entry.with_suffix(".arrow"), entry.with_suffix(".partial")
    entry.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(entry.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0.1)
    except filelock.Timeout:
        logger.warning("another process tokenises the same pairs; waiting for it")
        lock.acquire()
    try:
        found = _read(entry)
        if found is not None:
            return found
        report, batches = build()
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for batch in batches:
                writer.write_batch(batch)
        about = {"crc32": _checksum(partial), "report": vars(report)}
        partial.replace(pairs)
        atomic_write(entry.with_suffix(".json"), json.dumps(about, indent=1) + "\n")
        return pairs, report
    finally:
        partial.unlink(missing_ok=True)
        lock.release()


def _checksum(path: Path) -> int:
    return zlib.crc32(pa.memory_map(str(path)).read_buffer())
