"""Token-level Direct Preference Optimization (Zeng et al., ICML 2024, arXiv 2404.11999)."""

from __future__ import annotations

from torch import Tensor

from tdpo.objectives.base import Objective, preference_loss
from tdpo.types import PairLoss, PairStats


def tdpo1(beta: float = 0.1) -> Objective:
    r"""Builds TDPO1, the token-level Bradley-Terry loss as derived: sequential KL with full weight on both sides.

    .. math:: \mathcal L = -\log \sigma\big(\beta \, [(r_w - r_l) - (k_l - k_w)]\big)

    with the log-ratio r and the sequential KL(reference || policy) k of chosen (w) and rejected (l) responses.

    Args:
        beta: Strength of the tie to the reference. 0.1 is the paper's.

    Returns:
        An objective of ``[P]`` statistics in nats; rewards are ``beta * (r + k)``, the sum of token advantages.

    Source: TDPO eq. 15.

    Example:
        >>> import torch
        >>> from tdpo.types import PairStats
        >>> zero = torch.zeros(1)
        >>> round(tdpo1(beta=0.1)(PairStats(zero + 10, zero, zero, zero + 10)).loss.item(), 4)
        0.6931
    """

    def function(stats: PairStats) -> PairLoss:
        margin = stats.chosen_logratio - stats.rejected_logratio
        return _with_rewards(beta, margin - (stats.rejected_kl - stats.chosen_kl), stats)  # eq. 15

    return Objective("tdpo1", function, chosen_kl_ratio=1.0, rejected_kl_ratio=1.0, parameters={"beta": beta})


def tdpo2(beta: float = 0.1, alpha: float = 0.5) -> Objective:
    r"""Builds TDPO2: the KL difference weighted by alpha, and no gradient through the chosen side's KL.

    .. math:: \mathcal L = -\log \sigma\big(\beta \, [(r_w - r_l) - \alpha \, (k_l - \mathrm{sg}(k_w))]\big)

    Args:
        beta: Strength of the tie to the reference. 0.1 is the paper's.
        alpha: Weight of the sequential-KL difference. 0.5 is the paper's.

    Returns:
        An objective of ``[P]`` statistics in nats; rewards are ``beta * (r + k)``, as TDPO1's.

    Source: TDPO eq. 17 and 18.

    Example:
        >>> import torch
        >>> from tdpo.types import PairStats
        >>> zero = torch.zeros(1)
        >>> round(tdpo2(beta=0.1, alpha=0.5)(PairStats(zero + 10, zero, zero, zero + 10)).loss.item(), 4)
        0.4741
    """

    def function(stats: PairStats) -> PairLoss:
        margin = stats.chosen_logratio - stats.rejected_logratio
        return _with_rewards(beta, margin - alpha * (stats.rejected_kl - stats.chosen_kl.detach()), stats)  # eq. 17

    return Objective(
        "tdpo2", function, chosen_kl_ratio=0.0, rejected_kl_ratio=alpha, parameters={"beta": beta, "alpha": alpha}
    )


def _with_rewards(beta: float, score: Tensor, stats: PairStats) -> PairLoss:
    """Returns the loss of ``beta * score``, and the rewards: beta (log-ratio + KL), the sums of token advantages."""
    return PairLoss(
        loss=preference_loss(beta * score),
        chosen_reward=beta * (stats.chosen_logratio + stats.chosen_kl).detach(),
        rejected_reward=beta * (stats.rejected_logratio + stats.rejected_kl).detach(),
    )
