"""Curves of runs: loss, accuracies, sequential KL, log-ratios, learning rate, throughput, memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import matplotlib
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tdpo.report.collect import Run
from tdpo.report.plots import DASHES, INK, SETTINGS, STYLES

LINES: tuple[Any, ...] = ("solid", DASHES, (0, (1, 2)))
"""Line styles of the metrics of a chart."""
NAMED, LONGEST_NAME = 4, 24
"""Runs, and characters of their names, up to which a chart names them; the page lists all."""
MARKED = 30
"""Points of a curve up to which each is marked."""


@dataclass(frozen=True)
class Chart:
    """A figure of the report.

    Attributes:
        name: Its name in files.
        title: Its title.
        lines: Metrics, each with what the legend calls it; the first line is solid, the next ones dashed and dotted.
        healthy: What a healthy run looks like here.
        sick: What a run in trouble looks like, and what to do.
        unit: Label of the vertical axis.
        scale: Factor on the values.
        held_out: Whether the values on held-out data are drawn too, as points.
    """

    name: str
    title: str
    lines: dict[str, str]
    healthy: str
    sick: str
    unit: str = ""
    scale: float = 1.0
    held_out: bool = False


def charts() -> list[Chart]:
    """Returns the charts of the report, in order."""
    text = (files("tdpo.report") / "charts.yaml").read_text("utf-8")
    return [Chart(**entry) for entry in yaml.safe_load(text)]


def throughput(run: Run) -> Run:
    """Returns the run with ``throughput`` in its logs: pairs, or rows of SFT, per second between two logs."""
    size = run.start.get("per_step", 0)
    logs: list[dict[str, Any]] = []
    before: dict[str, Any] | None = None
    for log in run.logs:
        log = dict(log)
        if "resumed" in log:
            before = None
        if "loss" in log and "time" in log:
            seconds = log["time"] - before["time"] if before else 0.0
            if before and seconds > 0 and log["step"] > before["step"]:
                log["throughput"] = size * (log["step"] - before["step"]) / seconds
            before = log
        elif "time" in log:
            before = None  # an evaluation took time in between
        logs.append(log)
    return Run(run.name, run.start, logs, run.status, run.samples)


def colour_of(index: int) -> str:
    """Returns the colour of a run, by its index."""
    colours = [colour for colour, _ in STYLES.values()]
    return colours[index % len(colours)]


def draw(chart: Chart, runs: Sequence[Run]) -> Figure | None:
    """Draws a chart with a colour for each run; None if no run has its metrics."""
    if chart.name == "logratio":
        runs = [run for run in runs if run.reward_scale]
    names = [name for name in chart.lines if any(run.series(name)[0] for run in runs)]
    several = list(dict.fromkeys(prefix for run in runs for prefix in run.held_out)) if chart.held_out else []
    # Of several held-out datasets the first is drawn; the table has all of them.
    held_out = [several[0] + name for name in names] if several else []
    if not names:
        return None
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        for run, (colour, marker) in zip(runs, itertools.cycle(STYLES.values())):
            scale = chart.scale / run.reward_scale if chart.name == "logratio" and run.reward_scale else chart.scale
            for name, dashes in zip(names, LINES, strict=False):
                _line(axes, run, name, scale, {"color": colour, "linestyle": dashes, "linewidth": 2})
            for name, hollow in zip(held_out, (False, True, True), strict=False):
                face = "white" if hollow else colour
                style = {"color": colour, "marker": marker, "linestyle": "", "markersize": 9, "markerfacecolor": face}
                _line(axes, run, name, scale, style)
        axes.set_title(chart.title, loc="left")
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel(chart.unit)
        axes.set_xlim(left=0)
        _legend(axes, chart, names, runs, any(run.series(name)[0] for run in runs for name in held_out))
        return figure


def _line(axes: Axes, run: Run, name: str, scale: float, style: dict[str, Any]) -> None:
    steps, values = run.series(name)
    if steps:
        dotted: dict[str, Any] = (
            {"marker": ".", "markersize": 8} if len(steps) <= MARKED and "marker" not in style else {}
        )
        axes.plot(steps, [scale * value for value in values], **style, **dotted)


def _legend(axes: Axes, chart: Chart, names: Sequence[str], runs: Sequence[Run], held_out: bool) -> None:
    entries: list[tuple[Line2D, str]] = []
    if len(names) > 1 or held_out:
        dashes = zip(names, LINES, strict=False)
        entries += [(Line2D([], [], color=INK, linestyle=dash), chart.lines[name]) for name, dash in dashes]
    if held_out:
        marks = zip(names, (INK, "white", "white"), strict=False)
        entries += [
            (
                Line2D([], [], color=INK, marker="s", linestyle="", markerfacecolor=face),
                f"{chart.lines[name]}, held out",
            )
            for name, face in marks
        ]
    if 1 < len(runs) <= NAMED and all(len(run.name) <= LONGEST_NAME for run in runs):
        colours = zip(runs, itertools.cycle(STYLES.values()))
        drawn = [(run, colour) for run, (colour, _) in colours if any(run.series(name)[0] for name in names)]
        entries += [(Line2D([], [], color=colour, linewidth=4), run.name) for run, colour in drawn]
    if entries:
        axes.legend(*zip(*entries, strict=True), fontsize=10)
