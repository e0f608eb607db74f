"""Parts of figures: styles of curves, sequential KL over training, and files.

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


def draw_kl_growth(axes: Axes, curves: Mapping[str, KLCurve], styles: Mapping[str, tuple[str, str]]) -> None:
    """Draws sequential KL over training steps: solid for rejected responses, dashed for chosen ones.

    Args:
        axes: Where to draw; its legend explains the lines, not the colours.
        curves: Curves by objective.
        styles: Their colours and markers.
    """
    parts: Any = {"rejected": {"linewidth": 2.2}, "chosen": {"linewidth": 1.6, "linestyle": DASHES}}
    for name, curve in curves.items():
        colour, marker = styles[name]
        points: Any = {"color": colour, "marker": marker, "markersize": 7, "markeredgecolor": "white"}
        for part, line in parts.items():
            axes.plot(curve.steps, getattr(curve, part), clip_on=False, zorder=3, **points, **line)
    axes.set_title("Sequential KL on held-out pairs over training", loc="left")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("KL(reference || policy), nats per response")
    axes.set_ylim(bottom=0)
    lines = [Line2D([], [], color=INK, **line) for line in parts.values()]
    axes.legend(lines, list(parts), loc="upper left", handlelength=3.5)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes the figure as PNG or SVG, by the suffix, atomically; see :func:`figure_bytes`.

    Raises:
        ValueError: for another suffix.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in METADATA:
        raise ValueError(f"{path}: figures are written as .png or .svg")
    atomic_write(path, figure_bytes(figure, kind))
    return path


def figure_bytes(figure: Figure, kind: str) -> bytes:
    """Returns the figure as ``"png"``, 100 pixels an inch of it, or as ``"svg"`` with text as paths."""
    content = io.BytesIO()
    FigureCanvasAgg(figure)
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(content, format=kind, dpi=100, facecolor="white", metadata=METADATA[kind])
    return content.getvalue()


def styles_of(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Returns colour and marker of each curve of a figure, all different for up to ten and the SFT model.

    Objectives of :data:`STYLES` have their own; the others take, in order, pairs that are left. Beyond ten they repeat.
    """
    names = list(dict.fromkeys(names))
    own = {"sft": SFT_STYLE, **STYLES}
    spare = itertools.cycle([pair for name, pair in reversed(STYLES.items()) if name not in names] or STYLES.values())
    return {name: own[name] if name in own else next(spare) for name in names}
