"""The reward-KL frontier of a sweep: points over seeds, Pareto fronts, and rewards at equal KL.

KL is KL(policy || reference) of whole responses, in nats.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from tdpo.errors import UserError
from tdpo.files import atomic_write

FIRST_COLUMNS = (
    "objective", "beta", "alpha", "learning_rate", "seed", "step", "reward", "reward_se", "kl", "kl_se", "entropy",
    "length",
)  # fmt: skip
SETTING = ("beta", "alpha", "learning_rate", "options")
SFT = "sft"
CONFIDENCE = 0.95
LEVELS = 4

Row = Mapping[str, Any]


class Mean(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: The mean.
        half: Half of its 95% Student interval; None for a single seed.
        seeds: Number of seeds.
    """

    mean: float
    half: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Computes mean and interval.

        Example:
            >>> mean, half, seeds = Mean.of([1.0, 2.0, 3.0])
            >>> mean, round(half, 4), seeds
            (2.0, 2.4841, 3)
        """
        count = len(values)
        if count < 2:
            return cls(float(values[0]), None, count)
        error = float(np.std(values, ddof=1)) / math.sqrt(count)
        return cls(float(np.mean(values)), float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error, count)

    def __format__(self, spec: str) -> str:
        """Formats the mean, and the interval if there is one."""
        return f"{self.mean:{spec}}" + ("" if self.half is None else f" ±{self.half:{spec.lstrip('+')}}")


class Point(NamedTuple):
    """One measurement of a setting, averaged over seeds; with one seed, intervals are the measurement's own.

    Attributes:
        setting: beta, alpha, learning rate and further options, as in the rows.
        step: Optimizer steps.
        kl: KL(policy || reference), nats per response.
        reward: Mean reward.
    """

    setting: tuple[Any, ...]
    step: int
    kl: Mean
    reward: Mean


@dataclass(frozen=True)
class Curve:
    """All measurements of one objective, or of the runs with one label.

    Attributes:
        name: Label of its rows.
        points: Averages over seeds, by setting and step.
        front: Those of the points that no other one, nor the SFT model, beats in both KL and reward; by KL.
        rewards: By seed, the pairs of KL and reward of its Pareto front, from the SFT model on, and its largest KL.
    """

    name: str
    points: Sequence[Point]
    front: Sequence[Point]
    rewards: Mapping[Any, tuple[np.ndarray, float]]

    def at(self, level: float) -> dict[Any, float]:
        """Returns the reward at a KL by seed; seeds that never came so far are left out."""
        return {seed: reward_at(front, level) for seed, (front, largest) in self.rewards.items() if level <= largest}

    def differences(self, other: Curve, level: float) -> list[float]:
        """Returns this curve's reward minus another's at a KL, for each seed that both have."""
        mine, theirs = self.at(level), other.at(level)
        return [mine[seed] - theirs[seed] for seed in mine if seed in theirs]


@dataclass(frozen=True)
class Frontier:
    """The curves of a sweep.

    Attributes:
        sft: KL (0) and reward of the SFT model; None if the rows have none.
        curves: In the order of the rows.
        diverged: What was left out: rows whose KL or reward is not finite, as curve, setting, seed and step.
    """

    sft: tuple[float, float] | None
    curves: Sequence[Curve]
    diverged: Sequence[str]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Frontier:
        """Groups the rows of a sweep by label, setting, step and seed."""
        finite = [row for row in rows if math.isfinite(row["kl"]) and math.isfinite(row["reward"])]
        lost = [f"{name_of(row)} seed {row['seed']} step {row['step']}" for row in rows if row not in finite]
        starts = [(float(row["kl"]), float(row["reward"])) for row in finite if row["objective"] == SFT]
        start = starts[:1]
        trained = [row for row in finite if row["objective"] != SFT]
        curves = [
            _curve(name, [row for row in trained if name_of(row) == name], start)
            for name in dict.fromkeys(map(name_of, trained))
        ]
        return cls(start[0] if start else None, curves, lost)

    def curve(self, name: str | None) -> Curve:
        """Returns a curve by its name; the first one for None.

        Raises:
            UserError: listing the curves.
        """
        for curve in self.curves:
            if name in (None, curve.name):
                return curve
        raise UserError(f"--baseline {name}: there are {', '.join(curve.name for curve in self.curves) or 'no curves'}")

    def levels(self) -> list[float]:
        """Returns KLs, evenly spaced, that every seed of every curve reached."""
        largest = [largest for curve in self.curves for _, largest in curve.rewards.values()]
        return [min(largest) * part / LEVELS for part in range(1, LEVELS + 1)] if largest else []


def name_of(row: Row) -> str:
    """Returns the curve of a row: its label, or its objective."""
    return str(row.get("label") or row["objective"])


def setting_of(row: Row) -> tuple[Any, ...]:
    """Returns what runs differ in beside their seed; empty where the row says nothing."""
    return tuple(row.get(key, "") for key in SETTING)


def _curve(name: str, rows: Sequence[Row], start: Sequence[tuple[float, float]]) -> Curve:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((*setting_of(row), row["step"]), []).append(row)
    points = [Point(key[:-1], key[-1], _mean(group, "kl"), _mean(group, "reward")) for key, group in groups.items()]
    means = [(point.kl.mean, point.reward.mean) for point in points]
    kept = set(pareto([*means, *start]))
    front = sorted({mean: point for mean, point in zip(means, points, strict=True) if mean in kept}.values(), key=_kl)
    by_seed: dict[Any, list[tuple[float, float]]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], list(start)).append((row["kl"], row["reward"]))
    rewards = {seed: (np.array(pareto(found)), max(kl for kl, _ in found)) for seed, found in by_seed.items()}
    return Curve(name, points, front, rewards)


def _mean(rows: Sequence[Row], figure: str) -> Mean:
    """Averages a figure over seeds; the interval of a single one is that over its prompts."""
    found = Mean.of([row[figure] for row in rows])
    error = rows[0].get(f"{figure}_se", "")
    normal = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    return found if found.half is not None or error == "" else found._replace(half=normal * error)


def _kl(point: Point) -> float:
    return point.kl.mean


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the pairs of KL and reward that no other pair beats: more reward needs more KL.

    Example:
        >>> pareto([(1.0, 0.2), (2.0, 0.1), (2.0, 0.5), (0.0, 0.0), (3.0, 0.5)])
        [(0.0, 0.0), (1.0, 0.2), (2.0, 0.5)]
    """
    front: list[tuple[float, float]] = []
    for kl, reward in sorted(points, key=lambda pair: (pair[0], -pair[1])):
        if not front or reward > front[-1][1]:
            front.append((kl, reward))
    return front


def reward_at(front: np.ndarray, level: float) -> float:
    """Interpolates the reward of a Pareto front ``[n, 2]`` at a KL, linearly.

    Beyond its end the reward stays: a policy with less KL has that much. Before its beginning there is none: NaN.

    Example:
        >>> reward_at(np.array([[0.0, 0.0], [2.0, 0.4]]), 0.5), reward_at(np.array([[0.0, 0.0], [2.0, 0.4]]), 3.0)
        (0.1, 0.4)
    """
    return float(np.interp(level, front[:, 0], front[:, 1], left=math.nan))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows as CSV, atomically: the columns of every sweep first, then the others as they come.

    Raises:
        OSError: if it cannot be written.
    """
    names = dict.fromkeys([*FIRST_COLUMNS, *(name for row in rows for name in row)])
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, text.getvalue())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads what :func:`write_rows` wrote, with its numbers; empty cells are ``""``.

    Raises:
        UserError: if the file is not such a table.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    missing = [name for name in ("objective", "seed", "step", "reward", "kl") if rows and name not in rows[0]]
    if missing or not rows:
        raise UserError(f"{path}: not the table of a sweep: " + (f"no column {missing[0]!r}" if missing else "no rows"))
    return rows


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
