"""Sampling from a causal language model: batched, reproducible, independent of a checkpoint's generation config."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn
from transformers import GenerationConfig

from tdpo.config.checks import check_values, documented
from tdpo.errors import UserError
from tdpo.files import check_writable
from tdpo.models.fingerprint import weights_hash
from tdpo.models.policy import causal_lm, position_limit
from tdpo.models.probe import evaluating


@documented
@dataclass
class Sampling:
    """Sampling options. The defaults are plain ancestral sampling from the model's own distribution.

    Attributes:
        max_new_tokens: Maximum length of a response in tokens, including its end token.
        temperature: Divides the logits; 0 is greedy decoding.
        top_p: Nucleus sampling from the most probable tokens with this total probability; 1 turns it off.
        top_k: Samples from the k most probable tokens; 0 turns it off.
        num_samples: Responses per prompt and model.
        batch_size: Sequences generated at a time. Sampled responses depend on it; greedy ones do not.
        seed: Seed of the samples, the same for every model.
        samples_dir: Folder to save every finished batch of responses in; after an interruption, the same command
            resumes from it.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    num_samples: int = 1
    batch_size: int = 32
    seed: int = 0
    samples_dir: str | None = None

    def __post_init__(self) -> None:
        check_values(self, max_new_tokens=1, num_samples=1, batch_size=1, temperature=0, top_k=0, seed=0)
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p must be in (0, 1], got {self.top_p}")


def sample_ids(
    model: nn.Module, prompts: Sequence[list[int]], sampling: Sampling, eos_token_id: int | Sequence[int] | None
) -> list[list[list[int]]]:
    """Samples responses to P prompts.

    The model runs in evaluation mode, and its mode is restored. Its ``generation_config`` is replaced temporarily, so
    no default of the checkpoint (a top-k of 50, a repetition penalty) changes the distribution.

    Args:
        model: A transformers causal language model, with or without a LoRA adapter.
        prompts: Token ids of each prompt, at least one.
        sampling: Sampling options.
        eos_token_id: Token or tokens that end a response; None to always sample ``max_new_tokens``.

    Returns:
        ``result[p][s]``: ids of sample s for prompt p, up to and including the end token if there is one, in the
        order of the prompts.

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
    # Prompts of similar length share a batch: less padding. The sort is stable, so samples depend on the input alone.
    jobs = sorted((p for p in range(len(prompts)) for _ in range(sampling.num_samples)), key=lambda p: len(prompts[p]))
    batches = [jobs[start : start + sampling.batch_size] for start in range(0, len(jobs), sampling.batch_size)]
    store = None if sampling.samples_dir is None else SampleFile.open(sampling, prompts, ends, model)
    lm = causal_lm(model)
    own = lm.generation_config
    held = nullcontext() if store is None else FileLock(store.path.with_suffix(".lock"))
    rng = torch.random.fork_rng(devices=range(torch.cuda.device_count()))
    with held, evaluating(model), rng, torch.no_grad():
        drawn: list[list[list[int]]] = [] if store is None else store.read(batches)
        lm.generation_config = GenerationConfig()  # what is not in an argument, `generate` takes from here
        try:
            for index in range(len(drawn), len(batches)):
                # Each batch has its own seed, so a resumed run draws the same samples as an uninterrupted one.
                torch.manual_seed(step_seed(sampling.seed, index))
                found = _generate(lm, [prompts[p] for p in batches[index]], config)
                drawn.append([ids[: _length(ids, ends)] for ids in found])
                if store is not None:
                    store.append(drawn[-1])
        finally:
            lm.generation_config = own
    results: list[list[list[int]]] = [[] for _ in prompts]
    for batch, responses in zip(batches, drawn, strict=True):
        for p, response in zip(batch, responses, strict=True):
            results[p].append(response)
    return results


def step_seed(seed: int, step: int) -> int:
    """Returns the seed of one batch or iteration: a resumed run draws the same samples as an uninterrupted one."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def decode_response(tokenizer: Any, prompt: list[int], response: list[int]) -> str:
    """Decodes a response after its prompt, since tokenizers drop a space at the beginning of a text.

    Args:
        tokenizer: The tokenizer.
        prompt: Token ids of the prompt.
        response: Token ids of the response; special tokens are skipped.
    """
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    text: str = tokenizer.decode([*prompt, *response], skip_special_tokens=True)
    # A character whose bytes end in the response belongs to neither; then the response is decoded alone.
    return text[len(before) :] if text.startswith(before) else tokenizer.decode(response, skip_special_tokens=True)


class SampleFile:
    """Saves finished batches of samples in a JSON lines file, named by a hash of weights, prompts and options.

    Samples of another run are therefore never read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(
        cls, sampling: Sampling, prompts: Sequence[list[int]], ends: Sequence[int], model: nn.Module
    ) -> SampleFile:
        """Returns the file for these draws in ``sampling.samples_dir``, which is created if it does not exist.

        Raises:
            UserError: if the folder is not writable.
        """
        folder = Path(str(sampling.samples_dir)).expanduser()
        check_writable(folder)
        options = {name: getattr(sampling, name) for name in Sampling.__dataclass_fields__ if name != "samples_dir"}
        made_of = [options, [list(prompt) for prompt in prompts], list(ends), weights_hash(model)]
        return cls(folder / f"{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]}.jsonl")

    def read(self, batches: Sequence[Sequence[int]]) -> list[list[list[int]]]:
        """Returns the finished batches; removes an incomplete last line from the file."""
        if not self.path.exists():
            return []
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            os.truncate(self.path, len(whole))
        found = [json.loads(line) for line in whole.splitlines()]
        if [len(batch) for batch in found] != [len(batch) for batch in batches[: len(found)]]:
            raise UserError(f"{self.path}: is damaged; remove it, and its samples are drawn again")
        return found

    def append(self, responses: Sequence[list[int]]) -> None:
        """Appends one batch."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(list(responses)) + "\n")


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Returns all tokens that end a response: the tokenizer's, and those of the generation config (end of turn)."""
    named = causal_lm(model).generation_config.eos_token_id
    tokens = [tokenizer.eos_token_id, *(named if isinstance(named, list | tuple) else [named])]
    return list(dict.fromkeys(token for token in tokens if token is not None))


def _length(ids: list[int], ends: Sequence[int]) -> int:
    """Returns the number of tokens up to and including the first end token."""
    return next((index + 1 for index, token in enumerate(ids) if token in ends), len(ids))


def _generation_config(sampling: Sampling, ends: list[int]) -> GenerationConfig:
    """Returns a config with every setting explicit: transformers sets a missing top_k to 50."""
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
        remove_invalid_values=True,  # a model that diverged is measured (as NaN) too; on a GPU NaNs end the process
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
