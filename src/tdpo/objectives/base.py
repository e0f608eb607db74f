"""The contract of a preference objective: a differentiable function of the token statistics of pairs.

An objective is a frozen dataclass whose fields are its parameters, each made with :func:`parameter`. Command-line
options, their help and their checks follow from the fields.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid
from typing_extensions import override

from tdpo.errors import UserError
from tdpo.types import PairLoss, PairStats, PairTokens


def parameter(
    default: Any,
    help_text: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """Returns a field of an objective: its default, help, and the values it accepts.

    Args:
        default: Its value where none is given.
        help_text: What ``--help`` prints.
        above: A number that the value must exceed.
        at_least: A number that the value must not be below.
        below: A number that the value must be below.
        choices: All values of a parameter that is text.
    """
    limits = {"above": above, "at least": at_least, "below": below}
    metadata = {"help": help_text, "limits": {name: limit for name, limit in limits.items() if limit is not None}}
    return dataclasses.field(default=default, metadata=metadata | ({"choices": choices} if choices else {}))


@dataclass(frozen=True)
class Objective(ABC):
    """A preference objective as a function of token statistics.

    The gradient in the logits is computed in one pass if, on each side of a pair, the derivative in every token's KL is
    a constant times the derivative in its log-ratio. This is derived by autograd, see
    :func:`tdpo.ops.fused.kl_ratios`; any other objective takes two passes, with the same values.
    """

    name: ClassVar[str] = ""
    """Its name in the registry; empty for a class that is named ``module:Class``."""

    uses_reference: ClassVar[bool] = True
    """Whether it depends on the reference. If not, none is loaded, and log-ratios and KL are NaN."""

    one_pass: ClassVar[bool] = True
    """Whether the gradient may be computed in one pass if the ratio is constant where it is looked at. False for an
    objective whose ratio changes elsewhere."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(self, field, getattr(self, field.name))

    @abstractmethod
    def pair_loss(self, tokens: PairTokens) -> PairLoss:
        """Computes loss and rewards of P pairs from the statistics of their N response tokens."""

    @property
    def equation(self) -> str:
        """The loss of a pair as a Python expression to show; empty where sums over responses do not determine it.

        Its symbols: log-ratios ``r_w``, ``r_l``, sequential KL ``k_w``, ``k_l``, log-probabilities ``p_w``, ``p_l``
        and lengths ``n_w``, ``n_l`` of the chosen and the rejected response, and the parameters by name.
        """
        return ""

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The parameters by name, for reports and checkpoints; those left out by None are not among them."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    @property
    def reward_scale(self) -> float:
        """Reward per nat of log-ratio in ``implicit_rewards/*``: ``beta`` where the objective has one, else 1."""
        return float(self.parameters.get("beta", 1.0))

    @classmethod
    def spelling(cls) -> str:
        """Returns what ``--objective`` selects the class by."""
        return vars(cls).get("name") or f"{cls.__module__}:{cls.__qualname__}"  # a subclass does not inherit the name

    def __str__(self) -> str:
        values = (f"{k}={v:g}" if isinstance(v, float | int) else f"{k}={v}" for k, v in self.parameters.items())
        return f"{self.spelling()}({', '.join(values)})"


class SumObjective(Objective):
    """An objective of the sums over each response, which most objectives are."""

    @abstractmethod
    def __call__(self, stats: PairStats) -> PairLoss:
        """Computes loss and rewards of P pairs from their sums."""

    @override
    def pair_loss(self, tokens: PairTokens) -> PairLoss:
        return self(tokens.sums)


def preference_loss(score: Tensor) -> Tensor:
    """Computes ``-log sigmoid(score)``, the negative log-likelihood of the preference under Bradley-Terry, in nats."""
    return -logsigmoid(score)


def _check(objective: Objective, field: dataclasses.Field[Any], value: Any) -> None:
    """Refuses a value outside a parameter's range or choices; None is a value where it is the default."""
    choices, limits = field.metadata.get("choices"), field.metadata.get("limits", {})
    if value is None and field.default is None:
        return
    if choices is not None:
        if value not in choices:
            raise UserError(f"{objective.spelling()}: {field.name} must be one of {', '.join(choices)}, got {value!r}")
        return
    if not limits:
        return
    number = isinstance(value, float | int) and math.isfinite(value)
    compare = {"above": lambda limit: value > limit, "at least": lambda limit: value >= limit}
    compare["below"] = lambda limit: value < limit
    if not number or not all(compare[name](limit) for name, limit in limits.items()):
        words = {("above", 0): "positive", ("at least", 0): "non-negative"}
        wanted = " and ".join(words.get(limit, f"{limit[0]} {limit[1]:g}") for limit in limits.items())
        raise UserError(f"{objective.spelling()}: {field.name} must be a {wanted} number, got {value}")
