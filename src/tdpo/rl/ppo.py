"""PPO (arXiv 1707.06347) for RLHF, in one file: rollouts, GAE, clipped updates, checkpoints.

An iteration is :meth:`_Run.iterate`: sample a response to each prompt, score it, compute advantages, and update policy
and value model in ``epochs`` passes of minibatches. Not implemented, as comparisons at fixed beta do not need them: an
adaptive KL coefficient, running normalisation of rewards, and early stopping of the epochs.

Shape legend: S responses of a rollout, T tokens of the longest, N response tokens of a minibatch, D width of the
hidden states.
"""

from __future__ import annotations

import copy
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import override

from tdpo.config.checks import check_values, documented, option
from tdpo.data.pack import pack_sequences
from tdpo.errors import UserError
from tdpo.evaluate.divergence import token_divergence
from tdpo.evaluate.generate import Sampling, sample_ids, step_seed
from tdpo.files import PARTIAL, flush
from tdpo.models.hidden import response_hidden, response_states
from tdpo.models.policy import body_of
from tdpo.models.probe import evaluating
from tdpo.ops import response_logp
from tdpo.ops.numerics import statistics_dtype
from tdpo.rl.common import (
    OnLog,
    OnMeasure,
    Reward,
    RLOptions,
    ScoredPrompts,
    check_positive,
    check_steps,
    claim_folder,
)
from tdpo.types import Hidden, PackedBatch

CHECKPOINT = "ppo.pt"


@documented
@dataclass
class PPOOptions(RLOptions):
    """Options of PPO.

    Attributes:
        epochs: Passes over the responses of an iteration.
        minibatch_size: Responses per optimizer step, and per forward pass.
        clip_range: Clipping range epsilon of the probability ratio in the policy loss.
        value_clip: Clipping range of values in the value loss; None to not clip.
        gamma: Discount per token.
        lam: Lambda of GAE: 1 for the return minus the value, 0 for the one-step TD error.
        value_coef: Weight of the value loss. Policy and value model share no weights, so it only matters for their
            common gradient norm, which --max_grad_norm clips.
        kl_in: Location of the KL penalty: ``reward`` subtracts it from the reward of every token, so that a token's
            return includes the KL of later tokens; ``loss`` adds it to the loss of the token alone.
        whiten_advantages: Normalise the advantages of an iteration to mean 0 and standard deviation 1; a KL penalty
            in the loss is scaled by the same factor, so that beta keeps its meaning.
    """

    epochs: int = 4
    minibatch_size: int = 16
    clip_range: float = 0.2
    value_clip: float | None = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    value_coef: float = 0.1
    kl_in: str = option("reward", choices=("reward", "loss"))
    whiten_advantages: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_values(self, epochs=1, minibatch_size=1, gamma=0, lam=0, value_coef=0)
        check_positive(self, "clip_range", "value_clip")
        for name in ("gamma", "lam"):
            if getattr(self, name) > 1:
                raise UserError(f"--{name} must be at most 1, got {getattr(self, name):g}")


def train_ppo(
    policy: nn.Module,
    reference: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Any],
    reward: Reward,
    options: PPOOptions,
    on_measure: OnMeasure,
    folder: Path | None = None,
    on_log: OnLog | None = None,
) -> None:
    """Trains a policy with PPO, in place: maximises E[reward] - beta KL(policy || reference) over its own responses.

    The same seed gives the same weights, bit for bit on the same hardware, also if the run was interrupted.

    Args:
        policy: A causal language model. Models run without dropout; the policy's training mode is restored.
        reference: The reference, which is not changed; the value model starts as a copy of it.
        tokenizer: The tokenizer of both.
        prompts: Texts or lists of chat messages, or :class:`~tdpo.evaluate.prompts.Prompt` with their token ids.
        reward: Scores rows with ``prompt`` and ``response``.
        options: Options of the run.
        on_measure: Called with the number of finished iterations and the policy, every ``eval_every`` of them and at
            the end.
        folder: Folder to write a checkpoint to after every measurement, and to resume from if it has one; None for
            no checkpoints.
        on_log: Called with the metrics of every iteration: ``reward`` (minus penalties for missing ends), ``kl``
            (KL(policy || reference) of the sampled responses in nats), ``entropy`` (nats per token), ``length``,
            ``clip_fraction`` and ``value_loss``.

    Raises:
        UserError: for prompts that do not fit the model, a reward that is not one finite number for each response, and
            a folder that is not writable or holds the checkpoint of another run.

    Source: Schulman et al. (arXiv 1707.06347); for language models Ziegler et al. (arXiv 1909.08593).
    """
    scored = ScoredPrompts(policy, tokenizer, prompts, reward, options)
    run, done = _Run(policy, reference, scored, options), 0
    if folder is not None:
        claim_folder(Path(folder), scored, policy, reference)
        done = run.restore(Path(folder))
    with evaluating(policy, reference):
        for step in range(done + 1, options.steps + 1):
            metrics = run.iterate(step)
            if on_log is not None:
                on_log(step, metrics)
            if options.measured(step):
                on_measure(step, policy)
                if folder is not None:
                    run.save(Path(folder), step)


class ValueModel(nn.Module):
    """Predicts the return at every response token: a copy of a model with a linear head that is initialised to 0.

    Sharing the policy's body would cost less, but the value loss would change the policy's hidden states, and
    ``value_coef`` would have to be tuned for every reward.

    Args:
        model: The model to copy: the SFT model, which the policy is initialised from.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        body_of(self.model).requires_grad_(True)
        weight = next(body_of(self.model).parameters())
        width = self.model.get_output_embeddings().weight.shape[1]  # type: ignore[operator]
        kind = {"device": weight.device, "dtype": statistics_dtype(weight.dtype)}
        self.head = skip_init(nn.Linear, width, 1, **kind)  # draws no random numbers
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @override
    def forward(self, batch: PackedBatch) -> Tensor:
        states_ND = response_states(self.model, batch)
        return self.head(states_ND.to(self.head.weight.dtype))[:, 0]

    def trained(self) -> list[nn.Parameter]:
        """Returns the trainable parameters."""
        return [*body_of(self.model).parameters(), *self.head.parameters()]


@dataclass(frozen=True)
class Rollout:
    """Responses of an iteration with the statistics for its update, computed before the update, in nats.

    Attributes:
        prompts: Token ids of the prompt of each response.
        responses: Token ids of the S responses.
        mask: ``[S, T]`` bool, True at response tokens; the other tensors are 0 elsewhere.
        logp: ``[S, T]``, log pi(y_t).
        ref_logp: ``[S, T]``, log pi_ref(y_t).
        values: ``[S, T]``, the value of the state before y_t.
        advantages: ``[S, T]``.
        returns: ``[S, T]``, advantages before whitening plus values: the targets of the value loss.
        kl_weight: Weight of the KL penalty in the loss.
        metrics: Means over the responses, to log.
    """

    prompts: Sequence[list[int]]
    responses: Sequence[list[int]]
    mask: Tensor
    logp: Tensor
    ref_logp: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    kl_weight: Tensor
    metrics: dict[str, Tensor]

    def pack(self, rows: Sequence[int]) -> PackedBatch:
        """Packs some of the responses for a forward pass."""
        batch = pack_sequences([self.prompts[i] for i in rows], [self.responses[i] for i in rows])
        return batch.to(self.mask.device)

    def tokens(self, name: str, rows: Sequence[int]) -> Tensor:
        """Returns a statistic ``[N]`` of the tokens of some of the responses, in the order of :meth:`pack`."""
        values_ST: Tensor = getattr(self, name)
        return values_ST[list(rows)][self.mask[list(rows)]]


def tempered(hidden: Hidden, temperature: float) -> Hidden:
    """Returns hidden states with a head whose logits are divided by the temperature, after any soft cap."""
    head = hidden.head
    soft_cap = None if head.soft_cap is None else head.soft_cap / temperature
    return replace(hidden, head=replace(head, scale=head.scale / temperature, soft_cap=soft_cap))


def score_rollout(
    policy: nn.Module,
    reference: nn.Module,
    value_model: nn.Module,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    rewards: Sequence[float],
    options: PPOOptions,
) -> Rollout:
    r"""Computes log-probabilities, values and advantages of sampled responses.

    .. math::
        r_t = [t = T] \, R - \beta \, (\log \pi(y_t) - \log \pi_{ref}(y_t))

    with the second term for ``kl_in="reward"`` only.

    Args:
        policy: The policy that sampled the responses.
        reference: The reference.
        value_model: Maps a packed batch to values ``[N]``.
        prompts: Token ids of the prompt of each response.
        responses: Token ids of the S responses.
        rewards: R of each response.
        options: Options of the run.
    """
    device = next(policy.parameters()).device
    columns: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(responses), options.minibatch_size):
            rows = slice(start, start + options.minibatch_size)
            batch = pack_sequences(prompts[rows], responses[rows]).to(device)
            hidden, ref_hidden = (
                tempered(response_hidden(model, batch), options.temperature) for model in (policy, reference)
            )
            kl, _, logratio, entropy, _ = token_divergence(hidden, ref_hidden, batch.labels)
            logp = response_logp(hidden, batch.labels)
            columns.append(torch.stack((logp, logp - logratio, value_model(batch), kl, entropy)))
    lengths = [len(response) for response in responses]
    logp, ref_logp, values, kl, entropy = (
        pad_sequence(column.split(lengths), batch_first=True) for column in torch.cat(columns, 1)
    )
    length_S = torch.tensor(lengths, device=device)
    mask = torch.arange(logp.shape[1], device=device) < length_S[:, None]
    score_S = torch.tensor(rewards, dtype=logp.dtype, device=device)
    in_reward = options.kl_in == "reward"
    rewards_ST = -options.beta * (logp - ref_logp) if in_reward else torch.zeros_like(logp)
    rewards_ST[torch.arange(len(lengths), device=device), length_S - 1] += score_S
    advantages = generalised_advantages(rewards_ST, values, options.gamma, options.lam)
    returns, scale = advantages + values, logp.new_ones(())
    if options.whiten_advantages:
        scale = 1 / (advantages[mask].std(correction=0) + 1e-8)
        advantages = (advantages - advantages[mask].mean()) * scale * mask
    metrics = {
        "reward": score_S.mean(),
        "kl": kl.sum(1).mean(),
        "entropy": entropy[mask].mean(),
        "length": length_S.double().mean(),
    }
    kl_weight = (0.0 if in_reward else options.beta) * scale
    return Rollout(prompts, responses, mask, logp, ref_logp, values, advantages, returns * mask, kl_weight, metrics)


def generalised_advantages(rewards_ST: Tensor, values_ST: Tensor, gamma: float, lam: float) -> Tensor:
    r"""Computes advantages by generalised advantage estimation, ``[S, T]``.

    .. math::
        \delta_t = r_t + \gamma V_{t+1} - V_t, \qquad A_t = \delta_t + \gamma \lambda A_{t+1}

    Reward and value are 0 after the last token of a response.

    Args:
        rewards_ST: Rewards, 0 after the end of a response.
        values_ST: Values, 0 after the end of a response.
        gamma: Discount per token.
        lam: Lambda.

    Source: Schulman et al. (arXiv 1506.02438), eq. 11 and 16.

    Examples:
        >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
        >>> generalised_advantages(rewards, values, gamma=1.0, lam=0.5).tolist()
        [[0.125, 0.75]]
    """
    advantages_ST, next_S = torch.empty_like(rewards_ST), torch.zeros_like(rewards_ST[:, 0])
    next_value_S = next_S
    for t in reversed(range(rewards_ST.shape[1])):
        delta_S = rewards_ST[:, t] + gamma * next_value_S - values_ST[:, t]
        next_S = delta_S + gamma * lam * next_S
        next_value_S = values_ST[:, t]
        advantages_ST[:, t] = next_S
    return advantages_ST


def policy_loss(logp_N: Tensor, old_logp_N: Tensor, advantages_N: Tensor, clip_range: float) -> Tensor:
    r"""Computes the clipped surrogate loss of every token, ``[N]``.

    .. math::
        -\min\big(\rho A, \, \mathrm{clip}(\rho, 1 - \epsilon, 1 + \epsilon) A\big), \qquad
        \rho = \pi(y_t) / \pi_{old}(y_t)

    Source: Schulman et al. (arXiv 1707.06347), eq. 7.

    Examples:
        >>> ratio, advantages = torch.tensor([1.5, 0.5, 1.5, 0.5]), torch.tensor([1.0, 1.0, -1.0, -1.0])
        >>> [round(loss, 4) for loss in policy_loss(ratio.log(), torch.zeros(4), advantages, 0.2).tolist()]
        [-1.2, -0.5, 1.5, 0.8]
    """
    ratio_N = torch.exp(logp_N - old_logp_N)
    clipped_N = ratio_N.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)


def value_loss(values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, value_clip: float | None) -> Tensor:
    """Computes half the squared error of every value, ``[N]``: the larger error of the value and the clipped value.

    Args:
        values_N: Values.
        old_values_N: Values from before the update.
        returns_N: Targets of the values.
        value_clip: Values are clipped to this distance from the old ones; None to not clip.

    Examples:
        >>> value_loss(torch.tensor([1.0, 1.0]), torch.zeros(2), torch.tensor([2.0, 0.0]), 0.5).tolist()
        [1.125, 0.5]
    """
    errors_N = (values_N - returns_N) ** 2
    if value_clip is not None:
        clipped_N = old_values_N + (values_N - old_values_N).clamp(-value_clip, value_clip)
        errors_N = torch.maximum(errors_N, (clipped_N - returns_N) ** 2)
    return 0.5 * errors_N


def minibatch_loss(
    policy: nn.Module, value_model: nn.Module, rollout: Rollout, rows: Sequence[int], options: PPOOptions
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss of some of the responses, averaged over their tokens, and detached metrics.

    A KL penalty in the loss is half the squared log-ratio of the sampled token; its expected gradient over the policy's
    own samples is that of KL(policy || reference) at the token.
    """
    batch, tokens = rollout.pack(rows), {}
    for name in ("logp", "ref_logp", "values", "advantages", "returns"):
        tokens[name] = rollout.tokens(name, rows)
    logp = response_logp(tempered(response_hidden(policy, batch), options.temperature), batch.labels)
    surrogate = policy_loss(logp, tokens["logp"], tokens["advantages"], options.clip_range).mean()
    penalty = 0.5 * rollout.kl_weight * ((logp - tokens["ref_logp"]) ** 2).mean()
    error = value_loss(value_model(batch), tokens["values"], tokens["returns"], options.value_clip).mean()
    clipped = (torch.exp(logp.detach() - tokens["logp"]) - 1).abs() > options.clip_range
    metrics = {"clip_fraction": clipped.double().mean(), "value_loss": error.detach()}
    return surrogate + penalty + options.value_coef * error, metrics


class _Run:
    """State of a run: the models and the optimizer."""

    def __init__(self, policy: nn.Module, reference: nn.Module, prompts: ScoredPrompts, options: PPOOptions) -> None:
        self.policy, self.reference, self.prompts, self.options = policy, reference, prompts, options
        self.value_model = ValueModel(reference).eval()
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        if not trained:
            raise UserError("no parameter of the policy is trained: requires_grad is False for all of them")
        self.parameters = [*trained, *self.value_model.trained()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=options.learning_rate, weight_decay=0.0)

    def iterate(self, step: int) -> dict[str, float]:
        """Samples a response to each prompt of the iteration and updates both models on them."""
        options, seed = self.options, step_seed(self.options.seed, step)
        indices = self.prompts.order[(step - 1) * options.batch_size : step * options.batch_size]
        ids = [self.prompts.ids[i] for i in indices]
        sampling = Sampling(options.max_new_tokens, options.temperature, batch_size=options.batch_size, seed=seed)
        responses = [samples[0] for samples in sample_ids(self.policy, ids, sampling, self.prompts.ends)]
        rewards = self.prompts.score(indices, responses)
        models = self.policy, self.reference, self.value_model
        rollout = score_rollout(*models, ids, responses, rewards, options)
        seen: dict[str, list[Tensor]] = defaultdict(list)
        for rows in self._minibatches(seed):
            loss, metrics = minibatch_loss(self.policy, self.value_model, rollout, rows, options)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, options.max_grad_norm)
            self.optimizer.step()
            for name, value in metrics.items():
                seen[name].append(value)
        means = rollout.metrics | {name: torch.stack(values).mean() for name, values in seen.items()}
        return {name: value.item() for name, value in means.items()}

    def _minibatches(self, seed: int) -> Iterator[list[int]]:
        size = self.options.minibatch_size
        for epoch in range(self.options.epochs):
            order = np.random.default_rng([seed, epoch]).permutation(self.options.batch_size).tolist()
            yield from (order[start : start + size] for start in range(0, len(order), size))

    def _state(self) -> dict[str, Any]:
        return {"policy": self.policy, "value_model": self.value_model, "optimizer": self.optimizer}

    def save(self, folder: Path, step: int) -> None:
        """Writes the checkpoint of this iteration atomically, replacing the previous one."""
        content = {name: part.state_dict() for name, part in self._state().items()}
        partial = folder / f"{CHECKPOINT}{PARTIAL}-{os.getpid()}"
        try:
            torch.save({"step": step, **content}, partial)
            flush(partial)
            partial.replace(folder / CHECKPOINT)
        finally:
            partial.unlink(missing_ok=True)

    def restore(self, folder: Path) -> int:
        """Loads the folder's checkpoint, if there is one, and returns the number of finished iterations.

        Raises:
            UserError: if it is from an iteration after the last one.
        """
        path = folder / CHECKPOINT
        if not path.exists():
            return 0
        device = next(self.policy.parameters()).device
        content = torch.load(path, map_location=device, weights_only=True)
        check_steps(path, content["step"], self.options)
        for name, part in self._state().items():
            part.load_state_dict(content[name])
        return int(content["step"])
