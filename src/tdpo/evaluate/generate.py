"""Sampling from a causal language model: batched, reproducible, and free of what a checkpoint's defaults would add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from tdpo.config.checks import check_values, documented
from tdpo.errors import UserError
from tdpo.models.policy import causal_lm, position_limit
from tdpo.models.probe import evaluating


@documented
@dataclass
class Sampling:
    """How responses are drawn. The defaults are plain ancestral sampling from the model's own distribution.

    Attributes:
        max_new_tokens: Longest response in tokens, its end token included.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Nucleus sampling: the likeliest tokens that together have this probability; 1 is off.
        top_k: Samples among the k likeliest tokens; 0 is off.
        num_samples: Responses per prompt and model.
        batch_size: Sequences generated at a time. Sampled responses depend on it, the likeliest ones do not.
        seed: Seed of the draws, the same for every model.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    num_samples: int = 1
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        check_values(self, max_new_tokens=1, num_samples=1, batch_size=1, temperature=0, top_k=0)
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p must be in (0, 1], got {self.top_p}")


def sample_ids(
    model: nn.Module, prompts: Sequence[list[int]], sampling: Sampling, eos_token_id: int | Sequence[int] | None
) -> list[list[list[int]]]:
    """Samples responses to P prompts.

    The model runs in evaluation mode and is returned in the mode it had. Its ``generation_config`` is replaced
    meanwhile, so no default of the checkpoint (a top-k of 50, a repetition penalty) changes the distribution.

    Args:
        model: A transformers causal language model, with or without a LoRA adapter.
        prompts: Token ids of each prompt, at least one.
        sampling: How to draw.
        eos_token_id: The token (or any of the tokens) that ends a response; None to always run to the full length.

    Returns:
        ``result[p][s]``: ids of sample s for prompt p, the end token included where one was produced and nothing
        after it. Prompts keep their order.

    Raises:
        UserError: for an empty prompt, or one that with ``max_new_tokens`` exceeds the positions of the model.
    """
    positions = position_limit(model)
    for number, prompt in enumerate(prompts, start=1):
        if not len(prompt):
            raise UserError(f"prompt {number} has no tokens; a response needs at least one to start from")
        if positions is not None and len(prompt) + sampling.max_new_tokens > positions:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens; with --max_new_tokens {sampling.max_new_tokens} that "
                f"exceeds the {positions} positions of the model"
            )
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
    config = _generation_config(sampling, ends)
    # Prompts of like length share a batch: less padding. The sort is stable, so the draws depend on the input alone.
    jobs = sorted((p for p in range(len(prompts)) for _ in range(sampling.num_samples)), key=lambda p: len(prompts[p]))
    results: list[list[list[int]]] = [[] for _ in prompts]
    lm = causal_lm(model)
    own = lm.generation_config
    with evaluating(model), torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
        torch.manual_seed(sampling.seed)
        lm.generation_config = GenerationConfig()  # what is not in an argument, `generate` takes from here
        try:
            for start in range(0, len(jobs), sampling.batch_size):
                batch = jobs[start : start + sampling.batch_size]
                for p, response in zip(batch, _generate(lm, [prompts[p] for p in batch], config), strict=True):
                    end = next((index + 1 for index, token in enumerate(response) if token in ends), None)
                    results[p].append(response[:end])
        finally:
            lm.generation_config = own
    return results


def _generation_config(sampling: Sampling, ends: list[int]) -> GenerationConfig:
    """Makes every setting explicit: transformers fills a missing top_k with 50."""
    drawing: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        names = ("temperature", "top_p", "top_k")
        drawing = {"do_sample": True, **{name: getattr(sampling, name) for name in names}}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        num_beams=1,
        num_return_sequences=1,
        repetition_penalty=1.0,
        eos_token_id=ends or None,
        pad_token_id=0,  # any token: it fills short prompts and ended responses, and is neither seen nor kept
        **drawing,
    )


def _generate(lm: Any, prompts: Sequence[list[int]], config: GenerationConfig) -> list[list[int]]:
    """Samples one batch, left-padded so that every response starts in the same column."""
    width = max(len(prompt) for prompt in prompts)
    device = next(lm.parameters()).device
    rows = [[config.pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ids, attended = torch.tensor(rows, device=device), torch.tensor(mask, device=device)
    sequences: Tensor = lm.generate(input_ids=ids, attention_mask=attended, generation_config=config)
    return sequences[:, width:].tolist()
