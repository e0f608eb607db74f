"""Options, prompts and rewards shared by the RLHF baselines, so that their runs differ only in the algorithm."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from tdpo.config.checks import check_values, documented
from tdpo.data.tokenise import Tokeniser
from tdpo.errors import UserError
from tdpo.evaluate.generate import decode_response, end_tokens
from tdpo.evaluate.prompts import Prompt
from tdpo.files import atomic_write, check_writable
from tdpo.models.fingerprint import weights_hash
from tdpo.models.policy import position_limit

Reward = Callable[[Sequence[Mapping[str, Any]]], Sequence[float]]
"""Scores rows with ``prompt`` and ``response``, one number for each."""
OnMeasure = Callable[[int, nn.Module], None]
"""Called with the number of finished iterations and the policy."""
OnLog = Callable[[int, dict[str, float]], None]
"""Called after every iteration with its number, from 1, and its metrics."""

RUN = "run.json"
"""File that identifies the run whose checkpoints are in the folder."""
WITHOUT_EFFECT = ("steps", "eval_every")
"""Options that may differ when a run is resumed: no iteration depends on them."""


@documented
@dataclass
class RLOptions:
    """Options of both RLHF baselines.

    An iteration samples responses to ``batch_size`` prompts from the policy, scores them and updates the policy on
    them. With the same seed, both baselines use the same prompts in the same order.

    Attributes:
        beta: Coefficient of KL(policy || reference), in units of reward per nat.
        learning_rate: Learning rate of AdamW, constant, without weight decay.
        steps: Number of iterations.
        batch_size: Prompts per iteration.
        max_new_tokens: Maximum length of a response in tokens, including its end token.
        temperature: Divides the logits of policy and reference, in sampling and in every log-probability.
        seed: Seed of the order of prompts and of samples.
        eval_every: Iterations between measurements; the policy is also measured after the last iteration.
        max_grad_norm: Maximum norm of the gradient, for clipping.
        missing_end_penalty: Subtracted from the reward of a response without an end token within --max_new_tokens.
    """

    beta: float = 0.05
    learning_rate: float = 1e-6
    steps: int = 100
    batch_size: int = 64
    max_new_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0
    eval_every: int = 20
    max_grad_norm: float = 1.0
    missing_end_penalty: float = 0.0

    def __post_init__(self) -> None:
        check_values(self, beta=0, steps=1, batch_size=1, max_new_tokens=1, seed=0, eval_every=1)
        check_values(self, missing_end_penalty=0)
        check_positive(self, "learning_rate", "temperature", "max_grad_norm")

    def measured(self, step: int) -> bool:
        """Returns True if the policy is measured after this iteration."""
        return step % self.eval_every == 0 or step == self.steps


def check_positive(options: Any, *names: str) -> None:
    """Raises an error for values that are not greater than 0; None is skipped.

    Raises:
        UserError: naming the first such option.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be positive, got {value:g}")


class ScoredPrompts:
    """The encoded prompts of a run, and the reward of responses to them.

    Args:
        policy: The policy, whose end tokens end responses.
        tokenizer: Its tokenizer.
        prompts: Texts or lists of chat messages, or :class:`~tdpo.evaluate.prompts.Prompt` with their token ids.
        reward: Scores responses.
        options: The options of the run.

    Attributes:
        prompts: The prompts as texts or messages.
        ids: Token ids of each prompt.
        ends: Tokens that end a response.
        order: Prompt indices of all iterations, ``batch_size`` for each: random permutations of all prompts.

    Raises:
        UserError: if there are no prompts, or a prompt plus ``max_new_tokens`` exceeds the policy's positions.
    """

    def __init__(
        self, policy: nn.Module, tokenizer: Any, prompts: Sequence[Any], reward: Reward, options: RLOptions
    ) -> None:
        if not len(prompts):
            raise UserError("there are no prompts to train on")
        self.tokenizer, self.reward, self.options = tokenizer, reward, options
        encoded = [prompt for prompt in prompts if isinstance(prompt, Prompt)]
        self.prompts = [prompt.content for prompt in encoded] or list(prompts)
        self.ids = [prompt.ids for prompt in encoded] or Tokeniser(tokenizer).prompts(self.prompts)
        self.ends = end_tokens(policy, tokenizer)
        self.order = random_passes(len(self.prompts), options.steps * options.batch_size, options.seed)
        positions, longest = position_limit(policy), max(map(len, self.ids))
        if positions is not None and longest + options.max_new_tokens > positions:
            raise UserError(
                f"the longest prompt has {longest} tokens; with --max_new_tokens {options.max_new_tokens} that exceeds "
                f"the {positions} positions of the model"
            )

    def score(self, indices: Sequence[int], responses: Sequence[list[int]]) -> list[float]:
        """Computes the rewards of responses to the prompts at ``indices``, minus the penalty for a missing end.

        Raises:
            UserError: if the reward does not return one finite number per response.
        """
        rows = [
            {"prompt": self.prompts[i], "response": decode_response(self.tokenizer, self.ids[i], response)}
            for i, response in zip(indices, responses, strict=True)
        ]
        rewards = [float(value) for value in self.reward(rows)]
        if len(rewards) != len(rows):
            raise UserError(f"the reward returned {len(rewards)} numbers for {len(rows)} responses")
        for row, value in zip(rows, rewards, strict=True):
            if not math.isfinite(value):
                raise UserError(f"the reward of the response {row['response'][:200]!r} is {value}, not a finite number")
        penalty = self.options.missing_end_penalty
        return [
            value - penalty * (response[-1] not in self.ends)
            for value, response in zip(rewards, responses, strict=True)
        ]


def random_passes(size: int, count: int, seed: int) -> list[int]:
    """Returns the first ``count`` indices of concatenated random permutations of ``range(size)``.

    Examples:
        >>> order = random_passes(3, 7, seed=0)
        >>> sorted(order[:3]), sorted(order[3:6]), len(order)
        ([0, 1, 2], [0, 1, 2], 7)
    """
    passes = range(-(-count // size))
    return [int(i) for p in passes for i in np.random.default_rng([seed, p]).permutation(size)][:count]


def claim_folder(folder: Path, prompts: ScoredPrompts, policy: nn.Module, reference: nn.Module) -> None:
    """Marks a folder as that of a run, or checks that it holds this run: same options, prompts and initial weights.

    Raises:
        UserError: if it is the folder of another run, or is not writable.
    """
    options = {name: value for name, value in asdict(prompts.options).items() if name not in WITHOUT_EFFECT}
    made_of = [options, prompts.ids, prompts.ends, weights_hash(policy), weights_hash(reference)]
    now = {
        "kind": type(prompts.options).__name__,
        "options": options,
        "sha256": hashlib.sha256(json.dumps(made_of).encode()).hexdigest(),
    }
    check_writable(folder)
    path = folder / RUN
    if not path.exists():
        atomic_write(path, json.dumps(now, indent=2) + "\n")
    elif json.loads(path.read_text(encoding="utf-8")) != now:
        raise UserError(
            f"{folder}: holds a run with other options, prompts or models, see its {RUN}; choose another folder, or "
            "remove it"
        )


def check_steps(checkpoint: Path, done: int, options: RLOptions) -> None:
    """Raises an error for a checkpoint of an iteration after the last one.

    Raises:
        UserError: naming the checkpoint.
    """
    if done > options.steps:
        raise UserError(f"{checkpoint}: is of iteration {done}, after --steps {options.steps}; remove it to start over")
