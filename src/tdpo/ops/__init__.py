"""The per-token operation: log-probabilities and the exact KL(reference || policy) of every response token.

Backends have the same values and gradients: ``naive`` is the specification, ``chunked`` bounds the memory, and
``triton`` is chunked with kernels of its own between the matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdpo.objectives.base import Objective
from tdpo.ops import chunked
from tdpo.ops.backends import Backend, BackendName, choose_backend
from tdpo.types import Head, Hidden, PairLoss, PairStats, TokenStats

__all__ = ["Backend", "BackendName", "pair_loss", "response_logp", "response_stats", "token_stats"]


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    backend: BackendName = "auto",
) -> TokenStats:
    r"""Computes the statistics of N response tokens from the final hidden states of two models.

    .. math::
        \text{logp}_t = \log \pi(y_t), \quad
        \text{kl}_t = \sum_v \pi_{ref}(v) \, (\log \pi_{ref}(v) - \log \pi(v))

    Args:
        hidden: ``[N, D]`` states of the policy that predict the labels; differentiable.
        weight: ``[V, D]`` head of the policy; differentiable.
        ref_hidden: ``[N, D']`` states of the reference; constant.
        ref_weight: ``[V, D']`` head of the reference; constant.
        labels: ``[N]`` int64, the response tokens.
        bias: ``[V]`` bias of the policy's head, if it has one; differentiable.
        ref_bias: ``[V]`` bias of the reference's head; constant.
        backend: ``"naive"``, ``"chunked"``, ``"triton"``, or ``"auto"``: triton for CUDA tensors where it is installed,
            chunked elsewhere and for float64.

    Returns:
        :class:`~tdpo.types.TokenStats` in nats: float64 for float64 inputs, float32 for all others.

    Raises:
        ValueError: if shapes disagree, the vocabularies of the two heads included.
        tdpo.UserError: for an unknown backend, and for triton where it cannot run, with the reason.

    Source: TDPO (arXiv 2404.11999), eq. 12 and 14.

    Examples:
        >>> hidden, weight = torch.ones(3, 4), torch.eye(5, 4)
        >>> stats = token_stats(hidden, weight, hidden, weight, torch.tensor([0, 1, 4]))
        >>> stats.kl.tolist()
        [0.0, 0.0, 0.0]
    """
    policy, reference = Hidden(hidden, Head(weight, bias)), Hidden(ref_hidden, Head(ref_weight, ref_bias))
    return response_stats(policy, reference, labels, backend)


def response_stats(
    policy: Hidden,
    reference: Hidden | None,
    labels: Tensor,
    backend: BackendName = "auto",
    logits_budget: int | None = None,
) -> TokenStats:
    """Computes :func:`token_stats` for heads with a logit scale or soft-cap; the rest of the package calls this one.

    Args:
        policy: States ``[N, D]`` and head of the policy; differentiable.
        reference: The same of the reference; constant. Without one, its log-probabilities and the KL are NaN.
        labels: ``[N]`` int64, the response tokens.
        backend: As in :func:`token_stats`.
        logits_budget: Bytes for the logits of a chunk, which the naive backend does not bound; None for the device's
            default.
    """
    _check_shapes(policy, reference, labels)
    policy, reference = _in_autocast_dtype(policy), reference and _in_autocast_dtype(reference)
    # Inside autocast the products would come out in half precision; the statistics need float32.
    with torch.autocast(policy.states.device.type, enabled=False):
        return choose_backend(backend, policy.states).token_stats(policy, reference, labels, logits_budget)


def pair_loss(
    policy: Hidden,
    reference: Hidden | None,
    labels: Tensor,
    lengths: Sequence[int],
    objective: Objective,
    logits_budget: int | None = None,
    backend: BackendName = "auto",
    weights: Tensor | None = None,
) -> tuple[Tensor, PairLoss, PairStats, TokenStats]:
    """Computes the summed loss of whole pairs and their statistics, in one pass over the logits.

    Equals :func:`response_stats` followed by the objective, values and gradients, at the cost of 3 head products with
    a frozen head and 4 with a trained one.

    Args:
        policy: States ``[N, D]`` and head of the policy; differentiable.
        reference: The same of the reference; constant. Without one, its log-probabilities and the KL are NaN.
        labels: ``[N]`` int64, the response tokens; those of a pair are contiguous, chosen before rejected.
        lengths: Token counts of the 2P responses, chosen and rejected of each pair in turn.
        objective: One of :mod:`tdpo.objectives`.
        logits_budget: Bytes for the logits of a group of pairs, which the naive backend does not bound; None for the
            device's default.
        backend: As in :func:`token_stats`.
        weights: ``[2, N]``, weights of the tokens' log-probabilities and KL in the objective; None for 1 everywhere.
            The statistics returned are not weighted.

    Returns:
        The sum of the pairs' losses, a scalar that is differentiable once in states, weight and bias of the policy;
        losses and rewards ``[P]``; sums over response tokens ``[P]``; token statistics ``[N]``. The last three carry no
        gradient.

    Raises:
        ValueError: if shapes or lengths disagree.
        tdpo.UserError: as in :func:`token_stats`.
    """
    _check_shapes(policy, reference, labels)
    if len(lengths) % 2 or sum(lengths) != labels.numel():
        raise ValueError(f"lengths {list(lengths)[:8]}... are not 2P counts that add up to {labels.numel()} tokens")
    policy, reference = _in_autocast_dtype(policy), reference and _in_autocast_dtype(reference)
    with torch.autocast(policy.states.device.type, enabled=False):
        chosen = choose_backend(backend, policy.states)
        return chosen.pair_loss(policy, reference, labels, lengths, objective, logits_budget, weights)


def response_logp(policy: Hidden, labels: Tensor, logits_budget: int | None = None) -> Tensor:
    """Computes the log-probability of response tokens alone, ``[N]`` in nats, with the memory of one chunk of logits.

    Args:
        policy: States ``[N, D]`` and head; differentiable.
        labels: ``[N]`` int64, the response tokens.
        logits_budget: Bytes for the logits of a chunk; None for the device's default.
    """
    policy = _in_autocast_dtype(policy)
    with torch.autocast(policy.states.device.type, enabled=False):
        return chunked.response_logp(policy, labels, logits_budget)


def _check_shapes(policy: Hidden, reference: Hidden | None, labels: Tensor) -> None:
    for name, side in (("policy", policy), ("reference", reference)):
        if side is None:
            continue
        states, weight, bias = side.states, side.head.weight, side.head.bias
        if states.ndim != 2 or weight.ndim != 2 or states.shape[1] != weight.shape[1]:
            raise ValueError(
                f"{name}: states {list(states.shape)} and head {list(weight.shape)} are not [N, D], [V, D]"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}: bias {list(bias.shape)} does not match the head {list(weight.shape)}")
        if labels.shape != states.shape[:1]:
            raise ValueError(f"labels {list(labels.shape)} do not match the {name}'s states {list(states.shape)}")
    if reference is not None and policy.head.vocab_size != reference.head.vocab_size:
        raise ValueError(
            f"the policy's vocabulary has {policy.head.vocab_size} entries, the reference's "
            f"{reference.head.vocab_size}; KL(reference || policy) needs one vocabulary"
        )


def _in_autocast_dtype(hidden: Hidden) -> Hidden:
    device = hidden.states.device.type
    if not torch.is_autocast_enabled(device) or hidden.states.dtype == torch.float64:
        return hidden
    dtype = torch.get_autocast_dtype(device)
    head = hidden.head
    return Hidden(hidden.states.to(dtype), Head(head.weight.to(dtype), head.bias, head.scale, head.soft_cap))
