"""Sampling in batches against sampling one response at a time: seconds for the same number of responses.

    python benchmarks/generate.py --model stories260k

One at a time only ``--single`` responses are drawn, and their seconds scaled to ``--samples``.
"""

from __future__ import annotations

import argparse

import torch
from measure import machine, ratio_columns, seconds_of, write_csv
from transformers import AutoModelForCausalLM, AutoTokenizer

from tdpo.evaluate.generate import Sampling, sample_ids

PROMPTS = ("Once upon a time", "One day, Lily", "The dog was", "Tom had a red ball and")


def main() -> None:
    """Runs the benchmark and writes its CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name or folder")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--single", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", default="benchmarks/results/generate.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    prompts = AutoTokenizer.from_pretrained(options.model)(list(PROMPTS))["input_ids"]

    def draw(count: int, batch_size: int) -> None:
        asked = [prompts[index % len(prompts)] for index in range(count)]
        sample_ids(model, asked, Sampling(options.tokens, batch_size=batch_size), None)  # no end token: full length

    batched, single = [], []
    for _ in range(options.rounds):
        batched += seconds_of(lambda: draw(options.samples, options.batch_size), 1)
        single += [s * options.samples / options.single for s in seconds_of(lambda: draw(options.single, 1), 1)]
    row = {
        "samples": options.samples, "tokens": options.tokens, "batch_size": options.batch_size,
        "batched_seconds": round(min(batched), 2), "single_seconds": round(min(single), 2),
        **ratio_columns("single", "batched", batched, single), **machine(options), "rounds": options.rounds,
    }  # fmt: skip
    write_csv(options.csv, [row])
    print(row)


if __name__ == "__main__":
    main()
