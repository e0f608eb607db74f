"""How near a TDPO2 step comes to its matrix products alone, each timed at its own shape on this machine.

The bound is the time of every product the step cannot do without: linear layers and attention of the body (policy
forward and twice that backward, reference forward) on the rows of the trees, and four head products on the response
tokens. Everything else, from norms to softmax and the KL, is what the ratio leaves to explain.

    python benchmarks/bound.py --pairs harmless-base_test.jsonl.gz --tokenizer EleutherAI/pythia-160m
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from step import draw_pairs, machine, models, step_of
from torch import nn

from tdpo.data.pack import pack_trees
from tdpo.types import PackedBatch


def product_seconds(rows: int, inner: int, columns: int, repetitions: int = 5) -> float:
    """Seconds of one float32 product ``[rows, inner] @ [inner, columns]``, the median of some."""
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    return timed(lambda: left @ right, repetitions)


def timed(function: Callable[[], object], repetitions: int) -> float:
    """Median seconds of a call, after one to warm up."""
    seconds = []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def bound_seconds(model: nn.Module, batch: PackedBatch) -> tuple[float, float]:
    """Seconds of the products of body and head, each at its own shape."""
    config = model.config
    tokens, width = batch.input_ids.numel(), batch.input_ids.shape[1]
    linears = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]
    shapes = [(tokens, m.in_features, m.out_features) for m in linears]
    # forward of two models; backward of one: a product for the input and one for the weight
    body = sum((2 + 2) * product_seconds(*shape) for shape in sorted(shapes))
    heads = batch.input_ids.shape[0] * config.num_attention_heads
    queries, keys = torch.randn(heads, width, config.head_dim), torch.randn(heads, config.head_dim, width)
    # scores and values forward for two models, four products backward for one
    body += config.num_hidden_layers * (2 * 2 + 4) * timed(lambda: queries @ keys, 5)
    response, vocab, hidden = batch.labels.numel(), config.vocab_size, config.hidden_size
    logits = product_seconds(response, hidden, vocab)
    head = 2 * logits + product_seconds(response, vocab, hidden) + product_seconds(vocab, response, hidden)
    return body, head


def main() -> None:
    """Prints and writes the step's time, the bound and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True, help="preference data, any format tdpo reads")
    parser.add_argument("--tokenizer", required=True, help="name or folder")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5, help="step and bound are measured in turn so often")
    parser.add_argument("--csv", default="benchmarks/results/bound.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for seed in range(options.rounds):
        pairs, tokenizer = draw_pairs(options.pairs, options.tokenizer, options.rows, options.batch_size, seed)
        policy, reference = models(len(tokenizer), 512)
        step = step_of("tdpo2", policy, reference, pairs, tokenizer)
        seconds = timed(lambda step=step: step().backward(), 3)
        body, head = bound_seconds(policy, pack_trees(pairs))
        rows.append({"seconds": seconds, "bound": body + head, "body": body, "head": head})
        rows[-1]["ratio"] = seconds / (body + head)
        print({key: round(value, 3) for key, value in rows[-1].items()})
    result = {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]}
    result |= {"ratio_min": min(r["ratio"] for r in rows), "ratio_max": max(r["ratio"] for r in rows)}
    Path(options.csv).parent.mkdir(parents=True, exist_ok=True)
    with open(options.csv, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, {**result, **machine(options)})
        writer.writeheader()
        writer.writerow({**result, **machine(options)})
    print(result)


if __name__ == "__main__":
    main()
