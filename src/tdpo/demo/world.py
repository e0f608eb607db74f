"""The small world's parts: tokenizer, model, texts and prompts, and preference pairs made from sampled completions."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tdpo.demo.grammar import distinct_texts, reward
from tdpo.errors import UserError
from tdpo.evaluate.generate import Sampling, sample_ids
from tdpo.files import json_lines

END_OF_TEXT = "<|endoftext|>"
POSITIONS = 512
VOCABULARY = 768
PREFIX_WORDS = (3, 6)
DRAWS_PER_PROMPT = 100
"""Texts drawn for each prompt wanted before it is clear that there are not that many."""


Ranked = tuple[str, list[tuple[float, str]]]
"""A prompt and its finished completions, best first, each after the reward of prompt and completion together."""


def make_texts(
    sft: int, train_prompts: int, held_out_prompts: int, seed: int
) -> tuple[list[str], list[str], list[str]]:
    """Draws texts to fine-tune on, prompts for preference pairs, and held-out prompts.

    Every text is distinct, and so is every prompt across both splits. Prompts are the first three to six words of texts
    that are not among those to fine-tune on.

    Raises:
        UserError: if the grammar does not have that many prompts.
    """
    rng = random.Random(seed)
    source = distinct_texts(rng)
    texts = list(islice(source, sft))
    wanted = train_prompts + held_out_prompts
    prompts: dict[str, None] = {}  # a set that keeps its order
    for text in islice(source, DRAWS_PER_PROMPT * wanted):
        prompts[" ".join(text.split()[: rng.randint(*PREFIX_WORDS)])] = None
        if len(prompts) == wanted:
            return texts, list(prompts)[:train_prompts], list(prompts)[train_prompts:]
    raise UserError(
        f"the grammar has no {wanted} distinct prompts; --train_prompts and --held_out_prompts are too many"
    )


def build_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer: any text round-trips, and none needs an unknown token.

    ``<|endoftext|>`` ends sequences and pads. Nothing is put in front of a text.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int, width: int = 96, layers: int = 3) -> LlamaForCausalLM:
    """Builds a small Llama with random weights and a tied head; the caller's random state is left as it was."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=POSITIONS, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return LlamaForCausalLM(config)


def rank_samples(model: nn.Module, tokenizer: Any, prompts: Sequence[str], sampling: Sampling) -> list[Ranked]:
    """Samples completions of every prompt and ranks them by reward.

    Completions that are empty, or ran to the length limit without ending, are left out: a pair must be two whole
    responses.
    """
    ids = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    drawn = sample_ids(model, ids, sampling, tokenizer.eos_token_id)
    ranked: list[Ranked] = []
    for prompt, samples in zip(prompts, drawn, strict=True):
        finished = [ids[:-1] for ids in samples if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id]
        texts = [text for text in map(tokenizer.decode, finished) if text.strip()]
        ranked.append((prompt, sorted(((reward(prompt + text), text) for text in texts), reverse=True)))
    return ranked


def every_pair(ranked: Iterable[Ranked], margin: float) -> list[dict[str, Any]]:
    """Makes training pairs as the DPO and TDPO papers do for IMDb: of every two completions of a prompt.

    Two completions whose rewards differ by less than ``margin`` say nothing and make no pair, so four samples give up
    to six.

    Returns:
        Rows of the demo's files.

    Raises:
        UserError: for a margin that is not positive, under which equal rewards would count as a preference.
    """
    if not margin > 0:
        raise UserError(f"--min_margin must be positive, got {margin:g}: equal rewards prefer nothing")
    columns = ("prompt", "chosen", "rejected", "chosen_reward", "rejected_reward")
    return [
        dict(zip(columns, (prompt, chosen, rejected, high, low), strict=True))
        for prompt, completions in ranked
        for (high, chosen), (low, rejected) in combinations(completions, 2)
        if high - low >= margin
    ]


def extreme_pairs(ranked: Iterable[Ranked], margin: float) -> list[dict[str, Any]]:
    """Makes held-out pairs of the best and the worst completion of each prompt, so that pairs are independent."""
    return every_pair(((prompt, [found[0], found[-1]]) for prompt, found in ranked if len(found) > 1), margin)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line."""
    path.write_text(json_lines(rows), encoding="utf-8")
