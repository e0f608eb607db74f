"""Writes files that are complete or absent."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tdpo.errors import UserError

PARTIAL = ".partial"
"""Ends, or with a process's number ends, the name of what is being written and never read."""


def atomic_write(path: Path, content: str | bytes) -> None:
    """Writes a temporary file, flushes it and renames it; of processes that write at once the last one stays.

    Raises:
        OSError: if it cannot be written; then what stood there still does.
    """
    partial = path.with_name(f"{path.name}{PARTIAL}-{os.getpid()}")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def json_lines(rows: Iterable[Any]) -> str:
    """Returns rows as JSON, one a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path) -> None:
    """Makes the folder and tries to write in it.

    Raises:
        UserError: naming the folder and the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error


def check_outputs(*files: str | None) -> None:
    """Checks the folders of output files as :func:`check_writable` does; None is skipped."""
    for file in filter(None, files):
        check_writable(Path(file).expanduser().absolute().parent)
