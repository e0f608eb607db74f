"""Token weights from the log-probabilities of two models: TIS-DPO's importance and TGDPO's guidance.

Shapes: n tokens of one response.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from tdpo import ops
from tdpo.models.hidden import response_hidden
from tdpo.models.probe import evaluating
from tdpo.types import PackedBatch, TokenisedPair

Packer = Callable[[Sequence[TokenisedPair]], PackedBatch]


def importance_weights(
    logratio_n: Tensor, *, rejected: bool = False, clamp: float = 1.5, low: float = 0.7, high: float = 1.3
) -> Tensor:
    """Computes the weights of TIS-DPO for one response: tokens that a good model prefers to a bad one count more.

    The log-ratios are clamped, ranked within the response (ties share their mean rank) and mapped onto a range. In a
    rejected response it is the tokens that the bad model prefers.

    Args:
        logratio_n: Log-probability under the positive model minus that under the negative one, nats, ``[n]``.
        rejected: Whether the response is the rejected one.
        clamp: Log-ratios beyond this are equal, nats.
        low: Weight of the token ranked lowest.
        high: Weight of the token ranked highest; a response whose log-ratios are all equal gets the middle.

    Source: Liu et al. 2024 (arXiv 2410.04350), section 4; ranks as in the authors' released ``rank_based`` transform.

    Examples:
        >>> [round(weight, 2) for weight in importance_weights(torch.tensor([0.1, 9.0, -2.0, 5.0])).tolist()]
        [0.9, 1.2, 0.7, 1.2]
    """
    scores = (-logratio_n if rejected else logratio_n).clamp(-clamp, clamp)
    below = (scores[:, None] > scores[None, :]).sum(1)
    equal = (scores[:, None] == scores[None, :]).sum(1)
    rank = below + (equal - 1) / 2  # 0 to n - 1
    share = rank / (len(scores) - 1) if len(scores) > 1 else torch.full_like(scores, 0.5)
    return low + (high - low) * share


def guidance_weights(logratio_n: Tensor, *, rejected: bool = False, strength: float = 0.5, beta: float = 0.1) -> Tensor:
    """Computes the weights of TGDPO for one response: ``1 + a b r`` if it is chosen, ``1 - a b r`` if it is rejected.

    Args:
        logratio_n: Log-probability under the guide minus that under the reference, r, nats, ``[n]``.
        rejected: Whether the response is the rejected one.
        strength: a.
        beta: b, that of the objective.

    Returns:
        Weights ``[n]``; negative ones are cut at 0, where the released code keeps them.

    Source: Zhu et al. 2025 (arXiv 2506.14574).

    Examples:
        >>> guidance_weights(torch.tensor([2.0, -30.0]), strength=0.5, beta=0.1).tolist()
        [1.100000023841858, 0.0]
    """
    return (1 + (-strength if rejected else strength) * beta * logratio_n).clamp(min=0)


def response_logps(
    model: nn.Module, pairs: Sequence[TokenisedPair], pack: Packer, batch_size: int, logits_budget: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the log-probabilities of the tokens of each pair's chosen and rejected response, nats, on the CPU.

    Args:
        model: Causal language model; runs in evaluation mode.
        pairs: The pairs.
        pack: Lays pairs out; see :func:`tdpo.score.packer`.
        batch_size: Pairs at a time.
        logits_budget: See :func:`tdpo.ops.response_stats`.
    """
    device = next(model.parameters()).device
    for start in range(0, len(pairs), batch_size):
        batch = pack(pairs[start : start + batch_size]).to(device)
        with evaluating(model), torch.no_grad():  # within a step: a generator's modes would be its caller's
            logp_N = ops.response_logp(response_hidden(model, batch), batch.labels, logits_budget)
        sides = logp_N.float().cpu().split(list(batch.lengths))
        yield from zip(sides[::2], sides[1::2], strict=True)
