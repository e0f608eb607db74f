"""The reward-KL frontier of a sweep: averages over seeds, Pareto fronts, and rewards at equal KL.

KL is KL(policy || reference) of whole responses along the policy's samples, in nats; reward is the mean over held-out
prompts. A row of a sweep is one measurement of one run.
"""

from __future__ import annotations

import csv
import io
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tdpo.errors import UserError, nearest
from tdpo.evaluate.estimates import Estimate
from tdpo.files import atomic_write
from tdpo.objectives import OBJECTIVES, parameter_names

FIRST_COLUMNS = (
    "objective", "beta", "alpha", "learning_rate", "seed", "step", "reward", "reward_se", "kl", "kl_se", "entropy",
    "length",
)  # fmt: skip
NEEDED = ("objective", "seed", "step", "reward", "kl")
NAMES = ("objective", "label")
"""Columns of text, whatever they look like."""
SFT = "sft"
"""The objective of the rows that measure the model every run starts from."""
LEVELS = 4
NORMAL_HALF = 1.96
"""Standard errors on each side of a mean in a 95% interval of the normal distribution."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """One measurement of one setting, averaged over seeds.

    Attributes:
        settings: Values of the setting columns by name, without empty ones.
        step: Optimizer steps.
        kl: KL(policy || reference), nats per response.
        reward: Mean reward.
        interval: Where the intervals come from: Student's t over ``"seeds"``, or for a single seed 1.96 standard
            errors of the measurement over ``"prompts"``.
    """

    settings: Mapping[str, Any]
    step: int
    kl: Estimate
    reward: Estimate
    interval: Literal["seeds", "prompts"]


@dataclass(frozen=True)
class SeedFront:
    """Reward as a function of KL for one seed of one curve.

    Attributes:
        points: KL and reward along the Pareto front ``[n, 2]``, from the SFT model on, by KL.
        largest: Largest KL measured, on the front or not.
    """

    points: np.ndarray
    largest: float

    def reward_at(self, level: float) -> float | None:
        """Interpolates the reward at a KL, linearly along the front.

        Between the end of the front and the largest KL measured it is that of the end, since a policy with less KL has
        that much. Outside of what was measured it is None.

        Examples:
            >>> front = SeedFront(np.array([[0.0, 0.0], [2.0, 0.5]]), largest=3.0)
            >>> front.reward_at(0.5), front.reward_at(2.5), front.reward_at(3.5)
            (0.125, 0.5, None)
        """
        if not self.points[0, 0] <= level <= self.largest:
            return None
        return float(np.interp(level, self.points[:, 0], self.points[:, 1]))


@dataclass(frozen=True)
class Curve:
    """All measurements of one objective, or of the runs with one label.

    Attributes:
        name: Label or objective.
        points: Averages over seeds by setting and step, in the order of the rows.
        front: Those of the points that no other one, nor the SFT model, beats; by KL.
        seeds: Reward as a function of KL by seed, along the front of all settings and steps.
    """

    name: str
    points: Sequence[Point]
    front: Sequence[Point]
    seeds: Mapping[Any, SeedFront]

    @property
    def best(self) -> Point:
        """The point with the largest mean reward; of equal ones that with the least KL."""
        return max(self.points, key=lambda point: (point.reward.mean, -point.kl.mean))

    def reward_at(self, level: float) -> Estimate | None:
        """Returns the reward at a KL, averaged over seeds; None unless every seed reaches it."""
        return _over_seeds([front.reward_at(level) for front in self.seeds.values()])

    def difference(self, baseline: Curve, level: float) -> Estimate | None:
        """Returns the reward at a KL minus the baseline's, paired by the seeds that both have.

        The interval is Student's t over the paired differences (NaN for a single one). None without a common seed, or
        if one of them does not reach the KL on either curve.
        """
        pairs = [
            (front.reward_at(level), baseline.seeds[seed].reward_at(level))
            for seed, front in self.seeds.items()
            if seed in baseline.seeds
        ]
        return _over_seeds([None if mine is None or other is None else mine - other for mine, other in pairs])


@dataclass(frozen=True)
class Frontier:
    """The curves of a sweep.

    Attributes:
        curves: The baseline first, the others in the order of the rows; none if no row of a trained model is finite.
        sft: The SFT model; None if no row measures it.
        left_out: Number of rows left out because KL or reward is not finite, by run ("ppo beta 0.1 seed 2").
    """

    curves: Sequence[Curve]
    sft: Point | None
    left_out: Mapping[str, int]

    @classmethod
    def of(cls, rows: Sequence[Row], baseline: str | None = None) -> Frontier:
        """Groups the rows of a sweep by curve, setting, step and seed.

        Args:
            rows: As :func:`read_rows` returns them; empty cells are ``""`` or None.
            baseline: The curve that comes first; default: the first one of the rows.

        Raises:
            UserError: for a baseline without a finite row, or if two rows have curve, settings, step and seed in
                common.
        """
        settings = setting_names(rows)
        left_out: dict[str, int] = {}
        for row in (row for row in rows if not is_finite(row)):
            run = " ".join([curve_name(row), *(f"{n} {v}" for n, v in _present(row, [*settings, "seed"]).items())])
            left_out[run] = left_out.get(run, 0) + 1
        finite = [row for row in rows if is_finite(row)]
        starts = [row for row in finite if row["objective"] == SFT]
        curves: dict[str, list[Row]] = {}
        for row in finite:
            if row["objective"] != SFT:
                curves.setdefault(curve_name(row), []).append(row)
        first = next(iter(curves), None) if baseline is None else baseline
        if first is not None and first not in curves:
            names = dict.fromkeys(curve_name(row) for row in rows if row["objective"] != SFT)
            why = "no measurement of it is finite" if first in names else f"there are {', '.join(names)}"
            raise UserError(f"--baseline {first}: {why}.{nearest(first, curves)}")
        ordered = sorted(curves, key=lambda name: name != first)
        found = [_curve(name, curves[name], starts, settings) for name in ordered]
        return cls(found, _point(starts, {}) if starts else None, left_out)

    def levels(self, count: int = LEVELS) -> list[float]:
        """Returns evenly spaced KLs inside the range that every curve reaches on every seed; none if there is no such.

        The step is rounded down to two significant digits, so that the KLs of a table are those of the comparison.
        """
        fronts = [front for curve in self.curves for front in curve.seeds.values()]
        if not fronts:
            return []
        low, high = max(front.points[0, 0] for front in fronts), min(front.largest for front in fronts)
        step = _round_down((high - low) / count) if high > low else 0.0
        # Rounded, or the third of three steps of 0.1 would be 0.30000000000000004.
        return [min(float(f"{low + step * part:.12g}"), high) for part in range(1, count + 1)] if step else []


def _round_down(value: float) -> float:
    """Rounds a positive number down to two significant digits.

    Examples:
        >>> _round_down(0.2899), _round_down(0.29), _round_down(1372.0)
        (0.28, 0.29, 1300.0)
    """
    digits = 1 - math.floor(math.log10(value))
    return math.floor(round(value * 10.0**digits, 9)) / 10.0**digits


def _over_seeds(values: Sequence[float | None]) -> Estimate | None:
    """Averages over seeds; None without a seed, or if one has no value."""
    present = [value for value in values if value is not None]
    return Estimate.over_seeds(present) if present and len(present) == len(values) else None


def is_finite(row: Row) -> bool:
    """Returns whether a row has a finite KL and reward: no diverged run, no empty cell."""
    values = [row.get(name) for name in ("kl", "reward")]
    return all(isinstance(value, numbers.Real) and math.isfinite(value) for value in values)


def curve_name(row: Row) -> str:
    """Returns the curve a row belongs to: its label, or its objective."""
    return str(row.get("label") or row["objective"])


def setting_names(rows: Sequence[Row]) -> list[str]:
    """Returns the columns that hold settings of runs: objectives' parameters, learning rate, and text.

    Measurements are numbers, so that a column with text, such as ``token_weights``, is a setting.
    """
    known = {"learning_rate", *(name for objective in OBJECTIVES.values() for name in parameter_names(objective))}
    named = {name for row in rows for name, value in row.items() if name in known or (isinstance(value, str) and value)}
    order = dict.fromkeys([*FIRST_COLUMNS, *sorted(named)])
    return [name for name in order if name in named - {*NAMES, "seed", "step"}]


def by_setting(rows: Sequence[Row], names: Sequence[str]) -> list[tuple[dict[str, Any], list[Row]]]:
    """Groups the rows of one curve by the values of the named columns, in the order of the rows."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(_present(row, names).items()), []).append(row)
    return [(dict(key), group) for key, group in groups.items()]


def average(rows: Sequence[Row], name: str) -> Estimate:
    """Averages a column over rows that differ by seed, with Student's interval.

    A single row keeps its own standard error, column ``<name>_se``, and has an interval of 1.96 of it on each side.
    """
    if len(rows) > 1:
        return Estimate.over_seeds([row[name] for row in rows])
    mean, error = float(rows[0][name]), float(rows[0].get(f"{name}_se") or math.nan)
    return Estimate(mean, error, mean - NORMAL_HALF * error, mean + NORMAL_HALF * error, 1)


def _present(row: Row, names: Iterable[str]) -> dict[str, Any]:
    """Returns the cells of a row that are not empty."""
    return {name: row[name] for name in names if row.get(name) not in (None, "")}


def _point(rows: Sequence[Row], settings: Mapping[str, Any]) -> Point:
    values = {name: value for name, value in settings.items() if name != "step"}
    interval: Literal["seeds", "prompts"] = "seeds" if len(rows) > 1 else "prompts"
    return Point(values, int(rows[0]["step"]), average(rows, "kl"), average(rows, "reward"), interval)


def _curve(name: str, rows: Sequence[Row], starts: Sequence[Row], names: Sequence[str]) -> Curve:
    points = []
    for settings, group in by_setting(rows, [*names, "step"]):
        seeds = [row["seed"] for row in group]
        if len(set(seeds)) < len(seeds):
            seed, what = max(seeds, key=seeds.count), ", ".join(f"{n} {v}" for n, v in settings.items())
            raise UserError(
                f"{seeds.count(seed)} rows of {name!r} have seed {seed}, {what}: give the runs different labels, or "
                "drop what was measured twice"
            )
        points.append(_point(group, settings))
    # The SFT model competes in the front and is none of its points.
    start = [(_point(starts, {}).kl.mean, _point(starts, {}).reward.mean)] if starts else []
    kept = pareto([*start, *((point.kl.mean, point.reward.mean) for point in points)])
    front = [points[index - len(start)] for index in kept if index >= len(start)]
    by_seed: dict[Any, list[Row]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], []).append(row)
    return Curve(name, points, front, {seed: _seed_front(seed, found, starts) for seed, found in by_seed.items()})


def _seed_front(seed: Any, rows: Sequence[Row], starts: Sequence[Row]) -> SeedFront:
    """Returns the Pareto front of one seed's rows and the SFT model, as measured with this seed or on average."""
    own = [row for row in starts if row["seed"] == seed] or starts
    start = [(_point(own, {}).kl.mean, _point(own, {}).reward.mean)] if own else []
    points = np.array([*start, *((row["kl"], row["reward"]) for row in rows)], dtype=np.float64)
    return SeedFront(points[pareto(points.tolist())], float(points[:, 0].max()))


def pareto(points: Iterable[Sequence[float]]) -> list[int]:
    """Returns indices of the (KL, reward) pairs that no other pair beats, by KL.

    A pair beats another with no more KL and no less reward; of equal pairs the first one is kept.

    Examples:
        >>> pareto([(1.0, 0.2), (2.0, 0.1), (2.0, 0.5), (0.0, 0.0), (3.0, 0.5)])
        [3, 0, 2]
    """
    found = list(points)
    kept: list[int] = []
    for index in sorted(range(len(found)), key=lambda index: (found[index][0], -found[index][1])):
        if not kept or found[index][1] > found[kept[-1]][1]:
            kept.append(index)
    return kept


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows as CSV, atomically: :data:`FIRST_COLUMNS`, then the others in order of appearance.

    Numbers are written so that reading them gives the same ones; cells that a row lacks are empty.

    Raises:
        OSError: if it cannot be written.
    """
    names = dict.fromkeys([*FIRST_COLUMNS, *(name for row in rows for name in row)])
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, text.getvalue())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads what :func:`write_rows` wrote: integers, floats and text; empty cells are ``""``.

    Raises:
        UserError: naming the file, and the row of a cell that is wrong.
    """
    try:
        table = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a table of a sweep: {error}") from error
    names = table[0] if table else []
    if missing := [name for name in NEEDED if name not in names]:
        raise UserError(f"{path}: not a table of a sweep: there is no column {missing[0]!r}")
    rows = []
    for number, cells in enumerate(table[1:], 1):
        if len(cells) != len(names):
            raise UserError(f"{path}, row {number}: {len(cells)} cells; the first line names {len(names)} columns")
        row = {name: cell if name in NAMES else _value(cell) for name, cell in zip(names, cells, strict=True)}
        if not row["objective"]:
            raise UserError(f"{path}, row {number}: `objective` is empty")
        for name in ("reward", "kl", "step", "seed"):
            if row[name] != "" and isinstance(row[name], str):
                raise UserError(f"{path}, row {number}: `{name}` is {row[name]!r}, not a number")
        rows.append(row)
    return rows


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
