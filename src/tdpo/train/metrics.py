"""The metrics of pairs, the same in training, evaluation and ``tdpo eval``. They are summed on the device.

``rewards/*`` is the objective's own implicit reward, ``implicit_rewards/*`` is ``beta * log-ratio`` and comparable
across objectives. ``kl/*`` is the sequential KL(reference || policy) in nats, ``kl_per_token/*`` that divided by the
number of response tokens. Every margin is chosen minus rejected. ``aux_loss`` is the load-balancing loss of a
mixture-of-experts model before its coefficient, where it is part of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, pairwise
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tdpo.objectives import Objective
from tdpo.score import PairScores

SIDES = ("chosen", "rejected")
METRICS = (
    "loss",
    *(f"{reward}/{of}" for reward in ("rewards", "implicit_rewards") for of in (*SIDES, "accuracies", "margins")),
    *(f"logps/{side}" for side in SIDES),
    *(f"{kl}/{of}" for kl in ("kl", "kl_per_token") for of in (*SIDES, "margin")),
)
"""Names of the metrics that every evaluation of pairs reports."""


class Sums:
    """Named sums since the last log or over an evaluation, in one tensor, so that reading them synchronises once."""

    _names: Sequence[str] = ()
    _sums: Tensor | None = None

    def add(self, columns: dict[str, Tensor], weight: float = 1.0) -> None:
        """Adds the columns of a batch; nothing leaves the device. With weight 0 it adds 0, also for NaN."""
        if not columns:
            return
        sums = torch.stack([value.detach().sum(dtype=torch.float32) for value in columns.values()])
        sums = weight * sums if weight else torch.zeros_like(sums)
        self._names = list(columns)
        self._sums = sums if self._sums is None else self._sums.to(sums.device) + sums

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Returns the sums over all processes by name and clears them; empty before the first batch."""
        if self._sums is not None:
            self._sums = accelerator.gather(self._sums.to(accelerator.device)[None]).sum(0)
        sums = self.state()
        self._sums = None
        return sums

    def state(self) -> dict[str, float]:
        """Returns the sums of this process by name, for a checkpoint; a float holds each exactly."""
        return {} if self._sums is None else dict(zip(self._names, self._sums.tolist(), strict=True))

    def load(self, state: dict[str, float]) -> None:
        """Restores what :meth:`state` returned; an empty state clears the sums."""
        self._names = list(state)
        self._sums = torch.tensor(list(state.values()), dtype=torch.float32) if state else None


def metric_names(objective: Objective) -> tuple[str, ...]:
    """Returns the metrics of an objective; without a reference there is nothing to compare with."""
    compares = ("implicit_rewards/", "kl")
    return METRICS if objective.uses_reference else tuple(name for name in METRICS if not name.startswith(compares))


def pair_columns(scores: PairScores, objective: Objective) -> dict[str, Tensor]:
    """Computes every metric of every pair, ``[P]`` each, under the names they are logged by, and the counts."""
    stats, beta = scores.stats, objective.reward_scale
    columns = {"pairs": torch.ones_like(scores.loss), "loss": scores.loss}
    columns |= {"tokens/chosen": stats.chosen_length, "tokens/rejected": stats.rejected_length}  # type: ignore[dict-item]
    for name, chosen, rejected in (
        ("rewards", scores.chosen_reward, scores.rejected_reward),
        ("implicit_rewards", beta * stats.chosen_logratio, beta * stats.rejected_logratio),
    ):
        margin = chosen - rejected
        columns |= {f"{name}/chosen": chosen, f"{name}/rejected": rejected, f"{name}/margins": margin}
        columns[f"{name}/accuracies"] = (1 + margin.sign()) / 2  # a tie is 1/2
    columns |= {"logps/chosen": stats.chosen_logp, "logps/rejected": stats.rejected_logp}  # type: ignore[dict-item]
    columns |= {"kl/chosen": stats.chosen_kl, "kl/rejected": stats.rejected_kl}
    columns["kl/margin"] = stats.chosen_kl - stats.rejected_kl
    if scores.aux_loss is not None:
        columns["aux_loss"] = scores.aux_loss.expand_as(scores.loss)
    if objective.uses_reference:
        return columns
    names = (*metric_names(objective), "pairs", "tokens/chosen", "tokens/rejected", "aux_loss")
    return {name: column for name, column in columns.items() if name in names}


def pair_means(sums: dict[str, float]) -> dict[str, float]:
    """Computes the mean of every metric over pairs from the sums of :func:`pair_columns`; empty without pairs.

    Examples:
        >>> pair_means({})
        {}
    """
    if not sums:
        return {}
    pairs = sums["pairs"]
    means = {name: value / pairs for name, value in sums.items() if name != "pairs" and not name.startswith("tokens/")}
    if "kl/margin" not in means:
        return means
    for side in SIDES:
        means[f"kl_per_token/{side}"] = sums[f"kl/{side}"] / sums[f"tokens/{side}"]
    means["kl_per_token/margin"] = means["kl_per_token/chosen"] - means["kl_per_token/rejected"]
    return means


def displacement(history: Sequence[dict[str, Any]], beta: float, patience: int = 3, noticeable: float = -1.0) -> str:
    """Describes likelihood displacement: chosen and rejected responses both become less likely, log after log.

    The margin of a preference loss can grow while both sides fall, and probability moves to unrated responses.

    Args:
        history: The logs of a run so far; the last ones are looked at.
        beta: Of the objective, to read log-ratios off implicit rewards.
        patience: Logs in a row that both log-ratios have to fall.
        noticeable: What the mean chosen log-ratio must have fallen below, in nats.

    Returns:
        A warning; empty where one of the two has not fallen all the time, or the chosen one not far.
    """
    sides = ("implicit_rewards/chosen", "implicit_rewards/rejected")
    logs = islice((log for log in reversed(history) if sides[0] in log), patience + 1)  # the last one first
    rewards = [[log[side] for side in sides] for log in logs]
    fell = [all(new < min(old, 0.0) for new, old in zip(*logs, strict=True)) for logs in pairwise(rewards)]
    if len(fell) < patience or not all(fell) or rewards[0][0] > beta * noticeable:
        return ""
    chosen, rejected = rewards[0]
    return (
        f"likelihood displacement: over the last {patience} logs chosen and rejected responses both became less "
        f"likely than under the reference (implicit rewards {chosen:.3g} and {rejected:.3g}). The margin may grow "
        "while the policy drifts to unrated responses; a lower learning rate or objective parameters "
        "that tie it to the reference more strongly (beta, alpha) hold it closer"
    )
