"""Direct Preference Optimization and the objectives that replace its score or its loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from typing_extensions import override

from tdpo.errors import UserError
from tdpo.objectives.base import SumObjective, parameter, preference_loss
from tdpo.types import PairLoss, PairStats

BETA = "Strength of the tie to the reference; rewards are in units of beta times nats."
LARGEST_EXPONENT = 80.0
"""Exponents in nats are cut here, before ``exp`` overflows float32, as TRL does for its alpha-divergence."""


@dataclass(frozen=True)
class DPO(SumObjective):
    r"""DPO: compares the log-ratios of the two responses.

    .. math:: \mathcal L = -\log \sigma\big(\beta \, (r_w - r_l)\big), \quad
        r = \sum_t \log \pi(y_t) - \log \pi_{ref}(y_t)

    Rewards are ``beta * r``.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), eq. 7.

    Examples:
        >>> zero = torch.zeros(1)
        >>> round(DPO(beta=0.1)(PairStats(zero + 10, zero, zero, zero)).loss.item(), 4)
        0.3133
    """

    name: ClassVar[str] = "dpo"
    equation = "-log(sigmoid(beta * (r_w - r_l)))"
    beta: float = parameter(0.1, BETA, above=0)

    @override
    def __call__(self, stats: PairStats) -> PairLoss:
        chosen, rejected = self.beta * stats.chosen_logratio, self.beta * stats.rejected_logratio
        return PairLoss(preference_loss(chosen - rejected), chosen.detach(), rejected.detach())


@dataclass(frozen=True)
class FDPO(SumObjective):
    r"""f-DPO: DPO under another divergence of policy and reference, the baseline of the TDPO paper's Table 1.

    .. math:: \mathcal L = -\log \sigma\big(\beta \, [f'(e^{r_w}) - f'(e^{r_l})]\big)

    with :math:`f'(e^r)` equal to :math:`1 - e^{-r}` (forward KL), :math:`\log 2 + \log \sigma(r)` (Jensen-Shannon) or
    :math:`(e^{(\alpha - 1) r} - 1) / (\alpha - 1)` (alpha-divergence). Rewards are ``beta * f'``. The reverse KL is
    :class:`DPO`.

    Source: Wang et al. 2023 (arXiv 2309.16240), with the constants of TRL's ``f_divergence_type``.

    Examples:
        >>> zero = torch.zeros(1)
        >>> round(FDPO(beta=0.1)(PairStats(zero + 1, zero - 1, zero, zero)).loss.item(), 4)
        0.5825
    """

    name: ClassVar[str] = "fdpo"
    beta: float = parameter(0.1, BETA, above=0)
    divergence: str = parameter("forward_kl", "Divergence of f-DPO.", choices=("forward_kl", "js", "alpha"))
    alpha: float | None = parameter(None, "Order of the alpha-divergence, 0.5 by default.", at_least=0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and self.divergence != "alpha":
            raise UserError(f"fdpo: alpha {self.alpha:g} has no effect with divergence {self.divergence}")

    @override
    def __call__(self, stats: PairStats) -> PairLoss:
        chosen, rejected = (self.beta * self._slope(r) for r in (stats.chosen_logratio, stats.rejected_logratio))
        return PairLoss(preference_loss(chosen - rejected), chosen.detach(), rejected.detach())

    @property
    @override
    def equation(self) -> str:
        power = f"{self._order - 1:g}"
        difference = {
            "forward_kl": "exp(-r_l) - exp(-r_w)",
            "js": "log(sigmoid(r_w)) - log(sigmoid(r_l))",
            "alpha": f"(exp({power} * r_w) - exp({power} * r_l)) / {power}",
        }
        return f"-log(sigmoid(beta * ({difference[self.divergence]})))"  # constants of the two rewards cancel

    @property
    def _order(self) -> float:
        """Order of the alpha-divergence; the forward KL is the one of order 0."""
        return (0.5 if self.alpha is None else self.alpha) if self.divergence == "alpha" else 0.0

    def _slope(self, logratio_P: Tensor) -> Tensor:
        """Computes f'(exp(logratio))."""
        if self.divergence == "js":
            return math.log(2) + logsigmoid(logratio_P)
        exponent = ((self._order - 1) * logratio_P).clamp(max=LARGEST_EXPONENT)
        return torch.expm1(exponent) / (self._order - 1)


@dataclass(frozen=True)
class IPO(SumObjective):
    r"""IPO: regresses the difference of the mean log-ratios on a margin instead of pushing it without bound.

    .. math:: \mathcal L = \Big(\frac{r_w}{|y_w|} - \frac{r_l}{|y_l|} - \frac{1}{2 \beta}\Big)^2

    Rewards are ``beta`` times the mean log-ratio.

    Source: Azar et al. 2023 (arXiv 2310.12036), eq. 17, per token as in TRL, whose authors agreed it with the paper's.

    Examples:
        >>> zero, four = torch.zeros(1), torch.full((1,), 4.0)
        >>> IPO(beta=0.25)(PairStats(zero + 12, zero, zero, zero, zero, zero, four, four)).loss.item()
        1.0
    """

    name: ClassVar[str] = "ipo"
    equation = "(r_w / n_w - r_l / n_l - 1 / (2 * beta)) ** 2"
    beta: float = parameter(0.1, "Strength of the tie to the reference: the margin is 1 / (2 beta) nats.", above=0)

    @override
    def __call__(self, stats: PairStats) -> PairLoss:
        chosen = stats.chosen_logratio / _given(self, stats.chosen_length)
        rejected = stats.rejected_logratio / _given(self, stats.rejected_length)
        loss = (chosen - rejected - 1 / (2 * self.beta)) ** 2
        return PairLoss(loss, self.beta * chosen.detach(), self.beta * rejected.detach())


@dataclass(frozen=True)
class RobustDPO(SumObjective):
    r"""Robust DPO: an unbiased estimate of the DPO loss where a share of the preferences is turned around.

    .. math:: \mathcal L = \frac{-(1 - \epsilon) \log \sigma(u) + \epsilon \log \sigma(-u)}{1 - 2 \epsilon}, \quad
        u = \beta \, (r_w - r_l)

    Source: Chowdhury et al. 2024 (arXiv 2403.00409); TRL's ``robust``.

    Examples:
        >>> zero = torch.zeros(1)
        >>> round(RobustDPO(beta=0.1, epsilon=0.1)(PairStats(zero + 10, zero, zero, zero)).loss.item(), 4)
        0.1883
    """

    name: ClassVar[str] = "robust"
    equation = (
        "(-(1 - epsilon) * log(sigmoid(beta * (r_w - r_l))) + epsilon * log(sigmoid(-beta * (r_w - r_l))))"
        " / (1 - 2 * epsilon)"
    )
    beta: float = parameter(0.1, BETA, above=0)
    epsilon: float = parameter(0.1, "Share of preferences expected to be wrong.", at_least=0, below=0.5)

    @override
    def __call__(self, stats: PairStats) -> PairLoss:
        chosen, rejected = self.beta * stats.chosen_logratio, self.beta * stats.rejected_logratio
        kept, flipped = preference_loss(chosen - rejected), preference_loss(rejected - chosen)
        loss = ((1 - self.epsilon) * kept - self.epsilon * flipped) / (1 - 2 * self.epsilon)
        return PairLoss(loss, chosen.detach(), rejected.detach())


@dataclass(frozen=True)
class DPOP(SumObjective):
    r"""DPO-Positive: DPO with a penalty where the chosen response gets less likely than under the reference.

    .. math:: \mathcal L = -\log \sigma\big(\beta \, [r_w - r_l - \lambda \max(0, -r_w)]\big)

    Source: Pal et al. 2024 (arXiv 2402.13228).

    Examples:
        >>> zero = torch.zeros(1)
        >>> round(DPOP(beta=0.1, penalty=5.0)(PairStats(zero - 1, zero - 3, zero, zero)).loss.item(), 4)
        0.8544
    """

    name: ClassVar[str] = "dpop"
    equation = "-log(sigmoid(beta * (r_w - r_l - penalty * max(0, -r_w))))"
    beta: float = parameter(0.1, BETA, above=0)
    penalty: float = parameter(50.0, "Weight of the penalty on a chosen response that got less likely.", at_least=0)

    @override
    def __call__(self, stats: PairStats) -> PairLoss:
        chosen = self.beta * (stats.chosen_logratio - self.penalty * (-stats.chosen_logratio).clamp(min=0))
        rejected = self.beta * stats.rejected_logratio
        return PairLoss(preference_loss(chosen - rejected), chosen.detach(), rejected.detach())


@dataclass(frozen=True)
class CalDPO(SumObjective):
    r"""Cal-DPO: adds to the preference a target for each log-ratio, so that the chosen one does not fall.

    .. math:: \mathcal L = -\log \sigma(r_w - r_l) + \Big(r_w - \frac{1}{2 \beta}\Big)^2
        + \Big(r_l + \frac{1}{2 \beta}\Big)^2

    Rewards are ``beta * r``.

    Source: Xiao et al. 2024 (arXiv 2412.14516). The authors' released code halves the two squares.

    Examples:
        >>> zero = torch.zeros(1)
        >>> round(CalDPO(beta=0.5)(PairStats(zero + 1, zero - 1, zero, zero)).loss.item(), 4)
        0.1269
    """

    name: ClassVar[str] = "cal_dpo"
    equation = "-log(sigmoid(r_w - r_l)) + (r_w - 1 / (2 * beta)) ** 2 + (r_l + 1 / (2 * beta)) ** 2"
    beta: float = parameter(0.1, "The targets of the log-ratios are 1 / (2 beta) and -1 / (2 beta) nats.", above=0)

    @override
    def __call__(self, stats: PairStats) -> PairLoss:
        chosen, rejected, target = stats.chosen_logratio, stats.rejected_logratio, 1 / (2 * self.beta)
        loss = preference_loss(chosen - rejected) + (chosen - target) ** 2 + (rejected + target) ** 2
        return PairLoss(loss, self.beta * chosen.detach(), self.beta * rejected.detach())


@dataclass(frozen=True)
class SimPO(SumObjective):
    r"""SimPO: compares mean log-probabilities, without a reference.

    .. math:: \mathcal L = -\log \sigma\Big(\frac{\beta}{|y_w|} \log \pi(y_w) - \frac{\beta}{|y_l|} \log \pi(y_l)
        - \gamma\Big)

    Rewards are ``beta`` times the mean log-probability.

    Source: Meng et al. 2024 (arXiv 2405.14734), eq. 6.

    Examples:
        >>> zero, two = torch.zeros(1), torch.full((1,), 2.0)
        >>> stats = PairStats(zero, zero, zero, zero, zero - 2, zero - 4, two, two)
        >>> round(SimPO(beta=2.0, gamma=1.0)(stats).loss.item(), 4)
        0.3133
    """

    name: ClassVar[str] = "simpo"
    equation = "-log(sigmoid(beta * p_w / n_w - beta * p_l / n_l - gamma))"
    uses_reference: ClassVar[bool] = False
    beta: float = parameter(2.0, "Scale of the mean log-probability.", above=0)
    gamma: float = parameter(1.0, "Margin between the two rewards.", at_least=0)

    @override
    def __call__(self, stats: PairStats) -> PairLoss:
        chosen = self.beta * _given(self, stats.chosen_logp) / _given(self, stats.chosen_length)
        rejected = self.beta * _given(self, stats.rejected_logp) / _given(self, stats.rejected_length)
        return PairLoss(preference_loss(chosen - rejected - self.gamma), chosen.detach(), rejected.detach())


def _given(objective: SumObjective, column_P: Tensor | None) -> Tensor:
    if column_P is None:
        raise ValueError(f"{objective.name} needs the log-probabilities and lengths in PairStats")
    return column_P
