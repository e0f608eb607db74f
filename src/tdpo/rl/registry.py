"""The RLHF baselines by name: their options and the functions that train with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tdpo.rl.common import RLOptions
from tdpo.rl.ppo import PPOOptions, train_ppo
from tdpo.rl.rloo import RLOOOptions, train_rloo


class Baseline(NamedTuple):
    """A baseline.

    Attributes:
        options: Its options.
        train: Trains with them, with the arguments of :func:`tdpo.rl.ppo.train_ppo`.
    """

    options: type[RLOptions]
    train: Callable[..., None]


RL = {"ppo": Baseline(PPOOptions, train_ppo), "rloo": Baseline(RLOOOptions, train_rloo)}
