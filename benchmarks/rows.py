"""Reads a large JSONL file with ten bad rows: time against parsing its lines alone, and memory.

python benchmarks/rows.py --rows 1000000
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import resource
import subprocess
import tempfile
import time
from pathlib import Path

from tdpo.data.formats import DataReport, iter_records
from tdpo.data.sources import open_source
from tdpo.errors import UserError

BAD = [
    b"{",
    b"[1]",
    b"null",
    b'"text"',
    b'{"prompt": "\xff"}',
    b'{"prompt": "p", "chosen": "c"}',
    b'{"prompt": 3, "chosen": "c", "rejected": "r"}',
    b'{"prompt": "p", "chosen": "", "rejected": "r"}',
    b'{"prompt": "p", "prompt": "q"}',
    b'{"prompt": "p", "chosen": "c", "rejected": [3]}',
]


def write_rows(path: Path, count: int) -> list[int]:
    """Writes pairs of HH's length with ten bad ones among them and returns their numbers."""
    words = "some words of a dialogue " * 8
    bad = {(index * 2 + 1) * count // 20: line for index, line in enumerate(BAD)}
    with open(path, "wb") as file:
        for number in range(1, count + 1):
            row = {"prompt": f"{number} {words}", "chosen": f" yes {words}", "rejected": f" no {words}"}
            file.write(bad.get(number) or json.dumps(row).encode())
            file.write(b"\n")
    return sorted(bad)


def parse_seconds(path: Path) -> float:
    """Measures the CPU seconds of parsing the lines alone."""
    start = time.process_time()
    with open(path, "rb") as file:
        for line in file:
            try:
                json.loads(line)
            except ValueError:
                continue
    return time.process_time() - start


def read_seconds(path: Path, on_bad_row: str) -> tuple[float, int, list[int]]:
    """Returns CPU seconds, number of records, and the rows that were named."""
    start, report, kept, named = time.process_time(), DataReport(str(path)), 0, []
    try:
        for _ in iter_records(open_source(str(path), "train"), "auto", on_bad_row, report):  # type: ignore[arg-type]
            kept += 1
        named = sorted(row for rows in report.dropped.values() for row in rows)
    except UserError as error:
        named = [int(line.split(", row ")[1].split(":")[0]) for line in str(error).splitlines() if ", row " in line]
    return time.process_time() - start, kept, named


def main() -> None:
    """Prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--csv", default="benchmarks/results/rows.csv")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        bad = write_rows(path, options.rows)
        parsing = parse_seconds(path)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        stopped, _, named = read_seconds(path, "error")
        dropped, kept, counted = read_seconds(path, "drop")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        size = path.stat().st_size
    if not (named == counted == bad and kept == options.rows - len(bad)):
        raise SystemExit(f"named {named}, counted {counted}, kept {kept}; the bad rows are {bad}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    row = {
        "rows": options.rows, "file_mib": round(size / 2**20, 1), "parse_seconds": round(parsing, 2),
        "error_seconds": round(stopped, 2), "drop_seconds": round(dropped, 2),
        "ratio": round(dropped / parsing, 2), "memory_mib": round(grown / 2**10, 1), "bad_rows_named": len(named),
        "python": platform.python_version(), "commit": commit,
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in row.items()))
    Path(options.csv).parent.mkdir(parents=True, exist_ok=True)
    with open(options.csv, "w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
