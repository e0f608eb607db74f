"""Figures of reports: reward against divergence, and the sequential KL of chosen and rejected responses over training.

Drawn through matplotlib's objects, without pyplot: nothing global changes, and no display is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours, distinguishable with any colour vision; markers repeat the information.
STYLES = {
    "sft": ("#555555", "o"),
    "dpo": ("#D55E00", "s"),
    "tdpo1": ("#0072B2", "^"),
    "tdpo2": ("#009E73", "D"),
}
SPARE_STYLES = (("#CC79A7", "v"), ("#E69F00", "P"), ("#56B4E9", "X"))
LABELS = {"sft": "SFT", "dpo": "DPO", "tdpo1": "TDPO1", "tdpo2": "TDPO2"}
INK, GRID = "#222222", "#E3E3E3"
DASHES = (0, (4, 2))
"""Line style of chosen responses; that of rejected ones is solid."""
SETTINGS: Any = {
    "font.family": "DejaVu Sans", "font.size": 13,
    "axes.titlesize": 15, "axes.titleweight": "bold", "axes.titlepad": 14, "axes.labelsize": 13,
    "axes.edgecolor": "#888888", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.8, "axes.axisbelow": True,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "legend.fontsize": 12, "legend.frameon": False,
}  # fmt: skip


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
    """Draws two panels side by side, 1600 x 720 pixels when saved by :func:`save_figure`.

    Args:
        frontier: Points by objective, in the order they are joined; see :func:`draw_frontier`.
        growth: Curves by objective; see :func:`draw_kl_growth`.
        reward_label: Name and unit of the reward.
        caption: One or two lines below, on what was run.
    """
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(16, 7.2), facecolor="white")
        left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.18})
        figure.subplots_adjust(left=0.065, right=0.98, top=0.91, bottom=0.21 if caption else 0.11)
        draw_frontier(left, frontier, reward_label)
        draw_kl_growth(right, growth)
        if caption:
            figure.text(0.065, 0.03, caption, fontsize=11.5, color="#555555", va="bottom", linespacing=1.4)
    return figure


def draw_frontier(axes: Axes, curves: Mapping[str, Sequence[FrontierPoint]], reward_label: str) -> None:
    """Draws reward against KL(policy || reference), one line a policy, standard errors as crosses."""
    for index, (name, points) in enumerate(curves.items()):
        colour, marker = style_of(name, index)
        axes.errorbar(
            [p.kl for p in points], [p.reward for p in points], xerr=[p.kl_error for p in points],
            yerr=[p.reward_error for p in points], label=LABELS.get(name, name), color=colour, marker=marker,
            markersize=8, markeredgecolor="white", linewidth=1.8, elinewidth=1.0, alpha=0.95, zorder=3,
        )  # fmt: skip
        for point in points:
            axes.annotate(
                point.note, (point.kl, point.reward), xytext=(7, -12), textcoords="offset points", fontsize=10
            )
    axes.set_title("Reward against divergence from the reference", loc="left")
    axes.set_xlabel("KL(policy || reference) along samples, nats per response")
    axes.set_ylabel(reward_label)
    axes.margins(x=0.06, y=0.12)
    # Lines start at the lower left, where every policy equals the reference: the lower right is free.
    axes.legend(loc="lower right")


def draw_kl_growth(axes: Axes, curves: Mapping[str, KLCurve]) -> None:
    """Draws sequential KL over training steps: solid for rejected responses, dashed for chosen ones."""
    for index, (name, curve) in enumerate(curves.items()):
        colour, marker = style_of(name, index)
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 7, "markeredgecolor": "white"}
        for part, width, line in (("rejected", 2.2, "-"), ("chosen", 1.6, DASHES)):
            style |= {"label": f"{LABELS.get(name, name)} {part}", "linewidth": width, "linestyle": line}
            axes.plot(curve.steps, getattr(curve, part), clip_on=False, zorder=3, **style)
    axes.set_title("Sequential KL on held-out pairs over training", loc="left")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("KL(reference || policy), nats per response")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left", handlelength=3.5)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes the figure as PNG, 100 pixels an inch of it."""
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=100, facecolor="white")
    return Path(path)


def style_of(name: str, index: int = 0) -> tuple[str, str]:
    """Returns colour and marker of an objective; one without its own takes a spare pair by its index."""
    return STYLES.get(name) or SPARE_STYLES[index % len(SPARE_STYLES)]
