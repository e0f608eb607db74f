"""Preference objectives: functions of the token statistics of pairs. ``OBJECTIVES`` is the only list of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from tdpo.errors import UserError, nearest
from tdpo.loading import load_object
from tdpo.objectives.base import Objective, SumObjective, parameter, preference_loss
from tdpo.objectives.dpo import DPO, DPOP, FDPO, IPO, CalDPO, RobustDPO, SimPO
from tdpo.objectives.positions import SCHEDULES, PositionWeights, weighted
from tdpo.objectives.tdpo import TBPO, TDPO1, TDPO2

OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective for objective in (DPO, TDPO1, TDPO2, FDPO, IPO, RobustDPO, DPOP, CalDPO, SimPO, TBPO)
}
DEFAULT = TDPO2.name

dpo, tdpo1, tdpo2, tbpo = DPO, TDPO1, TDPO2, TBPO
fdpo, ipo, robust, dpop, cal_dpo, simpo = FDPO, IPO, RobustDPO, DPOP, CalDPO, SimPO

__all__ = [
    "DEFAULT",
    "DPO",
    "DPOP",
    "FDPO",
    "IPO",
    "OBJECTIVES",
    "SCHEDULES",
    "TBPO",
    "TDPO1",
    "TDPO2",
    "CalDPO",
    "Objective",
    "PositionWeights",
    "RobustDPO",
    "SimPO",
    "SumObjective",
    "build",
    "cal_dpo",
    "dpo",
    "dpop",
    "fdpo",
    "find_objective",
    "ipo",
    "parameter",
    "parameter_names",
    "preference_loss",
    "robust",
    "simpo",
    "tbpo",
    "tdpo1",
    "tdpo2",
    "weighted",
]


def find_objective(name: str) -> type[Objective]:
    """Returns the class of an objective by its name in the registry, or as ``module:Class``.

    Raises:
        UserError: for an unknown name, and for a class that is no :class:`Objective`.
    """
    if ":" not in name:
        if name not in OBJECTIVES:
            raise UserError(
                f"unknown objective {name!r}; there are: {', '.join(OBJECTIVES)}, and module:Class for one of your "
                f"own.{nearest(name, OBJECTIVES)}"
            )
        return OBJECTIVES[name]
    found = load_object(name, "--objective")
    if not (isinstance(found, type) and issubclass(found, Objective) and "__dataclass_params__" in vars(found)):
        raise UserError(f"--objective {name}: it must be a frozen dataclass that inherits tdpo.objectives.Objective")
    return found


def build(name: str, **parameters: Any) -> Objective:
    """Builds an objective by name; a parameter given as None takes the objective's own default.

    Raises:
        UserError: for an unknown name, a parameter the objective does not have (never ignored silently), or a value
            outside the parameter's range.

    Examples:
        >>> str(build("tdpo2", beta=0.2, alpha=None))
        'tdpo2(beta=0.2, alpha=0.5)'
    """
    objective = find_objective(name)
    given = {key: value for key, value in parameters.items() if value is not None}
    for key, value in given.items():
        if key not in parameter_names(objective):
            owners = [n for n, other in OBJECTIVES.items() if key in parameter_names(other)]
            raise UserError(
                f"--{key} {value} contradicts --objective {name}: {name} has no {key}"
                + (f" ({', '.join(owners)} {'does' if len(owners) == 1 else 'do'})" if owners else "")
            )
    return objective(**given)


def parameter_names(objective: type[Objective]) -> list[str]:
    """Returns the names of an objective's parameters."""
    return [field.name for field in dataclasses.fields(objective)]
