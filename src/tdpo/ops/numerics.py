"""Arithmetic that every backend shares: logits in float32, and a KL that keeps small values.

Shapes: N response tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tdpo.types import Head

SERIES_BELOW = 1e-2
"""Below this |log-ratio| the KL term is taken from its Taylor series: the closed form would cancel."""


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of logits and statistics: float64 for float64 hidden states, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def head_logits(hidden_ND: Tensor, head: Head) -> Tensor:
    """Computes the head's logits ``[N, V]`` in the statistics dtype, also from half precision; differentiable.

    Logits rounded to bfloat16 put the KL off by 170% at 5e-5 nats, so the product is never rounded.
    """
    wide, weight_DV = statistics_dtype(hidden_ND.dtype), head.weight.t()
    constant = not (hidden_ND.requires_grad or weight_DV.requires_grad)
    if hidden_ND.dtype != wide and hidden_ND.dtype == weight_DV.dtype and hidden_ND.is_cuda and constant:
        logits = torch.mm(hidden_ND, weight_DV, out_dtype=wide)
    else:
        logits = hidden_ND.to(wide) @ weight_DV.to(wide)
    if head.bias is not None:
        logits = logits + head.bias
    return finish_logits(logits, head.scale, head.soft_cap)


def finish_logits(logits: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    """Applies a constant factor, then a soft bound, as some models do to the head's output."""
    if scale != 1.0:
        logits = logits * scale
    return logits if soft_cap is None else torch.tanh(logits / soft_cap) * soft_cap


def kl_terms(logp: Tensor, ref_logp: Tensor) -> Tensor:
    r"""Computes the elementwise terms of KL(reference || policy), each of them non-negative.

    .. math:: p_{ref} (e^u - 1 - u), \quad u = \log p - \log p_{ref}

    Summed over the vocabulary this is KL(reference || policy), since both distributions sum to one. Unlike
    :math:`p_{ref} (\log p_{ref} - \log p)` no term is negative, so rounding cannot push the sum below zero, and for
    ``|u| < 1e-2`` the series keeps full relative accuracy. Larger ``u`` use ``p - p_ref - p_ref u``, which cannot
    overflow as ``exp(u)`` alone would.

    Args:
        logp: Log-probabilities of the policy, any shape; ``-inf`` allowed (padded vocabulary rows).
        ref_logp: Log-probabilities of the reference, same shape.

    Returns:
        Terms in nats, same shape and dtype. Exactly 0 where both agree, and where both are ``-inf``; ``inf`` where
        the policy gives probability 0 to something the reference does not.

    Examples:
        >>> policy = torch.tensor([0.5, 0.5]).log()
        >>> reference = torch.tensor([0.25, 0.75]).log()
        >>> round(kl_terms(policy, reference).sum().item(), 6)
        0.130812
    """
    # Where the reference has no mass, u is replaced before it can be inf - inf; the term is p alone.
    massless = ref_logp == -torch.inf
    u = torch.where(massless, 0.0, logp) - torch.where(massless, 0.0, ref_logp)
    p_ref = ref_logp.exp()
    small = u.abs() < SERIES_BELOW
    v = torch.where(small, u, 0.0)
    series = p_ref * (v * v) * (0.5 + v * (1 / 6 + v * (1 / 24 + v * (1 / 120))))
    closed = logp.exp() - p_ref - torch.where(massless, 0.0, p_ref * u)
    return torch.where(small & ~massless, series, closed)
