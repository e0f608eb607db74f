"""The metrics of pairs, the same in training, evaluation and ``tdpo eval``. They are summed on the device.

``rewards/*`` is the objective's own implicit reward, ``implicit_rewards/*`` is ``beta * log-ratio`` and comparable
across objectives. ``kl/*`` is the sequential KL(reference || policy) in nats, ``kl_per_token/*`` that divided by the
number of response tokens. Every margin is chosen minus rejected. ``aux_loss`` is the load-balancing loss of a
mixture-of-experts model before its coefficient, where it is part of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tdpo.data.pack import pack_padded
from tdpo.score import PairScores, token_counts
from tdpo.types import PairStats, TokenisedPair, TokenStats

SIDES = ("chosen", "rejected")


class Sums:
    """Named sums over a log or an evaluation.

    Attributes:
        sums: One tensor, so that reading it synchronises once; None before the first batch.
    """

    sums: Tensor | None = None
    _names: Sequence[str] = ()

    def reset(self) -> None:
        """Clears the sums."""
        self.sums = None

    def add_columns(self, columns: dict[str, Tensor], weight: float = 1.0) -> None:
        """Adds the columns of a batch; nothing leaves the device. With weight 0 it adds 0, also for NaN."""
        sums = torch.stack([value.sum(dtype=torch.float32) for value in columns.values()])
        sums = weight * sums if weight else torch.zeros_like(sums)
        self._names = list(columns)
        self.sums = sums if self.sums is None else self.sums.to(sums.device) + sums

    def merge(self, gathered: Tensor) -> None:
        """Replaces the sums by those of all processes, ``[processes, metrics]``."""
        self.sums = gathered.sum(0)

    def total(self) -> dict[str, float]:
        """Returns the sums by name, empty before the first batch; a float holds each exactly."""
        return {} if self.sums is None else dict(zip(self._names, self.sums.tolist(), strict=True))

    def means(self) -> dict[str, float]:
        """Computes the metrics from the sums, empty before the first batch."""
        raise NotImplementedError("abstract: a subclass knows what its sums are divided by")

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Returns the means over all processes and clears the sums."""
        if self.sums is not None:
            self.merge(accelerator.gather(self.sums.to(accelerator.device)[None]))
        means = self.means()
        self.reset()
        return means

    state = total

    def load(self, state: dict[str, float]) -> None:
        """Restores what :meth:`state` returned, from a checkpoint."""
        self._names = list(state)
        self.sums = torch.tensor(list(state.values()), dtype=torch.float32) if state else None


class MetricSums(Sums):
    """Sums of every metric over the pairs seen so far.

    Example:
        >>> MetricSums(beta=0.1).means()
        {}
    """

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def add(self, scores: PairScores, weight: float = 1.0) -> None:
        """Adds the pairs of a batch, none of them with weight 0."""
        self.add_columns(pair_columns(scores, self.beta), weight)

    def means(self) -> dict[str, float]:
        """Returns every metric as its mean over the pairs added, empty if there were none."""
        total = self.total()
        if not total:
            return {}
        pairs = total.pop("pairs")
        tokens = {side: total.pop(f"tokens/{side}") for side in SIDES}
        means = {name: value / pairs for name, value in total.items()}
        chosen, rejected = (total[f"kl/{side}"] / tokens[side] for side in SIDES)
        per_token = {"chosen": chosen, "rejected": rejected, "margin": chosen - rejected}
        return means | {f"kl_per_token/{name}": value for name, value in per_token.items()}


class RouterLossMean(Sums):
    """The mean of the unweighted router losses of batches."""

    def add(self, router_loss: Tensor, weight: float = 1.0) -> None:
        """Adds the loss of a batch, nothing with weight 0."""
        self.add_columns({"aux_loss": router_loss, "batches": torch.ones_like(router_loss)}, weight)

    def means(self) -> dict[str, float]:
        """Returns the mean as ``aux_loss``, empty before the first batch."""
        total = self.total()
        return {"aux_loss": total["aux_loss"] / max(total["batches"], 1.0)} if total else {}


def metric_names() -> list[str]:
    """Lists the names of all metrics; no pair is needed.

    Example:
        >>> metric_names()[:3]
        ['loss', 'rewards/chosen', 'rewards/rejected']
    """
    zero, batch = torch.zeros(1), pack_padded([TokenisedPair([0], [0], [0])])
    stats = PairStats(zero, zero, zero, zero)
    sums = MetricSums(beta=1.0)
    sums.add(PairScores(zero, zero, zero, stats, zero, zero, TokenStats(zero, zero, zero), batch))
    return list(sums.means())


def pair_columns(scores: PairScores, beta: float) -> dict[str, Tensor]:
    """Computes every metric of every pair, ``[P]`` each, under the names they are logged by."""
    stats, tokens = scores.stats, token_counts(scores.batch)
    columns = {"pairs": torch.ones_like(scores.loss), "loss": scores.loss}
    columns |= {f"tokens/{side}": tokens[:, index] for index, side in enumerate(SIDES)}
    columns |= compared("rewards", scores.chosen_reward, scores.rejected_reward)
    columns |= compared("implicit_rewards", beta * stats.chosen_logratio, beta * stats.rejected_logratio)
    columns |= {"logps/chosen": scores.chosen_logp, "logps/rejected": scores.rejected_logp}
    columns |= {
        "kl/chosen": stats.chosen_kl,
        "kl/rejected": stats.rejected_kl,
        "kl/margin": stats.chosen_kl - stats.rejected_kl,
    }
    if scores.aux_loss is not None:
        columns["aux_loss"] = scores.aux_loss.expand_as(scores.loss)
    return {name: value.detach() for name, value in columns.items()}


def compared(name: str, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Compares both sides of a reward: its margin, and whether it ranks the pair as the data does; a tie is 1/2."""
    margin = chosen - rejected
    return {
        f"{name}/chosen": chosen,
        f"{name}/rejected": rejected,
        f"{name}/accuracies": (1 + margin.sign()) / 2,
        f"{name}/margins": margin,
    }


class DisplacementWatch:
    """Notices likelihood displacement: chosen and rejected responses both becoming less likely, log after log.

    The margin of a preference loss can grow while both sides fall, and probability moves to unrated responses.

    Args:
        beta: Of the objective, to read log-ratios off implicit rewards.
        patience: Logs in a row that both log-ratios have to fall.
        noticeable: What the mean chosen log-ratio must have fallen below, in nats.
    """

    def __init__(self, beta: float, patience: int = 3, noticeable: float = -1.0) -> None:
        self.patience, self.fallen = patience, beta * noticeable
        self.reset()

    def reset(self) -> None:
        """Forgets all logs, as at the start of a run."""
        self._falling, self._warned = 0, False
        self._last: tuple[float, float] | None = None

    def state(self) -> dict[str, Any]:
        """Returns what has been seen so far, for a checkpoint."""
        return {"falling": self._falling, "warned": self._warned, "last": self._last}

    def load(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state` returned."""
        self._falling, self._warned = state["falling"], state["warned"]
        self._last = None if state["last"] is None else tuple(state["last"])

    def warning(self, metrics: dict[str, float]) -> str | None:
        """Reads one log's metrics and returns a warning, once, when both log-ratios keep falling and have fallen far.

        Example:
            >>> watch = DisplacementWatch(beta=0.1, patience=1)
            >>> watch.warning({"implicit_rewards/chosen": 0.0, "implicit_rewards/rejected": 0.0}) is None
            True
            >>> watch.warning({"implicit_rewards/chosen": -0.2, "implicit_rewards/rejected": -0.3})[:23]
            'likelihood displacement'
        """
        now = (metrics["implicit_rewards/chosen"], metrics["implicit_rewards/rejected"])
        last, self._last = self._last, now
        both_fell = last is not None and all(n < min(old, 0.0) for n, old in zip(now, last, strict=True))
        self._falling = self._falling + 1 if both_fell else 0
        if self._warned or self._falling < self.patience or now[0] > self.fallen:
            return None
        self._warned = True
        return (
            f"likelihood displacement: over the last {self.patience} logs chosen and rejected responses both became "
            f"less likely than under the reference (implicit rewards {now[0]:.3g} and {now[1]:.3g}). The margin may "
            "grow while the policy drifts to unrated responses; a lower learning rate, a larger beta, or a larger "
            "alpha with tdpo2 holds it closer"
        )
