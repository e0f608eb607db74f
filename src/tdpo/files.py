"""Files that appear whole or not at all, and the room there is for some that others write."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from pathlib import Path

from tdpo.errors import UserError

PARTIAL = ".partial"
"""Ends, or with a process's number ends, the name of what is being written and never read."""


def atomic_write(path: Path, content: str | bytes) -> None:
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


def check_shared_memory(option: str, processes: int) -> None:
    """Refuses to start processes that would not find room for the locks they share.

    Args:
        option: What asks for the processes.
        processes: How many.

    Raises:
        UserError: naming the shared memory, and what to do about it.
    """
    try:
        room = [multiprocessing.get_context("spawn").Queue() for _ in range(processes + 2)]
        del room
    except OSError as error:
        raise UserError(
            f"{option} {processes}: there is no room in the shared memory (/dev/shm): {error}. Give it more "
            f"(docker run --shm-size 1g), or leave {option} out"
        ) from error
