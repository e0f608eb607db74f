"""Token-level objectives: TDPO (Zeng et al., ICML 2024, arXiv 2404.11999) and its relative TBPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from tdpo.objectives.base import Objective, SumObjective, parameter, preference_loss
from tdpo.objectives.dpo import BETA
from tdpo.types import PairLoss, PairStats, PairTokens


@dataclass(frozen=True)
class TDPO1(SumObjective):
    r"""TDPO1: the token-level Bradley-Terry loss as derived, with the whole sequential KL on both sides.

    .. math:: \mathcal L = -\log \sigma\big(\beta \, [(r_w - r_l) - (k_l - k_w)]\big)

    with the log-ratio r and the sequential KL(reference || policy) k of chosen (w) and rejected (l) responses. Rewards
    are ``beta * (r + k)``, the sum of token advantages.

    Source: TDPO eq. 15.

    Examples:
        >>> zero = torch.zeros(1)
        >>> round(TDPO1(beta=0.1)(PairStats(zero + 10, zero, zero, zero + 10)).loss.item(), 4)
        0.6931
    """

    name: ClassVar[str] = "tdpo1"
    equation = "-log(sigmoid(beta * ((r_w - r_l) - (k_l - k_w))))"
    beta: float = parameter(0.1, BETA, above=0)

    @override
    def __call__(self, stats: PairStats) -> PairLoss:
        margin = stats.chosen_logratio - stats.rejected_logratio
        return _with_rewards(self.beta, margin - (stats.rejected_kl - stats.chosen_kl), stats)  # eq. 15


@dataclass(frozen=True)
class TDPO2(SumObjective):
    r"""TDPO2: the KL difference weighted by alpha, and no gradient through the chosen side's KL.

    .. math:: \mathcal L = -\log \sigma\big(\beta \, [(r_w - r_l) - \alpha \, (k_l - \mathrm{sg}(k_w))]\big)

    Rewards are ``beta * (r + k)``, as TDPO1's.

    Source: TDPO eq. 17 and 18.

    Examples:
        >>> zero = torch.zeros(1)
        >>> round(TDPO2(beta=0.1, alpha=0.5)(PairStats(zero + 10, zero, zero, zero + 10)).loss.item(), 4)
        0.4741
    """

    name: ClassVar[str] = "tdpo2"
    equation = "-log(sigmoid(beta * ((r_w - r_l) - alpha * (k_l - k_w))))"
    beta: float = parameter(0.1, BETA, above=0)
    alpha: float = parameter(0.5, "Weight of the difference in sequential KL.", at_least=0)

    @override
    def __call__(self, stats: PairStats) -> PairLoss:
        margin = stats.chosen_logratio - stats.rejected_logratio
        score = margin - self.alpha * (stats.rejected_kl - stats.chosen_kl.detach())  # eq. 17
        return _with_rewards(self.beta, score, stats)


@dataclass(frozen=True)
class TBPO(Objective):
    r"""TBPO-A with the logistic loss: compares the token advantages of both responses position by position.

    .. math:: \mathcal L = \frac 1 T \sum_{t=1}^{T} -\log \sigma\big(\beta \, [(r + k)_{w,t} - (r + k)_{l,t}]\big),
        \quad T = \min(|y_w|, |y_l|)

    Tokens past the end of the shorter response have no gradient. Rewards are ``beta * (r + k)`` summed over a response.

    Source: Nguyen et al. 2026 (arXiv 2605.12288).

    Examples:
        >>> two, none = torch.tensor([2.0, 2.0, 5.0, 0.0]), torch.zeros(4)
        >>> round(TBPO(beta=0.5).pair_loss(PairTokens(two, none, none, torch.tensor([0, 0, 0, 1]), 1)).loss.item(), 4)
        0.3133
    """

    name: ClassVar[str] = "tbpo"
    beta: float = parameter(0.1, BETA, above=0)

    @override
    def pair_loss(self, tokens: PairTokens) -> PairLoss:
        ids, starts = tokens.sequence_ids, tokens.offsets
        advantage = self.beta * (tokens.logratio + tokens.kl)
        counts, other = starts.diff(), ids ^ 1
        position = torch.arange(len(ids), device=ids.device) - starts[ids]
        compared = (ids % 2 == 0) & (position < counts[other])  # a chosen token, with the rejected one at its position
        partner = torch.where(compared, starts[other] + position, 0)
        gap = torch.where(compared, advantage - advantage[partner], 0)
        losses = tokens.per_response(torch.where(compared, preference_loss(gap), 0))[::2]
        rewards = tokens.per_response(advantage.detach())
        return PairLoss(losses / counts.view(-1, 2).amin(1).clamp(min=1), rewards[::2], rewards[1::2])


def _with_rewards(beta: float, score: Tensor, stats: PairStats) -> PairLoss:
    """Returns the loss of ``beta * score``, and the rewards: beta (log-ratio + KL), the sums of token advantages."""
    return PairLoss(
        loss=preference_loss(beta * score),
        chosen_reward=beta * (stats.chosen_logratio + stats.chosen_kl).detach(),
        rejected_reward=beta * (stats.rejected_logratio + stats.rejected_kl).detach(),
    )
