"""The specification: full logits, plain autograd, any dtype. Slow, and what every other backend promises to equal."""

from __future__ import annotations

from torch import Tensor

from tdpo.ops.numerics import head_logits, kl_terms
from tdpo.types import Hidden, TokenStats


def response_stats(policy: Hidden, reference: Hidden, labels_N: Tensor) -> TokenStats:
    """Token statistics from whole ``[N, V]`` logits of both models (TDPO eq. 12 for the KL).

    Args:
        policy: Hidden states ``[N, D]`` and head; differentiable in both.
        reference: The same of the reference; constant, whatever its ``requires_grad``. Its width may differ.
        labels_N: Response tokens, ``[N]`` int64.

    Returns:
        Statistics in nats, float32 (float64 for float64 hidden states).
    """
    return stats_from_logits(
        head_logits(policy.states, policy.head), head_logits(reference.states, reference.head), labels_N
    )


def stats_from_logits(logits_NV: Tensor, ref_logits_NV: Tensor, labels_N: Tensor) -> TokenStats:
    """Token statistics of logits that are already there, in the policy's dtype; the reference's are constant.

    Example:
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
