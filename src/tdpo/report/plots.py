"""Parts of figures: styles, points of reward against divergence, sequential KL over training; the demo's figure.

Drawn through matplotlib's objects, without pyplot: nothing global changes, and no display is needed. Equal values give
files of equal bytes.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tdpo.files import atomic_write

SFT_STYLE = ("#555555", "o")
# Colours of Okabe and Ito and of Paul Tol, distinguishable with any colour vision; markers repeat the information.
STYLES = {
    "dpo": ("#D55E00", "s"), "tdpo1": ("#0072B2", "^"), "tdpo2": ("#009E73", "D"), "ppo": ("#CC79A7", "v"),
    "rloo": ("#E69F00", "P"), "tbpo": ("#56B4E9", "X"), "fdpo": ("#882255", "<"), "ipo": ("#332288", ">"),
    "simpo": ("#999933", "h"), "robust": ("#000000", "p"),
}  # fmt: skip
"""Colour and marker of objectives; what is not among them takes a pair that the figure does not use."""
LABELS = {
    "sft": "SFT", "dpo": "DPO", "tdpo1": "TDPO1", "tdpo2": "TDPO2", "tbpo": "TBPO", "fdpo": "f-DPO", "ipo": "IPO",
    "robust": "robust DPO", "dpop": "DPOP", "cal_dpo": "Cal-DPO", "simpo": "SimPO", "ppo": "PPO", "rloo": "RLOO",
}  # fmt: skip
INK, GRID = "#222222", "#E3E3E3"
DASHES = (0, (4, 2))
"""Line style of chosen responses; that of rejected ones is solid."""
BAR = 0.5
"""Opacity of bars, so that they recede behind the points."""
SETTINGS: Any = {
    "font.family": "DejaVu Sans", "font.size": 13,
    "axes.titlesize": 15, "axes.titleweight": "bold", "axes.titlepad": 14, "axes.labelsize": 13,
    "axes.edgecolor": "#888888", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.8, "axes.axisbelow": True,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "legend.fontsize": 12, "legend.frameon": False,
    "text.parse_math": False, "svg.fonttype": "path", "svg.hashsalt": "tdpo",
}  # fmt: skip
METADATA: Mapping[str, Any] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
"""What matplotlib would write into a file by its format, and what differs between equal figures or versions."""


@dataclass(frozen=True)
class FrontierPoint:
    """One policy on the plane of divergence and reward.

    Attributes:
        kl: KL(policy || reference) per response, in nats.
        kl_error: Half the length of its bar: its standard error, or half of its interval; NaN for no bar.
        reward: Mean reward of samples.
        reward_error: Half the length of its bar.
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
    for name, style in styles_of(curves).items():
        draw_points(axes, curves[name], style, label=LABELS.get(name, name), linewidth=1.8)
        for point in curves[name]:
            axes.annotate(
                point.note, (point.kl, point.reward), xytext=(7, -12), textcoords="offset points", fontsize=10
            )
    label_frontier(axes, reward_label)
    # Lines start at the lower left, where every policy equals the reference: the lower right is free.
    axes.legend(loc="lower right")


def draw_points(axes: Axes, points: Sequence[FrontierPoint], style: tuple[str, str], **options: Any) -> None:
    """Draws points with crosses for their errors, in a colour and with a marker; options are those of ``errorbar``."""
    axes.errorbar(
        [p.kl for p in points], [p.reward for p in points], xerr=[p.kl_error for p in points],
        yerr=[p.reward_error for p in points], color=style[0], ecolor=to_rgba(style[0], BAR), marker=style[1],
        **{"markersize": 8, "markeredgecolor": "white", "elinewidth": 1.0, "zorder": 3, **options},
    )  # fmt: skip


def label_frontier(axes: Axes, reward_label: str) -> None:
    """Adds title and names of the axes of reward against KL(policy || reference)."""
    axes.set_title("Reward against divergence from the reference", loc="left")
    axes.set_xlabel("KL(policy || reference) along samples, nats per response")
    axes.set_ylabel(reward_label)
    axes.margins(x=0.06, y=0.12)


def draw_kl_growth(
    axes: Axes, curves: Mapping[str, KLCurve], styles: Mapping[str, tuple[str, str]] | None = None
) -> None:
    """Draws sequential KL over training steps: solid for rejected responses, dashed for chosen ones.

    Args:
        axes: Where to draw.
        curves: Curves by objective.
        styles: Colour and marker by objective, where another panel decides them; then the legend, like that panel's,
            does not name objectives.
    """
    for name, curve in curves.items():
        colour, marker = (styles or styles_of(curves))[name]
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 7, "markeredgecolor": "white"}
        for part, width, line in (("rejected", 2.2, "-"), ("chosen", 1.6, DASHES)):
            style |= {"label": f"{LABELS.get(name, name)} {part}", "linewidth": width, "linestyle": line}
            axes.plot(curve.steps, getattr(curve, part), clip_on=False, zorder=3, **style)
    axes.set_title("Sequential KL on held-out pairs over training", loc="left")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("KL(reference || policy), nats per response")
    axes.set_ylim(bottom=0)
    if styles is None:
        axes.legend(loc="upper left", handlelength=3.5)
    else:
        parts: Any = {"rejected": {"linewidth": 2.2}, "chosen": {"linewidth": 1.6, "linestyle": DASHES}}
        lines = [Line2D([], [], color=INK, **style) for style in parts.values()]
        axes.legend(lines, list(parts), loc="upper left", handlelength=3.5)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes the figure as PNG, 100 pixels an inch of it, or as SVG with text as paths, by the suffix; atomically.

    Raises:
        ValueError: for another suffix.
    """
    path, content = Path(path), io.BytesIO()
    kind = path.suffix.lower().removeprefix(".")
    if kind not in METADATA:
        raise ValueError(f"{path}: figures are written as .png or .svg")
    FigureCanvasAgg(figure)
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(content, format=kind, dpi=100, facecolor="white", metadata=METADATA[kind])
    atomic_write(path, content.getvalue())
    return path


def styles_of(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Returns colour and marker of each curve of a figure, all different for up to ten and the SFT model.

    Objectives of :data:`STYLES` have their own; the others take, in order, pairs that are left. Beyond ten they repeat.
    """
    names = list(dict.fromkeys(names))
    own = {"sft": SFT_STYLE, **STYLES}
    spare = itertools.cycle([pair for name, pair in reversed(STYLES.items()) if name not in names] or STYLES.values())
    return {name: own[name] if name in own else next(spare) for name in names}
