"""How near a TDPO2 step comes to its matrix products alone, each timed at its own shape on this machine.

The bound is the time of every product the step cannot do without: linear layers and attention of the body (policy
forward and twice that backward, reference forward) on the rows of the trees, and four head products on the response
tokens. Each is timed as fast as this machine's library does it: into memory that is there already, rows on cache lines.
Everything else, from norms to softmax and the KL, is what the ratio leaves to explain. Step and products take turns, so
that a slow moment of the machine falls on both.

    python benchmarks/bound.py --pairs harmless-base_test.jsonl.gz --tokenizer EleutherAI/pythia-160m
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from measure import machine, pairs_parser, write_csv
from step import draw_pairs, models, step_of
from torch import Tensor, nn

from tdpo.data.pack import pack_trees
from tdpo.ops.heads import padded_vocab
from tdpo.types import PackedBatch

Product = tuple[str, int, Callable[[], object]]
"""Part of the model it belongs to, how often a step does it, and the product."""


def aligned(rows: int, columns: int) -> Tensor:
    """Allocates a matrix whose rows begin on cache lines."""
    return torch.zeros(rows, padded_vocab(columns, torch.float32))[:, :columns]


def product(rows: int, inner: int, columns: int) -> Callable[[], object]:
    """Returns ``[rows, inner] @ [columns, inner].T``, as linear layers and heads have it."""
    left, right, out = torch.randn(rows, inner), torch.randn(columns, inner), aligned(rows, columns)
    return lambda: torch.mm(left, right.t(), out=out)


def products(model: nn.Module, batch: PackedBatch) -> list[Product]:
    """Lists everything a step has to multiply."""
    config: Any = model.config
    tokens, width = batch.input_ids.numel(), batch.input_ids.shape[1]
    shapes = Counter(
        (layer.in_features, layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and "lm_head" not in name
    )
    # forward of two models; backward of one: a product for the input and one for the weight
    found: list[Product] = [("body", 4 * count, product(tokens, *shape)) for shape, count in shapes.items()]
    heads = batch.input_ids.shape[0] * config.num_attention_heads
    queries, keys = torch.randn(heads, width, config.head_dim), torch.randn(heads, config.head_dim, width)
    scores = torch.zeros(heads, width, width)
    # scores and values forward for two models, four products backward for one
    attention = config.num_hidden_layers * (2 * 2 + 4)
    found.append(("body", attention, lambda: torch.bmm(queries, keys, out=scores)))
    response, vocab, hidden = batch.labels.numel(), config.vocab_size, config.hidden_size
    states, weight, logits = torch.randn(response, hidden), torch.randn(vocab, hidden), aligned(response, vocab)
    grad_states, grad_weight = torch.zeros(response, hidden), torch.zeros(vocab, hidden)
    found.append(("head", 2, lambda: torch.mm(states, weight.t(), out=logits)))
    found.append(("head", 1, lambda: torch.mm(logits, weight, out=grad_states)))
    found.append(("head", 1, lambda: torch.mm(logits.t(), states, out=grad_weight)))
    return found


def seconds(function: Callable[[], object]) -> float:
    """Measures the seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(options: argparse.Namespace, seed: int) -> dict[str, float]:
    """Measures step and bound on one draw of pairs, medians over turns."""
    pairs, tokenizer = draw_pairs(options.pairs, options.tokenizer, options.rows, options.batch_size, seed)
    policy, reference = models(len(tokenizer), 512)
    loss = step_of("tdpo2", policy, reference, pairs, tokenizer)

    def step() -> None:
        loss().backward()
        policy.zero_grad()

    parts = products(policy, pack_trees(pairs))
    step_seconds: list[float] = []
    part_seconds: list[list[float]] = [[] for _ in parts]
    for turn in range(options.repetitions + 1):
        timed = seconds(step)
        once = [seconds(multiply) for _, _, multiply in parts]
        if turn:  # the first warms up
            step_seconds.append(timed)
            for values, value in zip(part_seconds, once, strict=True):
                values.append(value)
    total = {"body": 0.0, "head": 0.0}
    for (name, count, _), values in zip(parts, part_seconds, strict=True):
        total[name] += count * statistics.median(values)
    bound, step_median = sum(total.values()), statistics.median(step_seconds)
    tokens = float(sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs))
    return {"seconds": step_median, "bound": bound, **total, "ratio": step_median / bound, "response_tokens": tokens}


def main() -> None:
    """Prints and writes the step's time, the bound and their ratio."""
    parser = pairs_parser(__doc__, repetitions=7, rounds=7)
    parser.add_argument("--csv", default="benchmarks/results/bound.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for seed in range(options.rounds):
        rows.append(compare(options, seed))
        print({key: round(value, 3) for key, value in rows[-1].items()}, flush=True)
    result: dict[str, Any] = {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]}
    ratios = sorted(round(row["ratio"], 3) for row in rows)
    result |= {"ratio_min": ratios[0], "ratio_max": ratios[-1]}
    named = machine(options) | {"batch_size": options.batch_size, "rounds": options.rounds}
    write_csv(options.csv, [result | named])
    print(result)


if __name__ == "__main__":
    main()
