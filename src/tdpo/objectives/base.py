"""The type of an objective: a pure function of pair statistics, and the two ratios that a fused gradient needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn.functional import logsigmoid

from tdpo.types import PairLoss, PairStats


@dataclass(frozen=True)
class Objective:
    """A preference objective, called with :class:`~tdpo.types.PairStats`.

    Attributes:
        name: Its name in the registry.
        parameters: Its parameters by name, for reports and checkpoints.
        function: The loss as a differentiable function of the statistics.
        chosen_kl_ratio: c_w: gradient weight of the chosen side's sequential KL over that of its log-ratio. Per token
            the gradient in the logits is then proportional to ``onehot(y) - (1 - c) p - c p_ref``.
        rejected_kl_ratio: c_l, the same of the rejected side.
    """

    name: str
    function: Callable[[PairStats], PairLoss] = field(repr=False)
    chosen_kl_ratio: float
    rejected_kl_ratio: float
    parameters: Mapping[str, float] = field(hash=False)

    def __call__(self, stats: PairStats) -> PairLoss:
        """Computes loss and rewards of P pairs from their statistics."""
        return self.function(stats)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v:g}' for k, v in self.parameters.items())})"


def preference_loss(score: Tensor) -> Tensor:
    """Computes ``-log sigmoid(score)``, the negative log-likelihood of the preference under Bradley-Terry, in nats."""
    return -logsigmoid(score)
