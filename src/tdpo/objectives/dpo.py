"""Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290)."""

from __future__ import annotations

from tdpo.objectives.base import Objective, preference_loss
from tdpo.types import PairLoss, PairStats


def dpo(beta: float = 0.1) -> Objective:
    r"""Builds DPO, which compares the log-ratios of the two responses.

    .. math:: \mathcal L = -\log \sigma\big(\beta \, (r_w - r_l)\big), \quad
        r = \sum_t \log \pi(y_t) - \log \pi_{ref}(y_t)

    Args:
        beta: Strength of the tie to the reference; rewards are in units of beta times nats. 0.1 is the paper's.

    Returns:
        An objective of ``[P]`` statistics in nats; rewards are ``beta * r``.

    Source: Rafailov et al. 2023, eq. 7.

    Example:
        >>> import torch
        >>> from tdpo.types import PairStats
        >>> zero = torch.zeros(1)
        >>> round(dpo(beta=0.1)(PairStats(zero + 10, zero, zero, zero)).loss.item(), 4)
        0.3133
    """

    def function(stats: PairStats) -> PairLoss:
        chosen, rejected = beta * stats.chosen_logratio, beta * stats.rejected_logratio
        return PairLoss(preference_loss(chosen - rejected), chosen.detach(), rejected.detach())

    return Objective("dpo", function, chosen_kl_ratio=0.0, rejected_kl_ratio=0.0, parameters={"beta": beta})
