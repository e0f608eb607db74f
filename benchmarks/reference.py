"""One training step by reference and by adapter: time, memory, and what a cached reference keeps on disk.

Beside seconds on the clock there are those of the processor, which another job on the machine hardly changes.

Run it without --setting to compare all, each in processes of its own that take turns:

    python benchmarks/reference.py --pairs harmless-base_test.jsonl.gz --tokenizer EleutherAI/pythia-160m
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from measure import (
    in_turn,
    machine,
    pairs_parser,
    peak_above,
    ratio_columns,
    resident,
    seconds_of,
    words_of,
    write_csv,
)
from step import draw_pairs, models

from tdpo import objectives
from tdpo.data.pack import pack_trees
from tdpo.models.adapters import with_adapter
from tdpo.models.fingerprint import weights_hash
from tdpo.models.reference import AdapterOff, FrozenCopy, Reference
from tdpo.models.store import CachedHidden, HiddenStore
from tdpo.score import batch_loss
from tdpo.train.reference_cache import FillOptions, cache_key, fill
from tdpo.types import TokenisedPair

SETTINGS = ("full-frozen", "full-cached", "full-cached-bf16", "lora-frozen", "lora-adapter_off", "lora-cached")
FIGURES = (
    "seconds", "processor_seconds", "mebibytes", "trained_parameters", "bytes_per_token", "logits_bytes_per_token",
    "fill_seconds", "hash_gb_per_second",
)  # fmt: skip


def setting_of(name: str, pairs: list[TokenisedPair], vocab: int) -> tuple[Any, Reference, dict[str, float]]:
    """Builds policy and reference of a setting, with an adapter of rank 16 on all linear layers; measures a cache."""
    from peft import LoraConfig

    adapter, strategy = name.split("-", 1)
    policy, reference = models(vocab, 512)
    start = time.perf_counter()
    weights_hash(reference.model)
    size = sum(p.numel() * p.element_size() for p in reference.model.parameters())
    figures = {"hash_gb_per_second": size / (time.perf_counter() - start) / 1e9}
    if adapter == "lora":
        policy = with_adapter(
            policy, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    policy.train()
    if strategy == "adapter_off":
        return policy, AdapterOff(policy), figures
    if strategy == "frozen":
        return policy, reference, figures
    return policy, _cached(reference, pairs, "bfloat16" if strategy.endswith("bf16") else "auto", figures), figures


def _cached(reference: FrozenCopy, pairs: list[TokenisedPair], dtype: str, figures: dict[str, float]) -> CachedHidden:
    run = FillOptions(torch.device("cpu"), len(pairs), dtype, "no", nullcontext)
    folder = Path(tempfile.mkdtemp())
    store = HiddenStore(folder, cache_key(reference, pack_trees, run))
    start = time.perf_counter()
    fill(store, reference, pairs, pack_trees, run)
    figures["fill_seconds"] = time.perf_counter() - start
    tokens = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
    figures["bytes_per_token"] = sum(path.stat().st_size for path in folder.glob("hidden-*")) / tokens
    return CachedHidden(store, reference.head())


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Times one setting's forward, backward and AdamW step in this process."""
    torch.set_num_threads(options.threads)
    pairs, tokenizer = draw_pairs(options.pairs, options.tokenizer, options.rows, options.batch_size, options.seed)
    before = resident(peak=False)
    policy, reference, figures = setting_of(options.setting, pairs, len(tokenizer))
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step() -> None:
        total, _ = batch_loss(policy, reference, pack_trees(pairs), objectives.tdpo2(0.1, 0.5))
        (total / len(pairs)).backward()
        optimizer.step()
        optimizer.zero_grad()

    above_models = peak_above(step)
    seconds = seconds_of(step, options.repetitions)
    start = time.process_time()
    for _ in range(options.repetitions):
        step()
    return figures | {
        "seconds": statistics.median(seconds),
        "processor_seconds": (time.process_time() - start) / options.repetitions,
        "mebibytes": above_models,
        "models_mebibytes": (resident(peak=False) - before) / 2**20,
        "trained_parameters": float(sum(p.numel() for p in trained)),
        "logits_bytes_per_token": 4.0 * len(tokenizer),
    }


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs every setting in turn, round after round with other pairs, and returns a row for each."""
    found = in_turn(__file__, [{"setting": name} for name in SETTINGS], options.rounds, words_of(options))
    runs = dict(zip(SETTINGS, found, strict=True))
    rows = []
    for name, measured in runs.items():
        row: dict[str, Any] = {"setting": name}
        for figure in FIGURES:
            values = [run[figure] for run in measured if figure in run]
            row[figure] = round(statistics.median(values), 3) if values else ""
        for figure in ("seconds", "processor_seconds", "mebibytes"):
            base, own = ([run[figure] for run in some] for some in (runs["full-frozen"], measured))
            row |= ratio_columns(figure, "full_frozen", base, own)
        rows.append(row)
    return rows


def main() -> None:
    """Measures one setting, or compares all and writes a CSV."""
    parser = pairs_parser(__doc__)
    parser.add_argument("--setting", choices=SETTINGS, help="measure this one here and print JSON")
    parser.add_argument("--csv", default="benchmarks/results/reference.csv")
    options = parser.parse_args()
    if options.setting:
        print(json.dumps(measure(options)))
        return
    named = machine(options) | {"batch_size": options.batch_size, "rounds": options.rounds}
    rows = [result | named for result in compare(options)]
    write_csv(options.csv, rows)
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
