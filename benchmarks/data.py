"""Tokenises a preference dataset: this package and TRL's DPOTrainer on the same rows and cores.

Run it without --implementation to compare all, each in processes of its own that take turns:

    python benchmarks/data.py --pairs harmless-base_test.jsonl.gz --tokenizer EleutherAI/pythia-160m
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from measure import in_turn, machine, ratio_columns, resident, write_csv
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tdpo.data.dataset import PairDataset, prepare_pairs
from tdpo.data.formats import to_records
from tdpo.data.sources import from_memory, open_source, read_source
from tdpo.data.tokenise import Lengths, Tokeniser

IMPLEMENTATIONS = ("tdpo", "tdpo-processes", "tdpo-second-start", "trl", "trl-processes")
Row = dict[str, str]


def make_rows(options: argparse.Namespace) -> list[Row]:
    """Returns the requested number of distinct rows, as long as those of the data.

    Without --text, prompts, chosen and rejected responses of different rows are combined, so every text occurs
    several times; with it, each text is replaced by new words of the same number.
    """
    records, _ = to_records(read_source(options.pairs, "train"))
    sides = [[str(getattr(record, name)) for record in records] for name in ("prompt", "chosen", "rejected")]
    rng = random.Random(options.seed)
    if options.text:
        words = _words(options.text)
        sides = [
            [" ".join(itertools.islice(words, text.count(" "))) for text in _many(side, options)] for side in sides
        ]
    else:
        sides = [_many(side, options) for side in sides]
        for side in sides:
            rng.shuffle(side)
    if not all(sides[2]):
        raise SystemExit("--text has too few words for that many rows")
    prompts, chosen, rejected = sides
    return [
        {"prompt": f"{p}:", "chosen": f" {c} 1", "rejected": f" {r} 2"}
        for p, c, r in zip(prompts, chosen, rejected, strict=True)
    ]


def _many(side: list[str], options: argparse.Namespace) -> list[str]:
    return list(itertools.islice(itertools.cycle(side), options.rows))


def _words(names: list[str]) -> Iterator[str]:
    for name in names:
        for row in read_source(name, "train"):
            yield from str(row.fields["text"]).split(" ")


def tdpo(rows: list[Row], tokenizer: Any, folder: Path, processes: int = 1) -> Callable[[], tuple[float, int]]:
    """Prepares rows in memory as pairs in a cache file; returns seconds and tokens."""
    source = from_memory(rows, "rows")
    tokeniser = Tokeniser(tokenizer, Lengths(2**20, 2**19), processes=processes)

    def prepare() -> tuple[float, int]:
        start = time.perf_counter()
        pairs = prepare_pairs(source, tokeniser, cache=folder)
        return time.perf_counter() - start, sum(pairs.lengths())

    return prepare


def tdpo_second_start(rows: list[Row], tokenizer: Any, folder: Path) -> Callable[[], tuple[float, int]]:
    """Prepares a file whose pairs are in the cache already."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def start_once() -> PairDataset:
        source = open_source(str(file), "train")
        return prepare_pairs(source, Tokeniser(tokenizer, Lengths(2**20, 2**19)), cache=folder)

    start_once()

    def prepare() -> tuple[float, int]:
        start = time.perf_counter()
        pairs = start_once()
        return time.perf_counter() - start, sum(pairs.lengths())

    return prepare


def trl(rows: list[Row], tokenizer: Any, folder: Path, processes: int | None) -> Callable[[], tuple[float, int]]:
    """Prepares a ``datasets.Dataset`` by TRL's own preparation, as its trainer calls it."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    tokenizer.pad_token = tokenizer.eos_token
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    datasets.Dataset.from_list(rows).save_to_disk(folder / "rows")
    dataset = datasets.load_from_disk(folder / "rows")
    args = DPOConfig(
        output_dir=str(folder), use_cpu=True, report_to="none", bf16=False, dataset_num_proc=processes, max_length=None
    )
    seconds: list[float] = []
    whole = DPOTrainer._prepare_dataset

    def timed(*given: Any, **named: Any) -> Any:
        start = time.perf_counter()
        prepared = whole(*given, **named)
        seconds.append(time.perf_counter() - start)
        return prepared

    def prepare() -> tuple[float, int]:
        DPOTrainer._prepare_dataset = timed
        model, reference = LlamaForCausalLM(config), LlamaForCausalLM(config)
        trainer = DPOTrainer(
            model=model, ref_model=reference, args=args, train_dataset=dataset, processing_class=tokenizer
        )
        columns = trainer.train_dataset.with_format("arrow")[:]
        return seconds[-1], sum(
            len(columns[name].combine_chunks().flatten()) for name in columns.column_names if "_ids" in name
        )

    return prepare


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Measures one preparation: seconds, CPU seconds of all processes, tokens, and memory above the rows."""
    rows, tokenizer = make_rows(options), AutoTokenizer.from_pretrained(options.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        processes = (os.cpu_count() or 1) if options.implementation.endswith("-processes") else 1
        if options.implementation.startswith("trl"):
            prepare = trl(rows, tokenizer, Path(folder), processes if processes > 1 else None)
        elif options.implementation == "tdpo-second-start":
            prepare = tdpo_second_start(rows, tokenizer, Path(folder))
        else:
            prepare = tdpo(rows, tokenizer, Path(folder), processes)
        before = resident(peak=False)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        spent = sum(os.times()[:4])
        with contextlib.redirect_stdout(io.StringIO()):
            seconds, tokens = prepare()
        return {
            "seconds": seconds,
            "cpu_seconds": sum(os.times()[:4]) - spent,
            "tokens": tokens,
            "mebibytes": (resident(peak=True) - before) / 2**20,
        }


def row(name: str, runs: list[dict[str, float]], ours: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over rounds, and the ratios to ours round by round."""
    times = ratio_columns("time", "tdpo", [run["seconds"] for run in ours], [run["seconds"] for run in runs])
    return {
        "implementation": name,
        "seconds": round(statistics.median(run["seconds"] for run in runs), 2),
        **times,
        "cpu_seconds": round(statistics.median(run["cpu_seconds"] for run in runs), 2),
        "mebibytes": round(statistics.median(run["mebibytes"] for run in runs)),
        "tokens_first_round": int(runs[0]["tokens"]),
    }


def main() -> None:
    """Measures one implementation, or compares all and writes a CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True, help="preference data as text, any format tdpo reads")
    parser.add_argument("--tokenizer", required=True, help="name or folder")
    parser.add_argument(
        "--text", nargs="+", default=[], help="files with a column text, for rows without repeated text"
    )
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3, help="processes per implementation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", nargs="+", default=list(IMPLEMENTATIONS), choices=IMPLEMENTATIONS)
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, help="measure this one here and print JSON")
    parser.add_argument("--csv", default="benchmarks/results/data.csv")
    options = parser.parse_args()
    options.threads = os.cpu_count()
    torch.set_num_threads(1)
    if options.implementation:
        print(json.dumps(measure(options)))
        return
    settings = [{"implementation": name} for name in options.compare]
    results = dict(zip(options.compare, in_turn(__file__, settings, options.rounds, sys.argv[1:]), strict=True))
    named = {"rows": options.rows, "text": "new" if options.text else "recombined", **machine(options)}
    named |= {"trl": version("trl"), "rounds": options.rounds}
    rows = [{**row(name, runs, results["tdpo"]), **named} for name, runs in results.items() if runs]
    write_csv(options.csv, rows)
    for result in rows:
        print({key: value for key, value in result.items() if key not in named})


if __name__ == "__main__":
    main()
