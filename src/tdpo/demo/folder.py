"""The demo's output folder: it replaces what an earlier demo wrote there, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

from tdpo.errors import UserError

MARK = ".tdpo-demo"
"""A file that says the folder is the demo's own."""
ENTRIES = (
    "base", "sft", "dpo", "tdpo1", "tdpo2", "pairs", "sft.jsonl", "prompts.jsonl", "samples.jsonl", "results.json",
    "frontier.png",
)  # fmt: skip
"""Everything the demo writes into the folder."""


def claim(folder: Path) -> Path:
    """Makes the folder the demo's: new or empty folders are marked, marked ones are cleared of :data:`ENTRIES`.

    Anything else in a marked folder stays: models trained there from the demo's own, say.

    Raises:
        UserError: naming the folder, if it is a file, cannot be written, or holds files of anybody else.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output_dir {folder}: is a file; the demo needs a folder")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
            raise UserError(
                f"--output_dir {folder}: holds files that the demo did not write, and it would replace some of them; "
                "name a new folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).write_text(
            "Written by tdpo demo, which replaces in this folder: " + ", ".join(ENTRIES) + "\n", encoding="utf-8"
        )
        for name in ENTRIES:
            _remove(folder / name)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written: {error.strerror or error}") from error
    return folder


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
