"""The report on a sweep: tables of rewards, and the figure of reward against KL(policy || reference)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tdpo.evaluate.estimates import Estimate
from tdpo.evaluate.frontier import SFT, Curve, Frontier, Point, Row, average, by_setting, curve_name, setting_names
from tdpo.report.plots import (
    INK,
    LABELS,
    SETTINGS,
    SFT_STYLE,
    KLCurve,
    draw_kl_growth,
    save_figure,
    styles_of,
)

LEVELS_SHOWN = 4
"""KLs side by side in one table, which keeps it below 100 columns."""
LOG_DECADES = 2
CAPTION_CHARACTERS = 12
"""Characters of the caption by inch of the figure's width."""
LIGHT = 0.25
"""Opacity of dominated points."""
BAR = 0.5
"""Opacity of bars, so that they recede behind the points."""
OVER_SEEDS = "Student's t over seeds"
OVER_PROMPTS = "of one seed, 1.96 standard errors over prompts"
FIGURES = {
    "reward": ("reward", ".3f"), "kl": ("KL(policy\n|| ref)", ".2f"), "entropy": ("entropy", ".3f"),
    "distinct_2": ("distinct\n2-grams", ".3f"), "length": ("tokens", ".1f"), "accuracy": ("accuracy", ".3f"),
    "kl_chosen": ("seq. KL\nchosen", ".2f"), "kl_rejected": ("seq. KL\nrejected", ".2f"),
}  # fmt: skip
"""Columns of the table of last measurements: heading and format, by the columns of the rows."""


def report_frontier(
    rows: Sequence[Row],
    folder: Path,
    console: Console,
    baseline: str | None = None,
    equal_kl: Sequence[float] | None = None,
) -> tuple[list[Table], Figure | None]:
    """Prints the tables of a sweep and writes ``frontier.png`` and ``frontier.svg``, if any trained model has a point.

    Returns the tables and the figure.

    Args:
        rows: Rows of the sweep.
        folder: Where the figure goes.
        console: Where the tables go.
        baseline: The curve the others are compared with; default: the first one of the rows.
        equal_kl: KLs to compare at, in nats per response; default: :meth:`Frontier.levels`.

    Raises:
        UserError: as :meth:`Frontier.of`.
    """
    frontier = Frontier.of(rows, baseline)
    levels = frontier.levels() if equal_kl is None else equal_kl
    tables = [last_table(rows), *equal_kl_tables(frontier, levels)]
    for table in tables:
        console.print()
        console.print(table)
    console.print()
    for run, count in frontier.left_out.items():
        what = "measurement" if count == 1 else "measurements"
        console.print(f"not finite, left out of the comparison: {run}, {count} {what}", soft_wrap=True, markup=False)
    if not frontier.curves:
        console.print("no measurement of a trained model has a finite KL and reward: there is no frontier to draw")
        return tables, None
    figure = frontier_figure(rows, baseline)
    for suffix in ("png", "svg"):
        save_figure(figure, folder / f"frontier.{suffix}")
    return tables, figure


def last_table(rows: Sequence[Row]) -> Table:
    """Renders the last measurement of every setting, averaged over seeds; columns are those of :data:`FIGURES`.

    Seeds that stopped at an earlier step are not averaged with the others; the row then counts those that are.
    """
    shown = [name for name in FIGURES if any(_has(row, name) for row in rows)]
    table = _table("Last measurement", first_width=22)
    for name in shown:
        table.add_column(FIGURES[name][0], justify="right", no_wrap=True)
    names = setting_names(rows)
    varied = [name for name in names if len({row[name] for row in rows if _has(row, name)}) > 1]
    intervals = set()
    for curve in dict.fromkeys(map(curve_name, rows)):
        for settings, group in by_setting([row for row in rows if curve_name(row) == curve], names):
            step = max(row["step"] for row in group)
            last = [row for row in group if row["step"] == step]
            label = [_label(curve), *(f"{name} {settings[name]}" for name in varied if name in settings)]
            if len(last) < (seeds := len({row["seed"] for row in group})):
                label.append(f"{len(last)} of {seeds} seeds")
            intervals.add(OVER_SEEDS if len(last) > 1 else OVER_PROMPTS)
            table.add_row(Text("\n".join(label)), *(_figure(last, name) for name in shown))
    over = "; ".join(sorted(intervals))
    table.caption = f"± half of the 95% interval ({over}); KL and entropy in nats"
    return table


def _table(title: str, first_width: int) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    table.add_column("", overflow="fold", max_width=first_width)
    return table


def _has(row: Row, name: str) -> bool:
    return row.get(name) not in (None, "")


def _figure(rows: Sequence[Row], name: str) -> str:
    """Renders mean and interval of a figure in two lines, of the rows that have it."""
    found = [row for row in rows if _has(row, name)]
    return _cell(average(found, name), FIGURES[name][1], "\n") if found else ""


def _cell(found: Estimate | None, spec: str = ".3f", between: str = " ", sign: str = "") -> str:
    """Renders a mean with half of its interval if there is one; "-" for None."""
    if found is None:
        return "-"
    return f"{found.mean:{sign}{spec}}" + ("" if math.isnan(found.half) else f"{between}±{found.half:{spec}}")


def _label(name: str) -> str:
    return LABELS.get(name, name)


def equal_kl_tables(frontier: Frontier, levels: Sequence[float]) -> list[Table]:
    """Renders the reward of each curve at equal KL, its difference to the first one, and its best reward.

    Returns:
        A table for every :data:`LEVELS_SHOWN` KLs, below 100 columns wide; one without levels, if there are none; no
        table without curves.
    """
    if not frontier.curves:
        return []
    parts = [levels[start : start + LEVELS_SHOWN] for start in range(0, len(levels), LEVELS_SHOWN)] or [[]]
    return [_equal_kl_table(frontier, part) for part in parts]


def _equal_kl_table(frontier: Frontier, levels: Sequence[float]) -> Table:
    baseline = frontier.curves[0]
    table = _table("Reward at equal KL(policy || reference), nats per response", first_width=16)
    for level in levels:
        table.add_column(f"KL {level:.3g}", justify="right", no_wrap=True)
    table.add_column("best reward\nand its KL", justify="right", no_wrap=True)
    for curve in frontier.curves:
        cells = [Text(_cell(curve.reward_at(level))) for level in levels]
        if curve is not baseline:
            for cell, level in zip(cells, levels, strict=True):
                cell.append(f"\n{_cell(curve.difference(baseline, level), sign='+')}", "bright_black")
        best = f"{_cell(curve.best.reward)}\n{_cell(curve.best.kl, '.2f')}"
        table.add_row(Text(_label(curve.name)), *cells, best)
    table.caption = _notes(frontier, levels)
    return table


def _notes(frontier: Frontier, levels: Sequence[float]) -> str:
    """Explains the table: intervals, the second lines, and what has no value."""
    curves = frontier.curves
    notes = ["interpolated along the Pareto front of each seed"] if levels else []
    if any(len(curve.seeds) > 1 for curve in curves):
        notes.append(f"± half of the 95% interval ({OVER_SEEDS})")
    if any(curve.best.interval == "prompts" for curve in curves):
        notes.append(f"best reward: {OVER_PROMPTS}")
    if len(curves) > 1 and levels:
        notes.append(f"second line: minus {_label(curves[0].name)}, paired by seed")
    if not levels:
        notes.append("there is no KL that every curve reaches on every seed")
    elif any(curve.reward_at(level) is None for curve in curves for level in levels):
        notes.append("-: a seed does not reach this KL")
    return "; ".join(notes)


def frontier_figure(
    rows: Sequence[Row],
    baseline: str | None = None,
    reward_label: str = "mean reward of samples",
    log_x: bool | None = None,
) -> Figure:
    """Draws reward against KL: points with intervals, and the Pareto front of each curve as a line.

    If every curve has one setting and its rows have ``kl_chosen`` and ``kl_rejected``, a second panel shows these over
    training, averaged over seeds.

    Args:
        rows: Rows of the sweep.
        baseline: The curve that comes first in the legend; default: the first one of the rows.
        reward_label: Name and unit of the reward.
        log_x: Whether the axis of KL is logarithmic; default: if the KLs span more than two decades. The SFT model,
            whose KL is 0, is then a horizontal line.

    Raises:
        UserError: as :meth:`Frontier.of`.
    """
    frontier = Frontier.of(rows, baseline)
    if log_x is None:
        positive = [point.kl.mean for curve in frontier.curves for point in curve.points if point.kl.mean > 0]
        log_x = bool(positive) and max(positive) > 10**LOG_DECADES * min(positive)
    growth, styles = _growth(frontier, rows), styles_of(curve.name for curve in frontier.curves)
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12, wspace=0.03)
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(18, 7.2) if growth else (12, 7.2), facecolor="white", layout=layout)
        left, *right = figure.subplots(1, 1 + bool(growth), squeeze=False)[0]
        for curve in frontier.curves:
            _draw_curve(left, curve, frontier.sft, styles[curve.name], log_x)
        if frontier.sft:
            _draw_sft(left, frontier.sft, log_x)
        _label_axes(left, reward_label, log_x)
        for axes in right:
            draw_kl_growth(axes, growth, styles)
        figure.legend(*_legend(frontier, styles, log_x), loc="outside right upper")
        caption = textwrap.fill(_caption(frontier), int(CAPTION_CHARACTERS * figure.get_figwidth()))
        figure.supxlabel(caption, x=0.01, ha="left", fontsize=11, color="#555555", linespacing=1.4)
    return figure


def _label_axes(axes: Axes, reward_label: str, log_x: bool) -> None:
    axes.set_title("Reward against divergence from the reference", loc="left")
    axes.set_xlabel(f"KL(policy || reference) along samples, nats per response{' (log scale)' if log_x else ''}")
    axes.set_ylabel(reward_label)
    axes.margins(x=0.06, y=0.12)
    if log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_curve(axes: Axes, curve: Curve, sft: Point | None, style: tuple[str, str], log_x: bool) -> None:
    """Draws the front of a curve as a line, from the SFT model on, its points with intervals and the others lightly."""
    front = [point for point in curve.front if not log_x or point.kl.mean > 0]
    others = [point for point in curve.points if point not in curve.front and (not log_x or point.kl.mean > 0)]
    line = ([] if sft is None or log_x else [sft]) + front
    axes.plot([p.kl.mean for p in line], [p.reward.mean for p in line], color=style[0], linewidth=2.0, zorder=3)
    _draw_points(axes, others, style, markersize=6, alpha=LIGHT, elinewidth=0.8)
    _draw_points(axes, front, style, zorder=4)


def _draw_points(axes: Axes, points: Sequence[Point], style: tuple[str, str], **options: Any) -> None:
    """Draws points with their intervals as crosses; options are those of ``errorbar``."""
    axes.errorbar(
        [p.kl.mean for p in points], [p.reward.mean for p in points], xerr=[p.kl.half for p in points],
        yerr=[p.reward.half for p in points], color=style[0], ecolor=to_rgba(style[0], BAR), marker=style[1],
        **{"markersize": 8, "markeredgecolor": "white", "elinewidth": 1.0, "zorder": 3, "linestyle": "none", **options},
    )  # fmt: skip


def _draw_sft(axes: Axes, sft: Point, log_x: bool) -> None:
    if log_x:
        axes.axhline(sft.reward.mean, color=SFT_STYLE[0], linestyle=":", linewidth=1.6, zorder=2)
    else:
        _draw_points(axes, [sft], SFT_STYLE, markersize=9, zorder=5)


def _legend(
    frontier: Frontier, styles: Mapping[str, tuple[str, str]], log_x: bool
) -> tuple[Sequence[Line2D], Sequence[str]]:
    """Returns lines and labels of the legend: the baseline, the other curves, the SFT model, dominated points."""
    edge: Any = {"markeredgecolor": "white", "linewidth": 2.0}
    entries = [
        (Line2D([], [], color=colour, marker=marker, markersize=9, **edge), _label(name))
        for name, (colour, marker) in styles.items()
    ]
    if frontier.sft:
        colour, marker = SFT_STYLE
        line: Any = {"linestyle": ":"} if log_x else {"linestyle": "none", "marker": marker, "markersize": 9}
        entries.append((Line2D([], [], color=colour, **line, **edge), _label(SFT)))
    if any(len(curve.front) < len(curve.points) for curve in frontier.curves):
        light = Line2D([], [], color=INK, marker="s", markersize=6, linestyle="none", alpha=LIGHT, **edge)
        entries.append((light, "dominated"))
    # matplotlib leaves out labels that begin with an underscore.
    return [line for line, _ in entries], [f" {label}" if label.startswith("_") else label for _, label in entries]


def _caption(frontier: Frontier) -> str:
    """Says what points, lines and bars are."""
    points = [point for curve in frontier.curves for point in curve.points] + ([frontier.sft] if frontier.sft else [])
    seeds = sorted({point.reward.count for point in points if point.interval == "seeds"})
    bars = [f"95% intervals over {' or '.join(map(str, seeds))} seeds (Student's t)"] if seeds else []
    if any(point.interval == "prompts" for point in points):
        bars.append(f"1.96 standard errors over prompts where there is one seed{' only' if seeds else ''}")
    text = f"A point is one setting at one step. Lines: Pareto fronts over all of them. Bars: {'; '.join(bars)}."
    if frontier.left_out:
        count = sum(frontier.left_out.values())
        what = "measurement" if count == 1 else "measurements"
        text += f" Not finite and left out: {count} {what}."
    return text


def _growth(frontier: Frontier, rows: Sequence[Row]) -> dict[str, KLCurve]:
    """Returns sequential KL by curve, averaged over seeds; nothing if a curve has several settings or none has it."""
    sides = ("kl_chosen", "kl_rejected")
    if any(len({tuple(point.settings.items()) for point in curve.points}) > 1 for curve in frontier.curves):
        return {}
    found: dict[str, KLCurve] = {}
    for curve in frontier.curves:
        own = [row for row in rows if curve_name(row) == curve.name and row["objective"] != SFT]
        own = [row for row in own if all(_has(row, side) and math.isfinite(row[side]) for side in sides)]
        steps = sorted({row["step"] for row in own})
        means = [
            [float(np.mean([row[side] for row in own if row["step"] == step])) for step in steps] for side in sides
        ]
        if steps:
            start = [] if steps[0] == 0 else [0]  # where every run starts, policy and reference are equal
            found[curve.name] = KLCurve([*start, *steps], *([*map(float, start), *values] for values in means))
    return found
