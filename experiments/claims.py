"""Decides claims about curves of a sweep: paired differences over seeds, and the verdict on them.

A row is one measurement of one run, as ``tdpo frontier`` writes it. Its curve is its label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tdpo.evaluate.estimates import Estimate
from tdpo.evaluate.frontier import SFT, Frontier, Row, curve_name

LEVELS = 10
"""Levels of KL or reward at which two curves are compared; evenly spaced."""


@dataclass(frozen=True)
class Comparison:
    """One difference that a claim says is at least zero.

    Attributes:
        what: What is subtracted from what.
        difference: Its mean and 95% Student-t interval over seeds; None if the curves have no range in common.
        low: Lower end of the range of KL or reward it is averaged over; None for a difference at one point.
        high: Upper end of the range.
    """

    what: str
    difference: Estimate | None
    low: float | None = None
    high: float | None = None


def verdict(comparisons: Sequence[Comparison]) -> str:
    """Returns whether a claim holds in all comparisons, fails in one, or neither.

    Example:
        >>> above, around = Estimate.over_seeds([1.0, 1.1]), Estimate.over_seeds([-1.0, 1.1])
        >>> verdict([Comparison("a", above)]), verdict([Comparison("a", above), Comparison("b", around)])
        ('reproduced', 'not decidable at this scale')
    """
    found = [comparison.difference for comparison in comparisons]
    if any(difference is not None and difference.high < 0 for difference in found):
        return "not reproduced"
    if all(difference is not None and difference.low > 0 for difference in found):
        return "reproduced"
    return "not decidable at this scale"


def last_rows(rows: Sequence[Row], curve: str) -> dict[Any, Row]:
    """Returns the last measurement of every seed of a curve."""
    found: dict[Any, Row] = {}
    for row in sorted((row for row in rows if curve_name(row) == curve), key=lambda row: row["step"]):
        found[row["seed"]] = row
    return found


def at_the_end(rows: Sequence[Row], larger: str, smaller: str, column: str) -> Comparison:
    """Compares a column of the last measurements of two curves, paired by seed."""
    first, second = last_rows(rows, larger), last_rows(rows, smaller)
    values = [first[seed][column] - second[seed][column] for seed in first if seed in second]
    return Comparison(f"{larger} - {smaller}", Estimate.over_seeds(values))


def reward_at_equal_kl(rows: Sequence[Row], curve: str, baseline: str) -> Comparison:
    """Compares the rewards of two curves over the KL(policy || reference) that both reach on every seed.

    Rewards are interpolated along the Pareto front of each seed.
    """
    curves = {found.name: found for found in Frontier.of(rows, baseline).curves}
    seeds = [seed for seed in curves[curve].seeds if seed in curves[baseline].seeds]
    fronts = [[curves[name].seeds[seed] for name in (curve, baseline)] for seed in seeds]
    high = min(front.largest for pair in fronts for front in pair)
    levels = np.linspace(0, high, LEVELS + 1)[1:]
    values = [np.mean([mine.reward_at(x) - other.reward_at(x) for x in levels]) for mine, other in fronts]
    return Comparison(f"{curve} - {baseline}", Estimate.over_seeds(values), 0.0, high)


def at_equal_reward(rows: Sequence[Row], curve: str, baseline: str, column: str) -> Comparison:
    """Compares a column of two curves over the rewards that both reach on every seed.

    The column is interpolated linearly in the reward, between measurements of a seed ordered by reward, starting at
    the SFT model.
    """
    start = [row for row in rows if row["objective"] == SFT]
    paths = {}
    for name in (curve, baseline):
        own = [row for row in rows if curve_name(row) == name]
        for seed in {row["seed"] for row in own}:
            points = sorted((row["reward"], row[column]) for row in (*start, *own) if row["seed"] in (seed, ""))
            points = [point for point in points if point[1] != ""]
            paths[name, seed] = np.array(points, dtype=np.float64)
    seeds = sorted(seed for name, seed in paths if name == curve and (baseline, seed) in paths)
    compared = [paths[name, seed] for name in (curve, baseline) for seed in seeds]
    low, high = max(path[0, 0] for path in compared), min(path[-1, 0] for path in compared)
    what = f"{curve} - {baseline}, {column}"
    if not low < high:
        return Comparison(what, None)
    levels = np.linspace(low, high, LEVELS + 1)[1:]
    curves = [[np.interp(levels, *paths[name, seed].T).mean() for seed in seeds] for name in (curve, baseline)]
    values = np.subtract(*curves).tolist()
    return Comparison(what, Estimate.over_seeds(values), low, high)


def mean_reward(rows: Sequence[Row], limit: float) -> dict[tuple[str, float], float]:
    """Returns the reward averaged over KLs from 0 to a limit, by curve and learning rate, over seeds.

    Along the Pareto front of a run; beyond its end the reward is that of the end.
    """
    start = [row for row in rows if row["objective"] == SFT]
    found: dict[tuple[str, float], float] = {}
    for row in rows:
        key = (curve_name(row), row["learning_rate"])
        if row["objective"] == SFT or key in found:
            continue
        own = [other for other in rows if (curve_name(other), other["learning_rate"]) == key]
        (curve,) = Frontier.of([*start, *own]).curves
        levels = np.linspace(0, limit, 101)
        fronts = [np.interp(levels, *front.points.T) for front in curve.seeds.values()]
        found[key] = float(np.mean(fronts))
    return found


def best_learning_rates(rows: Sequence[Row], limit: float) -> dict[str, float]:
    """Returns the learning rate with the largest :func:`mean_reward` of each curve."""
    rewards, best = mean_reward(rows, limit), {}
    for (curve, rate), reward in rewards.items():
        if curve not in best or reward > rewards[curve, best[curve]]:
            best[curve] = rate
    return best


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Renders a Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines))


def cell(values: Sequence[float] | Estimate | None, spec: str = ".2f") -> str:
    """Renders mean and half of the 95% interval over seeds."""
    if values is None or (not isinstance(values, Estimate) and not values):
        return "-"
    found = values if isinstance(values, Estimate) else Estimate.over_seeds(values)
    return f"{found.mean:{spec}}" if np.isnan(found.half) else f"{found.mean:{spec}} ± {found.half:{spec}}"


def comparison_table(claims: Mapping[str, Sequence[Comparison]], spec: str = "+.3f") -> str:
    """Renders comparisons by claim, each with its interval."""
    lines = []
    for name, comparisons in claims.items():
        for found in comparisons:
            over = "-" if found.low is None else f"{found.low:.2f} to {found.high:.2f}"
            difference = found.difference
            interval = "-" if difference is None else f"{difference.low:{spec}} to {difference.high:{spec}}"
            mean = "-" if difference is None else f"{difference.mean:{spec}}"
            lines.append([name, found.what, over, mean, interval])
    return table(["", "difference", "averaged over", "mean", "95% interval"], lines)


BEGIN, END = "<!-- computed by report.py -->", "<!-- end -->"


def insert(readme: Path, text: str) -> None:
    """Replaces what stands between the two marks of a README."""
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def inserted(readme: Path) -> str:
    """Returns what stands between the two marks of a README."""
    return readme.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()
