"""The operation alone: response tokens' hidden states and two heads in, a TDPO2 loss and its gradients out.

Two tables. Time and peak memory of every implementation over vocabularies; and peak memory over vocabularies and
numbers of tokens, to which a slope is fitted: how many bytes one more logit costs.

    python benchmarks/op.py                         # both tables, into benchmarks/results
    python benchmarks/op.py --width 4096 --tokens 8192 --dtype bfloat16 --vocabularies 128256     # on a GPU

Implementations: ``autograd`` is the formula in plain torch (log-softmax of whole logits, then the sum of
p_ref (log p_ref - log p)), ``naive`` this package's specification, ``two-pass`` its token statistics for any objective,
``fused`` its loss in one pass (whose gradients are made in the forward), ``fused-one-pair`` the same for a single pair
of all the tokens, too long for the budget, so that its logits are made twice, ``trl-parts`` TRL's chunked
log-probabilities and its chunked KL, ``liger-dpo`` Liger's fused DPO loss, which has no KL. ``--backend triton`` runs
the package's own with Triton kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import MEBIBYTE, in_turn, machine, peak_above, ratios, seconds_of, words_of, write_csv
from torch import Tensor

from tdpo import objectives, ops
from tdpo.types import Head, Hidden, PairStats

IMPLEMENTATIONS = ("autograd", "naive", "two-pass", "fused", "fused-one-pair", "trl-parts", "liger-dpo")
PAIRS = 8
LOGIT_BUFFERS_OF_PLAIN = {"autograd": 6, "naive": 18}
"""Float32 copies of the logits these are sure to fit in; more than is free, and they are left out."""


def problem(tokens: int, width: int, vocab: int, dtype: torch.dtype, device: str) -> tuple[Hidden, Hidden, Tensor]:
    """Draws hidden states and heads of a policy and of a reference near it, and labels."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    states, weight = normal(tokens, width), normal(vocab, width) / width**0.5
    ref_states, ref_weight = states + 0.1 * normal(tokens, width), weight + 0.1 * normal(vocab, width) / width**0.5
    labels = torch.randint(vocab, (tokens,), generator=generator).to(device)
    policy, reference = (
        Hidden(s.to(device, dtype), Head(w.to(device, dtype))) for s, w in ((states, weight), (ref_states, ref_weight))
    )
    policy.states.requires_grad_()
    policy.head.weight.requires_grad_()
    return policy, reference, labels


def loss_of(name: str, policy: Hidden, reference: Hidden, labels: Tensor, backend: Any) -> Callable[[], Tensor]:
    """Returns the summed loss of eight pairs of equal length under one implementation, as a function to call."""
    objective = objectives.tdpo2(beta=0.1, alpha=0.5)
    if name == "liger-dpo":
        return liger_loss(policy, reference, labels)
    if name in ("fused", "fused-one-pair"):
        pairs = PAIRS if name == "fused" else 1
        lengths = [len(labels) // (2 * pairs)] * (2 * pairs)
        return lambda: ops.pair_loss(policy, reference, labels, lengths, objective, backend=backend)[0]

    def by_token() -> Tensor:
        if name == "autograd":
            logp, ref_logp, kl = plain_stats(policy, reference, labels)
        elif name == "trl-parts":
            logp, ref_logp, kl = trl_stats(policy, reference, labels)
        else:
            tokens = ops.response_stats(policy, reference, labels, "naive" if name == "naive" else backend)
            logp, ref_logp, kl = tokens.logp, tokens.ref_logp, tokens.kl
        ratio, kl = (logp - ref_logp).view(2 * PAIRS, -1).sum(1), kl.view(2 * PAIRS, -1).sum(1)
        return objective(PairStats(ratio[::2], ratio[1::2], kl[::2], kl[1::2])).loss.sum()

    return by_token


def plain_stats(policy: Hidden, reference: Hidden, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the three statistics by the textbook, in float32, whole logits under autograd."""
    logp = (policy.states @ policy.head.weight.t()).float().log_softmax(-1)
    ref_logp = (reference.states @ reference.head.weight.t()).float().log_softmax(-1)
    kl = (ref_logp.exp() * (ref_logp - logp)).sum(-1)
    index = labels[:, None]
    return logp.gather(1, index)[:, 0], ref_logp.gather(1, index)[:, 0], kl


def trl_stats(policy: Hidden, reference: Hidden, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the three statistics by TRL's kernels: log-probabilities of both models, and KL(reference || policy)."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def logp(side: Hidden) -> Tensor:
        # temperature, words per tile, no soft cap, no scale
        options = labels, 1.0, 32768, None, 1.0, ("log_probs",)
        return ChunkedLogProbFunction.apply(side.states, side.head.weight, None, *options)[0]

    with torch.no_grad():
        ref_logp = logp(reference)
    sides = (part for side in (policy, reference) for part in (side.states, side.head.weight, None))
    return logp(policy), ref_logp, ChunkedDivergenceFunction.apply(*sides, 0.0)[0]


def liger_loss(policy: Hidden, reference: Hidden, labels: Tensor) -> Callable[[], Tensor]:
    """Returns Liger's fused DPO loss of the same pairs, summed as ours; compiled only where it is on a GPU."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    compiled = policy.states.is_cuda
    loss = LigerFusedLinearDPOLoss(beta=0.1, use_ref_model=True, compiled=compiled, average_log_prob=False)
    order = torch.cat((torch.arange(0, 2 * PAIRS, 2), torch.arange(1, 2 * PAIRS, 2))).to(labels.device)

    def blocks(values: Tensor) -> Tensor:
        return values.view(2 * PAIRS, len(labels) // (2 * PAIRS), *values.shape[1:])[order]

    arguments = policy.head.weight, blocks(policy.states), blocks(labels)
    ref = {"ref_input": blocks(reference.states), "ref_weight": reference.head.weight}
    return lambda: PAIRS * loss(arguments[0], blocks(policy.states), arguments[2], **ref)[0]


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Measures seconds forward and backward, and the peak above inputs and outputs, of one implementation."""
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vocab, tokens = options.vocabularies[0], options.tokens
    plain = LOGIT_BUFFERS_OF_PLAIN.get(options.implementation, 0)
    if device == "cpu" and 4 * plain * tokens * vocab > 0.6 * free_bytes():
        raise SystemExit(f"left out: {plain} float32 copies of {tokens} x {vocab} logits do not fit the memory")
    policy, reference, labels = problem(tokens, options.width, vocab, getattr(torch, options.dtype), device)
    leaves = [policy.states, policy.head.weight]
    loss = loss_of(options.implementation, policy, reference, labels, options.backend)
    total = torch.zeros(())

    def step() -> None:
        nonlocal total
        total = loss()
        total.backward()
        for leaf in leaves:
            leaf.grad = None

    outputs = sum(leaf.numel() * leaf.element_size() for leaf in leaves) / MEBIBYTE
    mebibytes = peak_above(step)
    return {
        "seconds": statistics.median(seconds_of(step, options.repetitions)),
        "seconds_forward": statistics.median(seconds_of(loss, options.repetitions)),
        "mebibytes": mebibytes - outputs,
        "loss": total.item(),
    }


def free_bytes() -> int:
    """Returns the memory that is free (Linux)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024


def time_table(options: argparse.Namespace, arguments: list[str]) -> list[dict[str, Any]]:
    """Measures a row per vocabulary and implementation; ratios are to plain autograd's of the same round."""
    rows = []
    for vocab in options.vocabularies:
        settings = [{"implementation": name, "vocabularies": vocab} for name in options.compare]
        results = dict(zip(options.compare, in_turn(__file__, settings, options.rounds, arguments), strict=True))
        base = results.get("autograd") or []
        for name, runs in results.items():
            row: dict[str, Any] = {"vocabulary": vocab, "tokens": options.tokens, "width": options.width}
            row |= {"dtype": options.dtype, "implementation": name}
            for figure, digits in (("seconds", 3), ("seconds_forward", 3), ("mebibytes", 0), ("loss", 4)):
                values = sorted(run[figure] for run in runs)
                row[figure] = round(values[len(values) // 2], digits) if values else "left out"
            for figure in ("seconds", "mebibytes"):
                found = ratios([b[figure] for b in base], [r[figure] for r in runs]) if base and runs else ("", "", "")
                row |= {f"{figure}_over_autograd{end}": v for end, v in zip(("", "_min", "_max"), found, strict=True)}
            rows.append(row)
    return rows


def memory_table(options: argparse.Namespace, arguments: list[str]) -> list[dict[str, Any]]:
    """Measures peak memory over two vocabularies and numbers of tokens, and the bytes that one more logit costs."""
    rows = []
    for name in ("autograd", "two-pass", "fused"):
        shapes = [(vocab, tokens) for vocab in (32_000, 64_000) for tokens in (1024, 2048)]
        settings = [{"implementation": name, "vocabularies": v, "tokens": n} for v, n in shapes]
        peaks = [runs[0]["mebibytes"] for runs in in_turn(__file__, settings, 1, arguments) if runs]
        logits = torch.tensor([[float(v * n), 1.0] for v, n in shapes], dtype=torch.float64)
        wanted = torch.tensor(peaks, dtype=torch.float64)[:, None] * 2**20
        slope = torch.linalg.lstsq(logits, wanted).solution[0].item() if len(peaks) == len(shapes) else float("nan")
        peak = {f"mebibytes_{v}_{n}": round(p) for (v, n), p in zip(shapes, peaks, strict=False)}
        rows.append({"implementation": name, **peak, "bytes_per_logit": round(slope, 3)})
    return rows


def main() -> None:
    """Measures one implementation, or all of them and writes two CSVs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 50_257, 128_256, 152_064])
    parser.add_argument("--tokens", type=int, default=2048, help="response tokens, a multiple of 16")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--backend", default="auto", choices=["auto", "chunked", "triton"])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0, help="number of the round; the figures do not depend on it")
    parser.add_argument("--compare", nargs="+", default=list(IMPLEMENTATIONS), choices=IMPLEMENTATIONS)
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, help="measure this one here and print JSON")
    parser.add_argument("--csv", default="benchmarks/results/op.csv")
    parser.add_argument("--memory_csv", default="benchmarks/results/op_memory.csv")
    options = parser.parse_args()
    if options.implementation:
        print(json.dumps(measure(options)))
        return
    same = ("tokens", "width", "dtype", "backend", "repetitions", "threads")
    arguments = words_of(options, same)
    named = machine(options) | {"rounds": options.rounds}
    for path, table in ((options.csv, time_table), (options.memory_csv, memory_table)):
        rows = table(options, arguments)
        write_csv(path, [row | named for row in rows])
        print(*rows, sep="\n")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    main()
