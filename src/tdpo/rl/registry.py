"""Registry of the RLHF baselines: options and training function by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tdpo.rl.common import RLOptions
from tdpo.rl.ppo import PPOOptions, train_ppo
from tdpo.rl.rloo import RLOOOptions, train_rloo


class Baseline(NamedTuple):
    """A baseline.

    Attributes:
        options: Class of its options.
        train: Its training function, with the arguments of :func:`tdpo.rl.ppo.train_ppo`.
    """

    options: type[RLOptions]
    train: Callable[..., None]


RL = {"ppo": Baseline(PPOOptions, train_ppo), "rloo": Baseline(RLOOOptions, train_rloo)}
