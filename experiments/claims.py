"""Tests claims about the curves of a sweep: differences paired by seed, and the verdict on them.

A row is one measurement of one run, as ``tdpo frontier`` writes it. Its curve is its label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tdpo.evaluate.estimates import Estimate
from tdpo.evaluate.frontier import SFT, Frontier, Row, curve_name, pareto

LEVELS = 10
"""Levels of KL or reward at which two curves are compared; evenly spaced."""


@dataclass(frozen=True)
class Comparison:
    """One difference that a claim says is larger than zero.

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
    """Compares a column of the last measurements of two curves, paired by seed.

    Raises:
        ValueError: if the curves end at different steps.
    """
    first, second = last_rows(rows, larger), last_rows(rows, smaller)
    if len(steps := {row["step"] for row in (*first.values(), *second.values())}) > 1:
        raise ValueError(f"{larger} and {smaller} end at different steps: {steps}")
    values = [first[seed][column] - second[seed][column] for seed in first if seed in second]
    return Comparison(f"{larger} - {smaller}, {column}", Estimate.over_seeds(values))


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

    The column is interpolated linearly in the reward along the Pareto front of KL and reward of each seed, which starts
    at the SFT model.
    """
    start = [row for row in rows if row["objective"] == SFT]
    fronts: dict[tuple[str, Any], np.ndarray] = {}
    for name in (curve, baseline):
        own = [row for row in rows if curve_name(row) == name]
        for seed in {row["seed"] for row in own}:
            points = [row for row in (*start, *own) if row["seed"] in (seed, "") and row[column] != ""]
            kept = pareto([(row["kl"], row["reward"]) for row in points])
            fronts[name, seed] = np.array([(points[k]["reward"], points[k][column]) for k in kept], dtype=np.float64)
    seeds = sorted(seed for name, seed in fronts if name == curve and (baseline, seed) in fronts)
    compared = [fronts[name, seed] for name in (curve, baseline) for seed in seeds]
    low, high = max(front[0, 0] for front in compared), min(front[-1, 0] for front in compared)
    what = f"{curve} - {baseline}, {column}"
    if not low < high:
        return Comparison(what, None)
    levels = np.linspace(low, high, LEVELS + 1)[1:]
    curves = [[np.interp(levels, *fronts[name, seed].T).mean() for seed in seeds] for name in (curve, baseline)]
    return Comparison(what, Estimate.over_seeds(np.subtract(*curves).tolist()), low, high)


def mean_reward(rows: Sequence[Row], limit: float) -> dict[tuple[str, float], float]:
    """Returns the reward averaged over KLs from 0 to a limit, by curve and learning rate, over seeds.

    Along the Pareto front of a run; beyond its end the reward is that of the end.
    """
    start = [row for row in rows if row["objective"] == SFT]
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        if row["objective"] != SFT:
            groups.setdefault((curve_name(row), row["learning_rate"]), []).append(row)
    levels = np.linspace(0, limit, 101)
    found = {}
    for key, own in groups.items():
        (curve,) = Frontier.of([*start, *own]).curves
        found[key] = float(np.mean([np.interp(levels, *front.points.T) for front in curve.seeds.values()]))
    return found


def best_learning_rates(rows: Sequence[Row], limit: float) -> dict[str, float]:
    """Returns the learning rate with the largest :func:`mean_reward` of each curve."""
    rewards = mean_reward(rows, limit)
    return {curve: max((key for key in rewards if key[0] == curve), key=rewards.__getitem__)[1] for curve, _ in rewards}


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Renders a Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines))


def cell(values: Sequence[float], spec: str = ".2f") -> str:
    """Renders the mean over seeds, with several of them ± half the width of the 95% interval; "-" without a value."""
    if not values:
        return "-"
    found = Estimate.over_seeds(values)
    return (
        f"{found.mean:{spec}}" if found.count == 1 else f"{found.mean:{spec}} ± {found.half:{spec.removeprefix('+')}}"
    )


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
