"""Functions the benchmarks share: seconds, peak memory, description of the machine, processes that take turns."""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

MEBIBYTE = 2**20


def seconds_of(function: Callable[[], object], repetitions: int) -> list[float]:
    """Measures the seconds of each call, after one to warm up."""
    seconds = []
    for _ in range(repetitions + 1):
        _finish()
        start = time.perf_counter()
        function()
        _finish()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def peak_above(function: Callable[[], object]) -> float:
    """Measures the MiB a call adds to the memory allocated before it: resident on a CPU, allocated on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MEBIBYTE
    before = resident(peak=False)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    function()
    return (resident(peak=True) - before) / MEBIBYTE


def resident(peak: bool) -> int:
    """Returns the resident bytes of this process now, or at their peak (Linux)."""
    field = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def in_turn(
    script: str, settings: Sequence[Mapping[str, Any]], rounds: int, arguments: Sequence[str] = ()
) -> list[list[dict[str, float]]]:
    """Runs a script once per setting and round, each time in a process of its own, and collects the JSON it prints.

    Args:
        script: File that prints one JSON object as its last line.
        settings: Options of each process; the result has its measurements in the same order.
        rounds: How often all settings are gone through; ``--seed`` is the round's number.
        arguments: Options of every process.

    Returns:
        For each setting the objects of its rounds; none where a process failed, which is reported on standard error.
    """
    results: list[list[dict[str, float]]] = [[] for _ in settings]
    for number in range(rounds):
        for setting, found in zip(settings, results, strict=True):
            options = [word for name, value in setting.items() for word in (f"--{name}", str(value))]
            words = [sys.executable, script, *arguments, *options, "--seed", str(number)]
            process = subprocess.run(words, capture_output=True, text=True)
            if process.returncode:
                reason = (process.stderr.strip().splitlines() or [f"ended by signal {-process.returncode}"])[-1]
                print(f"{setting}: {reason}", file=sys.stderr)
                continue
            found.append(json.loads(process.stdout.strip().splitlines()[-1]))
            print(f"round {number + 1}: {setting} {found[-1]}", file=sys.stderr, flush=True)
    return results


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Returns median, least and greatest of the ratios theirs over ours, round by round."""
    values = sorted(their / our for our, their in zip(ours, theirs, strict=False))
    return round(statistics.median(values), 2), round(values[0], 2), round(values[-1], 2)


def ratio_columns(figure: str, base: str, ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Returns :func:`ratios` as three columns of a table, named after the figure and what it is divided by."""
    ends = ("", "_min", "_max")
    return {f"{figure}_over_{base}{end}": value for end, value in zip(ends, ratios(ours, theirs), strict=True)}


def pairs_parser(description: str | None, repetitions: int = 3, rounds: int = 3) -> argparse.ArgumentParser:
    """Builds the parser of a benchmark on real pairs; :func:`words_of` passes its options to its processes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True, help="preference data, any format tdpo reads")
    parser.add_argument("--tokenizer", required=True, help="name or folder")
    parser.add_argument("--rows", type=int, default=400, help="rows of the data to draw pairs from")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=repetitions, help="timed steps, after those to warm up")
    parser.add_argument("--rounds", type=int, default=rounds, help="draws of pairs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    return parser


PAIRS_OPTIONS = ("pairs", "tokenizer", "rows", "batch_size", "repetitions", "threads")
"""Options of :func:`pairs_parser` that are the same in every process."""


def words_of(options: argparse.Namespace, names: Sequence[str] = PAIRS_OPTIONS) -> list[str]:
    """Returns some options as words of a command line."""
    return [word for name in names for word in (f"--{name}", str(getattr(options, name)))]


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Describes hardware and versions the figures were measured with."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu, "threads": options.threads,
        "torch": torch.__version__, "transformers": transformers.__version__, "commit": commit,
    }  # fmt: skip


def write_csv(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of the same columns."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
