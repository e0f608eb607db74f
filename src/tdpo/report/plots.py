"""Figures of reports: reward against divergence, and the sequential KL of chosen and rejected responses over training.

Drawn through matplotlib's objects, without pyplot: nothing global changes, and no display is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.lines
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision; markers say the same a second time.
STYLES = {
    "sft": ("#555555", "o"),
    "dpo": ("#D55E00", "s"),
    "tdpo1": ("#0072B2", "^"),
    "tdpo2": ("#009E73", "D"),
}
SPARE_STYLES = (("#CC79A7", "v"), ("#E69F00", "P"), ("#56B4E9", "X"))
LABELS = {"sft": "SFT", "dpo": "DPO", "tdpo1": "TDPO1", "tdpo2": "TDPO2"}
INK, GRID = "#222222", "#E3E3E3"
LABEL_GAP = 0.055
"""Smallest distance of two labels, in heights of the panel."""
LABEL_WIDTH = 0.15
"""Width of a label, in widths of the panel."""


@dataclass(frozen=True)
class FrontierPoint:
    """One policy on the plane of divergence and reward.

    Attributes:
        kl: KL(policy || reference) per response, in nats.
        kl_error: Its standard error.
        reward: Mean reward of samples.
        reward_error: Its standard error.
        note: Small print beside the point ("beta 0.3"), or nothing.
    """

    kl: float
    kl_error: float
    reward: float
    reward_error: float
    note: str = ""


@dataclass(frozen=True)
class KLCurve:
    """Sequential KL(reference || policy) over training, in nats per response.

    Attributes:
        steps: Optimizer steps.
        chosen: Mean over held-out chosen responses at each step.
        rejected: The same over rejected responses.
    """

    steps: Sequence[float]
    chosen: Sequence[float]
    rejected: Sequence[float]


def overview_figure(
    frontier: Mapping[str, Sequence[FrontierPoint]],
    growth: Mapping[str, KLCurve],
    reward_label: str = "mean reward of samples",
    caption: str = "",
) -> Figure:
    """Two panels side by side, 1600 x 720 pixels when saved by :func:`save_figure`.

    Args:
        frontier: Points by objective, in the order they are joined; see :func:`draw_frontier`.
        growth: Curves by objective; see :func:`draw_kl_growth`.
        reward_label: Name and unit of the reward.
        caption: One or two lines below, on what was run.
    """
    with matplotlib.rc_context(_rc()):
        figure = Figure(figsize=(16, 7.2), facecolor="white")
        left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.24})
        figure.subplots_adjust(left=0.065, right=0.895, top=0.91, bottom=0.21 if caption else 0.11)
        draw_frontier(left, frontier, reward_label)
        draw_kl_growth(right, growth)
        if caption:
            figure.text(0.065, 0.03, caption, fontsize=11.5, color="#555555", va="bottom", linespacing=1.4)
    return figure


def draw_frontier(axes: Axes, curves: Mapping[str, Sequence[FrontierPoint]], reward_label: str) -> None:
    """Reward against KL(policy || reference), one line a policy, standard errors as crosses; upper left is better."""
    ends = []
    for index, (name, points) in enumerate(curves.items()):
        colour, marker = style_of(name, index)
        kl, reward = [p.kl for p in points], [p.reward for p in points]
        axes.errorbar(
            kl, reward, xerr=[p.kl_error for p in points], yerr=[p.reward_error for p in points], color=colour,
            marker=marker, markersize=8, markeredgecolor="white", linewidth=1.8, elinewidth=1.0, alpha=0.95, zorder=3,
        )  # fmt: skip
        for point in points:
            axes.annotate(
                point.note, (point.kl, point.reward), xytext=(7, -12), textcoords="offset points", fontsize=10
            )
        ends.append((LABELS.get(name, name), kl[-1], reward[-1], colour))
    axes.set_title("Reward against divergence from the reference", loc="left")
    axes.set_xlabel("KL(policy || reference) along samples, nats per response")
    axes.set_ylabel(reward_label)
    _plain_axes(axes)
    axes.margins(x=0.04, y=0.12)
    for (label, x, y, colour), shift in zip(ends, _label_shifts(axes, [(x, y) for _, x, y, _ in ends]), strict=True):
        axes.annotate(
            label, (x, y), xytext=(12, shift), textcoords="offset points", color=colour, fontweight="bold", va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )  # fmt: skip


def draw_kl_growth(axes: Axes, curves: Mapping[str, KLCurve]) -> None:
    """Sequential KL over training steps: solid for rejected responses, dashed for chosen ones."""
    ends = []
    for index, (name, curve) in enumerate(curves.items()):
        colour, marker = style_of(name, index)
        shared: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "markersize": 7,
            "markeredgecolor": "white",
            "clip_on": False,
        }
        axes.plot(curve.steps, curve.rejected, linewidth=2.2, **shared, zorder=3)
        axes.plot(curve.steps, curve.chosen, linewidth=1.6, linestyle=(0, (4, 2)), **shared, zorder=3)
        label = LABELS.get(name, name)
        ends += [(f"{label} rejected", curve.rejected[-1], colour), (f"{label} chosen", curve.chosen[-1], colour)]
    axes.set_title("Sequential KL on held-out pairs over training", loc="left")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("KL(reference || policy), nats per response")
    _plain_axes(axes)
    axes.set_ylim(bottom=0)
    low, high = axes.get_ylim()
    heights = spread([(value - low) / (high - low) for _, value, _ in ends], LABEL_GAP)
    for (label, _, colour), height in zip(ends, heights, strict=True):
        axes.text(1.015, height, label, transform=axes.transAxes, color=colour, va="center", fontsize=12)
    handles = [
        matplotlib.lines.Line2D([], [], color=INK, linewidth=2.2, label="rejected responses"),
        matplotlib.lines.Line2D([], [], color=INK, linewidth=1.6, linestyle=(0, (4, 2)), label="chosen responses"),
    ]
    axes.legend(handles=handles, loc="upper left", frameon=False)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes the figure as PNG, 100 pixels an inch of it."""
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=100, facecolor="white")
    return Path(path)


def style_of(name: str, index: int = 0) -> tuple[str, str]:
    """Colour and marker of an objective; others take spare ones by their place."""
    return STYLES.get(name) or SPARE_STYLES[index % len(SPARE_STYLES)]


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Moves values apart to at least ``gap``, keeping their order and the mean of those that had to move.

    Example:
        >>> [round(v, 2) for v in spread([0.5, 0.52, 0.9], 0.1)]
        [0.46, 0.56, 0.9]
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    # Labels that would touch form a group, which stands evenly spaced around the mean of its members.
    groups: list[list[int]] = []
    for i in order:
        groups.append([i])
        while len(groups) > 1 and _edge(groups[-1], values, gap, -1) < _edge(groups[-2], values, gap, 1) + gap:
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = [0.0] * len(values)
    for group in groups:
        for rank, i in enumerate(group):
            placed[i] = _edge(group, values, gap, -1) + rank * gap
    return placed


def _edge(group: Sequence[int], values: Sequence[float], gap: float, side: int) -> float:
    """Lowest (-1) or highest (+1) place of a group of labels around the mean of where they want to be."""
    return sum(values[i] for i in group) / len(group) + side * gap * (len(group) - 1) / 2


def _label_shifts(axes: Axes, places: Sequence[tuple[float, float]]) -> list[float]:
    """Vertical shifts, in points, that keep labels at these places apart from others near them."""
    height = axes.bbox.height / axes.figure.dpi * 72
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    shifts = [0.0] * len(places)
    columns: list[list[int]] = []  # labels that could meet, because they start less than a label's width apart
    for i in sorted(range(len(places)), key=lambda i: places[i][0]):
        near = columns and places[i][0] - places[columns[-1][-1]][0] < LABEL_WIDTH * (right - left)
        columns[-1].append(i) if near else columns.append([i])
    for column in columns:
        wished = [(places[i][1] - low) / (high - low) * height for i in column]
        for i, place, wish in zip(column, spread(wished, LABEL_GAP * height), wished, strict=True):
            shifts[i] = place - wish
    return shifts


def _plain_axes(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _rc() -> Any:
    return {
        "font.family": "DejaVu Sans",
        "font.size": 13,
        "axes.titlesize": 15,
        "axes.titleweight": "bold",
        "axes.titlepad": 14,
        "axes.labelsize": 13,
        "axes.edgecolor": "#888888",
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.fontsize": 12,
    }
