"""Checks code, tests and pages for the words of ``words.toml``; exits with 1 if there are any."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path


def findings(files: list[Path], words: dict[str, str]) -> list[str]:
    """Returns a line for each word found, with its file, its line number and what to write instead."""
    patterns = {re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE): instead for pattern, instead in words.items()}
    return [
        f"{file}:{number}: `{match.group()}`: write {instead}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        for pattern, instead in patterns.items()
        for match in pattern.finditer(line)
    ]


def main() -> int:
    """Checks the Python and Markdown files of the repository that git knows or would add."""
    root = Path(__file__).resolve().parent.parent
    words = tomllib.loads((root / "tools" / "words.toml").read_text(encoding="utf-8"))["words"]
    listed = ["git", "ls-files", "-co", "--exclude-standard", "*.py", "*.md"]
    names = subprocess.run(listed, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    found = findings([root / name for name in names if (root / name).is_file()], words)
    print("\n".join(found) or f"{len(names)} files have none of the {len(words)} listed words")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
