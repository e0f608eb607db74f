"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

PARTIAL = ".partial"
"""Ends, or with a process's number ends, the name of what is being written and never read."""


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file aside, brings it to the disk and renames it; of processes that write at once the last one stays.

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


def flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
