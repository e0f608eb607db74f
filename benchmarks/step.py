"""One training step on preference pairs: ours, the arithmetic of the authors' code, TRL's and Liger's.

Run it without --implementation to compare all, each in processes of its own that take turns:

    python benchmarks/step.py --pairs harmless-base_test.jsonl.gz --tokenizer EleutherAI/pythia-160m

``--pairs short`` takes random tokens instead: prompts of 64 and responses of 300. ``--repetitions 0`` counts and does
not time.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from count import counts_of
from measure import (
    PAIRS_OPTIONS,
    in_turn,
    machine,
    pairs_parser,
    peak_above,
    ratio_columns,
    seconds_of,
    words_of,
    write_csv,
)
from op import trl_stats
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tdpo import objectives
from tdpo.data.dataset import prepare_pairs
from tdpo.data.pack import pack_padded, pack_trees
from tdpo.data.sources import read_source
from tdpo.data.tokenise import Lengths, Tokeniser
from tdpo.models.reference import FrozenCopy
from tdpo.score import batch_loss
from tdpo.types import WEIGHTS, Head, Hidden, PackedBatch, PairStats, TokenisedPair

Step = Callable[[], Tensor]
IMPLEMENTATIONS = (
    "tdpo2", "tdpo2-weighted", "tbpo", "dpo", "tdpo2-padded", "tdpo2-padded-naive", "trl-dpo", "trl-dpo-compacted",
    "trl-tdpo2", "liger-dpo",
)  # fmt: skip
STEP_OPTIONS = (*PAIRS_OPTIONS, "width", "vocabulary", "head")
SHORT = "short"
"""Name of the pairs with a short prompt, and their lengths in tokens."""
SHORT_PROMPT, SHORT_RESPONSE = 64, 300
LONGEST = 512
COUNTED = {"head_products": 2, "body_tokens": 2, "logits_mebibytes": 0, "gigaflops": 0}
"""Figures that no machine changes, with the digits of the table."""


def models(
    vocab_size: int, max_length: int, width: int = 256, layers: int = 4, head_width: int = 64
) -> tuple[nn.Module, FrozenCopy]:
    """Builds a Llama with a tied head, and a reference that differs a little."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=688 * width // 256,
        num_hidden_layers=layers,
        num_attention_heads=width // head_width,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
    )
    reference = LlamaForCausalLM(config)
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return policy.train(), FrozenCopy(reference)


def authors_loss(policy: nn.Module, reference: nn.Module, batch: PackedBatch, beta: float, alpha: float) -> Tensor:
    """Computes the mean TDPO2 loss by the authors' arithmetic: [2P, T, V] logits of both models, every position."""
    mask = (batch.tree_ids >= 0).long()
    logits = policy(input_ids=batch.input_ids, attention_mask=mask).logits.to(torch.float32)
    with torch.no_grad():
        ref_logits = reference(input_ids=batch.input_ids, attention_mask=mask).logits.to(torch.float32)
    labels, response = batch.input_ids[:, 1:], batch.branch_ids[:, 1:] > 0
    probabilities = ref_logits[:, :-1].softmax(-1)
    log_probabilities, ref_log_probabilities = logits[:, :-1].log_softmax(-1), ref_logits[:, :-1].log_softmax(-1)
    kl = (probabilities * (ref_log_probabilities - log_probabilities)).sum(-1)
    index = labels[..., None]
    ratio = (log_probabilities.gather(2, index) - ref_log_probabilities.gather(2, index))[..., 0]
    ratio, kl = (ratio * response).sum(-1), (kl * response).sum(-1)
    stats = PairStats(ratio[::2], ratio[1::2], kl[::2], kl[1::2])
    return objectives.tdpo2(beta, alpha)(stats).loss.mean()


def step_of(name: str, policy: Any, reference: FrozenCopy, pairs: list[TokenisedPair], tokenizer: Any) -> Step:
    """Returns the forward of one implementation's step, as a function that computes its mean loss."""
    if name.startswith("trl-dpo"):
        return trl_step(policy, reference, pairs, tokenizer, compacted=name.endswith("compacted"))
    if name == "trl-tdpo2":
        return trl_tdpo2_step(policy, reference, pairs)
    if name == "liger-dpo":
        return liger_step(policy, reference, pairs)
    if name == "tdpo2-padded-naive":
        batch = pack_padded(pairs).to(policy.device)
        return lambda: authors_loss(policy, reference.model, batch, 0.1, 0.5)
    if name == "tdpo2-weighted":
        pairs = [replace(pair, **random_weights(pair)) for pair in pairs]
    objective = {"dpo": objectives.dpo(0.1), "tbpo": objectives.tbpo(0.1)}.get(name, objectives.tdpo2(0.1, 0.5))
    pack = pack_padded if name.endswith("padded") else pack_trees
    return lambda: batch_loss(policy, reference, pack(pairs).to(policy.device), objective)[0] / len(pairs)


def random_weights(pair: TokenisedPair) -> dict[str, list[float]]:
    """Draws a weight between 0.5 and 1.5 for the log-ratio and for the KL of every response token."""
    sizes = {name: len(pair.chosen_ids if name.startswith("chosen") else pair.rejected_ids) for name in WEIGHTS}
    return {name: (0.5 + torch.rand(size)).tolist() for name, size in sizes.items()}


def trl_step(policy: Any, reference: FrozenCopy, pairs: list[TokenisedPair], tokenizer: Any, compacted: bool) -> Step:
    """Returns the loss of TRL's DPOTrainer on the same token ids, by its own collator and loss.

    On a GPU TRL multiplies only response tokens with the head, on a CPU every position. ``compacted`` switches the
    former on anywhere.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import utils

    if compacted:
        utils._use_triton = lambda device: True  # the choice of positions alone; kernels are chosen elsewhere

    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{column: list(getattr(pair, column)) for column in columns} for pair in pairs]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    args = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=len(pairs), beta=0.1, max_length=None,
        use_cpu=policy.device.type == "cpu",
        report_to="none", bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    text = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    trainer = DPOTrainer(
        model=policy, ref_model=reference.model, args=args, train_dataset=text, processing_class=tokenizer
    )
    batch = {name: value.to(policy.device) for name, value in trainer.data_collator(rows).items()}
    return lambda: trainer.compute_loss(policy, dict(batch))


def padded_sides(pairs: list[TokenisedPair], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns ids ``[2P, T]`` of padded rows, all chosen ones first, and labels ``[2P, T - 1]``, -100 off responses."""
    batch = pack_padded(pairs).to(device)
    order = torch.cat((torch.arange(0, 2 * len(pairs), 2), torch.arange(1, 2 * len(pairs), 2)))
    ids, branches = batch.input_ids[order], batch.branch_ids[order]
    return ids, ids[:, 1:].masked_fill(branches[:, 1:] <= 0, -100)


def trl_tdpo2_step(policy: Any, reference: FrozenCopy, pairs: list[TokenisedPair]) -> Step:
    """Returns TDPO2 made of TRL's parts: its chunked log-probabilities and its chunked KL, of response tokens alone."""
    ids, labels = padded_sides(pairs, policy.device)
    mask = labels != -100

    def per_response(values: Tensor) -> Tensor:
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, values).sum(1)

    def step() -> Tensor:
        ref_lm: Any = reference.model
        with torch.no_grad():
            ref_states = ref_lm.base_model(input_ids=ids).last_hidden_state[:, :-1][mask]
        states = policy.base_model(input_ids=ids).last_hidden_state[:, :-1][mask]
        sides = Hidden(states, Head(policy.lm_head.weight)), Hidden(ref_states, Head(ref_lm.lm_head.weight))
        logp, ref_logp, kl = trl_stats(*sides, labels[mask])
        ratio, kl, count = per_response(logp - ref_logp), per_response(kl), len(pairs)
        stats = PairStats(ratio[:count], ratio[count:], kl[:count], kl[count:])
        return objectives.tdpo2(0.1, 0.5)(stats).loss.mean()

    return step


def liger_step(policy: Any, reference: FrozenCopy, pairs: list[TokenisedPair]) -> Step:
    """Returns Liger's fused DPO loss on the hidden states of padded rows; compiled only where it is on a GPU."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    ids, labels = padded_sides(pairs, policy.device)
    loss = LigerFusedLinearDPOLoss(beta=0.1, use_ref_model=True, compiled=torch.cuda.is_available())

    def step() -> Tensor:
        with torch.no_grad():
            ref_states = reference.model.base_model(input_ids=ids).last_hidden_state[:, :-1]
        states = policy.base_model(input_ids=ids).last_hidden_state[:, :-1]
        head, ref_head = policy.lm_head.weight, reference.model.lm_head.weight
        return loss(head, states, labels, ref_input=ref_states, ref_weight=ref_head)[0]

    return step


def draw_pairs(data: str, tokenizer: str, rows: int, count: int, seed: int) -> tuple[list[TokenisedPair], Any]:
    """Draws pairs among the first rows of a dataset, at most 512 tokens a sequence; returns them and the tokenizer."""
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    if data == SHORT:
        generator = torch.Generator().manual_seed(seed)
        sizes = SHORT_PROMPT, SHORT_RESPONSE, SHORT_RESPONSE
        parts = [[torch.randint(len(loaded), (n,), generator=generator).tolist() for n in sizes] for _ in range(count)]
        return [TokenisedPair(prompt, chosen, rejected) for prompt, chosen, rejected in parts], loaded
    dataset = prepare_pairs(read_source(data, "train")[:rows], Tokeniser(loaded, Lengths(LONGEST, LONGEST // 2)))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    return [dataset[index] for index in order[:count]], loaded


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Counts and times one implementation in this process: median seconds of a step, and memory above the models."""
    torch.set_num_threads(options.threads)
    pairs, tokenizer = draw_pairs(options.pairs, options.tokenizer, options.rows, options.batch_size, options.seed)
    vocab_size = options.vocabulary or len(tokenizer)
    policy, reference = models(vocab_size, LONGEST, options.width)
    policy.lm_head.requires_grad_(options.head == "trained")
    step = step_of(options.implementation, policy, reference, pairs, tokenizer)
    loss, norm = torch.zeros(()), torch.zeros(())

    def full_step() -> None:
        nonlocal loss, norm
        loss = step()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in policy.parameters() if p.grad is not None]).norm()
        policy.zero_grad()

    response_tokens = sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    timed = {}
    if options.repetitions:
        mebibytes = peak_above(full_step)  # the first step: later ones find memory that is kept for them
        timed = {"seconds": statistics.median(seconds_of(full_step, options.repetitions)), "mebibytes": mebibytes}
    counts = counts_of(full_step, policy, reference.model, 2 * len(pairs) * LONGEST, response_tokens)
    return {
        **timed,
        "loss": loss.item(),
        "gradient_norm": norm.item(),
        "response_tokens": float(response_tokens),
        **counts,
    }


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs every implementation in turn, round after round with other pairs, and returns a row for each."""
    settings = [{"implementation": name} for name in options.compare]
    results = dict(
        zip(options.compare, in_turn(__file__, settings, options.rounds, words_of(options, STEP_OPTIONS)), strict=True)
    )
    ours = results["tdpo2"]
    return [row(name, runs, ours) for name, runs in results.items() if runs]


def row(name: str, runs: list[dict[str, float]], ours: list[dict[str, float]]) -> dict[str, Any]:
    """Computes medians over rounds, and the ratios to ours round by round."""
    result: dict[str, Any] = {"implementation": name}
    for figure, digits in (("seconds", 3), ("mebibytes", 0)) if "seconds" in runs[0] else ():
        values = [run[figure] for run in runs]
        result[figure] = round(statistics.median(values), digits)
        result |= ratio_columns(figure, "tdpo2", [our[figure] for our in ours], values)
    for figure, digits in COUNTED.items():
        result[figure] = round(statistics.median(run[figure] for run in runs), digits)
    return result | {
        "loss_first_round": round(runs[0]["loss"], 6),
        "gradient_norm_first_round": round(runs[0]["gradient_norm"], 6),
    }


def main() -> None:
    """Measures one implementation, or compares all and writes a CSV."""
    parser = pairs_parser(__doc__)
    parser.add_argument("--width", type=int, default=256, help="of the model")
    parser.add_argument("--vocabulary", type=int, default=0, help="of the model; 0 for the tokenizer's")
    parser.add_argument("--head", choices=("trained", "frozen"), default="trained", help="frozen as under adapters")
    parser.add_argument("--compare", nargs="+", default=list(IMPLEMENTATIONS), choices=IMPLEMENTATIONS)
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, help="measure this one here and print JSON")
    parser.add_argument("--csv", default="benchmarks/results/step.csv")
    options = parser.parse_args()
    if options.implementation:
        print(json.dumps(measure(options)))
        return
    settings = {name: getattr(options, name) for name in ("batch_size", "rounds", "width", "vocabulary", "head")}
    named = machine(options) | settings | {"pairs": Path(options.pairs).name}
    rows = compare(options)
    write_csv(options.csv, [result | named for result in rows])
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
