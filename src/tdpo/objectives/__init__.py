"""Preference objectives: pure functions of pair statistics. ``OBJECTIVES`` is the only list of them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

from tdpo.errors import UserError, nearest
from tdpo.objectives.base import Objective, preference_loss
from tdpo.objectives.dpo import dpo
from tdpo.objectives.tdpo import tdpo1, tdpo2

OBJECTIVES: dict[str, Callable[..., Objective]] = {"dpo": dpo, "tdpo1": tdpo1, "tdpo2": tdpo2}

__all__ = ["OBJECTIVES", "Objective", "build", "dpo", "preference_loss", "tdpo1", "tdpo2"]


def build(name: str, **parameters: float | None) -> Objective:
    """Builds an objective by name; a parameter given as None takes the objective's own default.

    Raises:
        UserError: for an unknown name, a parameter the objective does not have (never ignored silently), or a
            beta or alpha that is not a positive (alpha: non-negative) finite number.

    Example:
        >>> str(build("tdpo2", beta=0.2, alpha=None))
        'tdpo2(beta=0.2, alpha=0.5)'
    """
    if name not in OBJECTIVES:
        raise UserError(f"unknown objective {name!r}; there are: {', '.join(OBJECTIVES)}.{nearest(name, OBJECTIVES)}")
    given = {key: value for key, value in parameters.items() if value is not None}
    accepted = inspect.signature(OBJECTIVES[name]).parameters
    for key, value in given.items():
        if key not in accepted:
            takers = [n for n, f in OBJECTIVES.items() if key in inspect.signature(f).parameters]
            raise UserError(
                f"--{key} {value:g} contradicts --objective {name}: {name} has no {key}"
                + (f" ({', '.join(takers)} does)" if takers else "")
            )
        if not math.isfinite(value) or value < 0 or (key == "beta" and value == 0):
            raise UserError(f"--{key} must be a {'positive' if key == 'beta' else 'non-negative'} number, got {value}")
    return OBJECTIVES[name](**given)
