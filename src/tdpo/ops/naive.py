"""The specification: full logits, plain autograd, any dtype. Slow, and what every other backend promises to equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tdpo.objectives.base import Objective
from tdpo.ops.numerics import head_logits, kl_terms
from tdpo.types import Hidden, PairLoss, PairStats, PairTokens, TokenStats


def token_stats(
    policy: Hidden, reference: Hidden | None, labels_N: Tensor, logits_budget: int | None = None
) -> TokenStats:
    """Computes token statistics from whole ``[N, V]`` logits of both models (TDPO eq. 12 for the KL).

    Args:
        policy: Hidden states ``[N, D]`` and head of the policy; differentiable in both.
        reference: The same of the reference; constant, whatever its ``requires_grad``. Its width may differ. Without
            one, its log-probabilities and the KL are NaN.
        labels_N: Response tokens, int64.
        logits_budget: Not used: the memory of this backend is not bounded.

    Returns:
        Statistics in nats, float32 (float64 for float64 hidden states).
    """
    logits_NV = head_logits(policy.states, policy.head)
    if reference is None:
        logp_N = logits_NV.log_softmax(-1).gather(1, labels_N[:, None])[:, 0]
        return TokenStats(logp_N, *logp_N.new_full((2, len(logp_N)), torch.nan))
    return stats_from_logits(logits_NV, head_logits(reference.states, reference.head), labels_N)


def pair_loss(
    policy: Hidden,
    reference: Hidden | None,
    labels_N: Tensor,
    lengths: Sequence[int],
    objective: Objective,
    logits_budget: int | None = None,
    weights_2N: Tensor | None = None,
) -> tuple[Tensor, PairLoss, PairStats, TokenStats]:
    """Computes the summed loss of P pairs, which is differentiable, and as constants what it was made of.

    Args:
        policy: As in :func:`token_stats`.
        reference: As in :func:`token_stats`.
        labels_N: Response tokens, int64; those of a pair are contiguous, chosen before rejected.
        lengths: 2P token counts, chosen and rejected of each pair in turn.
        objective: The objective whose loss is summed.
        logits_budget: Not used.
        weights_2N: Weights of the tokens' log-probabilities and KL; None for 1 everywhere.
    """
    return loss_of_tokens(token_stats(policy, reference, labels_N), lengths, objective, weights_2N)


def loss_of_tokens(
    tokens: TokenStats, lengths: Sequence[int], objective: Objective, weights_2N: Tensor | None
) -> tuple[Tensor, PairLoss, PairStats, TokenStats]:
    """Computes what :func:`pair_loss` returns from differentiable token statistics."""
    counts = torch.tensor(lengths, device=tokens.logp.device)
    ids_N = torch.repeat_interleave(counts, output_size=len(tokens.logp))
    outcome = objective.pair_loss(PairTokens.of(tokens, ids_N, len(counts) // 2, weights_2N))
    constants = TokenStats(tokens.logp.detach(), tokens.ref_logp, tokens.kl.detach())
    sums = PairTokens.of(constants, ids_N, len(counts) // 2).sums
    return outcome.loss.sum(), replace(outcome, loss=outcome.loss.detach()), sums, constants


def stats_from_logits(logits_NV: Tensor, ref_logits_NV: Tensor, labels_N: Tensor) -> TokenStats:
    """Computes token statistics from logits, in the policy's dtype; the reference's are constant.

    Examples:
        A reference that is sure of the other token, by a gap of 200 nats, leaves everything finite:

        >>> import torch
        >>> stats = stats_from_logits(
        ...     torch.zeros(1, 2), torch.tensor([[200.0, 0.0]]), torch.tensor([1])
        ... )
        >>> [round(x.item(), 4) for x in (stats.logp, stats.ref_logp, stats.kl)]
        [-0.6931, -200.0, 0.6931]
    """
    logp_NV = logits_NV.log_softmax(-1)
    ref_logp_NV = ref_logits_NV.detach().to(logits_NV.dtype).log_softmax(-1)
    index = labels_N[:, None]
    return TokenStats(
        logp=logp_NV.gather(1, index)[:, 0],
        ref_logp=ref_logp_NV.gather(1, index)[:, 0],
        kl=kl_terms(logp_NV, ref_logp_NV).sum(-1),
    )
