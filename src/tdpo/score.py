"""Composes the stages: hidden states of policy and reference, token statistics, pair statistics, objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tdpo import ops
from tdpo.data.dataset import check_fits
from tdpo.data.pack import pack_padded
from tdpo.errors import UserError
from tdpo.models.policy import head_of, position_limit, prove_head, response_hidden
from tdpo.models.reference import Reference, check_same_vocabulary
from tdpo.objectives import Objective
from tdpo.types import PackedBatch, PairLoss, PairStats, TokenisedPair, TokenStats

LayoutChoice = Literal["auto", "padded"]


@dataclass(frozen=True)
class PairScores:
    """Everything one pass says of P pairs; see :class:`~tdpo.types.PairLoss` and :class:`~tdpo.types.PairStats`.

    Attributes:
        outcome: Losses and rewards of the objective, ``[P]``.
        stats: Sums over response tokens, ``[P]``, in nats.
        chosen_logp: ``[P]`` log-probability of the chosen response under the policy, in nats.
        rejected_logp: ``[P]``, the same of the rejected response.
        tokens: The token statistics ``[N]`` the sums were made of.
        batch: The layout, which says the sequence (``sequence_ids``) and the token (``labels``) of each statistic.
    """

    outcome: PairLoss
    stats: PairStats
    chosen_logp: Tensor
    rejected_logp: Tensor
    tokens: TokenStats
    batch: PackedBatch

    @property
    def loss(self) -> Tensor:
        """Loss of each pair, ``[P]``."""
        return self.outcome.loss

    @property
    def chosen_reward(self) -> Tensor:
        """The objective's implicit reward of each chosen response, ``[P]``."""
        return self.outcome.chosen_reward

    @property
    def rejected_reward(self) -> Tensor:
        """The objective's implicit reward of each rejected response, ``[P]``."""
        return self.outcome.rejected_reward


def score_pairs(
    policy: nn.Module,
    reference: nn.Module | Reference,
    pairs: Sequence[TokenisedPair],
    objective: Objective,
    layout: LayoutChoice = "auto",
    backend: ops.Backend = "auto",
) -> PairScores:
    """Scores preference pairs in one forward pass of policy and reference.

    Args:
        policy: A transformers causal language model. Gradients flow into it when they are on; its training mode is
            left as it is, so call ``policy.eval()`` first where dropout must be off.
        reference: A second causal language model with the same vocabulary, or a reference strategy. Never trained.
        pairs: P tokenised pairs; all of them run at once.
        objective: One of :mod:`tdpo.objectives`.
        layout: How sequences share rows. ``"padded"``: one sequence a row; ``"auto"``: the best proven layout.
        backend: See :func:`tdpo.ops.token_stats`.

    Returns:
        Losses, rewards and statistics per pair and per token, in nats.

    Raises:
        UserError: if the vocabularies differ, the model is no causal language model, or a token id is outside the
            vocabulary.

    Source: TDPO (arXiv 2404.11999), section 4; DPO (arXiv 2305.18290), eq. 7.
    """
    if layout not in ("auto", "padded"):
        raise UserError(f"unknown layout {layout!r}; there are: auto, padded")
    if not pairs:
        raise UserError("score_pairs was given no pairs")
    prove_head(policy)
    if isinstance(reference, nn.Module):
        check_same_vocabulary(policy, reference)
    check_fits(pairs, head_of(policy).vocab_size, position_limit(policy))
    batch = pack_padded(pairs).to(next(policy.parameters()).device)
    return score_batch(policy, reference, batch, objective, backend)


def score_batch(
    policy: nn.Module,
    reference: nn.Module | Reference,
    batch: PackedBatch,
    objective: Objective,
    backend: ops.Backend = "auto",
    logits_budget: int | None = None,
) -> PairScores:
    """:func:`score_pairs` for a batch that is already laid out, on the policy's device, without the checks."""
    with torch.no_grad():
        ref_hidden = response_hidden(reference, batch) if isinstance(reference, nn.Module) else reference.hidden(batch)
    hidden = response_hidden(policy, batch)
    tokens = ops.response_stats(hidden, ref_hidden, batch.labels, backend, logits_budget)
    logratio = _sums(tokens.logp - tokens.ref_logp, batch)
    kl, logp = _sums(tokens.kl, batch), _sums(tokens.logp.detach(), batch)
    stats = PairStats(logratio[:, 0], logratio[:, 1], kl[:, 0], kl[:, 1])
    return PairScores(objective(stats), stats, logp[:, 0], logp[:, 1], tokens, batch)


def _sums(values_N: Tensor, batch: PackedBatch) -> Tensor:
    """Sums a token statistic per sequence: ``[P, 2]``, chosen and rejected."""
    totals = torch.zeros(2 * batch.num_pairs, dtype=values_N.dtype, device=values_N.device)
    return totals.index_add(0, batch.sequence_ids, values_N).view(-1, 2)


def token_counts(batch: PackedBatch) -> Any:
    """Response tokens per pair and side, ``[P, 2]`` int64."""
    return torch.bincount(batch.sequence_ids, minlength=2 * batch.num_pairs).view(-1, 2)
