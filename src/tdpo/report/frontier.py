"""Tables and the figure of a sweep: reward against KL(policy || reference), and sequential KL over training.

Drawn through matplotlib's objects, without pyplot: nothing global changes, and no display is needed. Equal rows give
equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tdpo.evaluate.frontier import SETTING, SFT, Curve, Frontier, Mean, Row, name_of, setting_of

# Okabe and Ito's colours, distinguishable with any colour vision; markers repeat the information.
STYLES = {
    "dpo": ("#D55E00", "s"), "tdpo1": ("#0072B2", "^"), "tdpo2": ("#009E73", "D"), "ppo": ("#CC79A7", "v"),
    "rloo": ("#E69F00", "P"),
}  # fmt: skip
SPARE_STYLES = (("#56B4E9", "X"), ("#8C564B", "p"), ("#7F7F7F", "h"), ("#17BECF", "*"), ("#BCBD22", "<"))
LABELS = {"sft": "SFT", "dpo": "DPO", "tdpo1": "TDPO1", "tdpo2": "TDPO2", "ppo": "PPO", "rloo": "RLOO", "tbpo": "TBPO"}
INK, GRID, SFT_COLOUR = "#222222", "#E3E3E3", "#555555"
DASHES = (0, (4, 2))
"""Line style of chosen responses; that of rejected ones is solid."""
SETTINGS: Any = {
    "font.family": "DejaVu Sans", "font.size": 13,
    "axes.titlesize": 15, "axes.titleweight": "bold", "axes.titlepad": 14, "axes.labelsize": 13,
    "axes.edgecolor": "#888888", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.8, "axes.axisbelow": True,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "legend.fontsize": 12, "legend.frameon": False, "svg.hashsalt": "tdpo",
}  # fmt: skip
FIGURES = {
    "reward": ("reward", ".3f"), "kl": ("KL(policy\n|| ref)", ".2f"), "entropy": ("entropy", ".3f"),
    "distinct_2": ("distinct\n2-grams", ".3f"), "length": ("tokens", ".1f"), "accuracy": ("accuracy", ".3f"),
    "kl_chosen": ("seq. KL\nchosen", ".2f"), "kl_rejected": ("seq. KL\nrejected", ".2f"),
}  # fmt: skip
"""Columns of the table of last measurements: heading and format, by the names of the rows."""


def report_frontier(
    rows: Sequence[Row],
    folder: Path,
    console: Console,
    baseline: str | None = None,
    equal_kl: Sequence[float] | None = None,
) -> None:
    """Prints the tables of a sweep and writes ``frontier.png`` and ``frontier.svg``.

    Args:
        rows: Rows of the sweep.
        folder: Where the figure goes.
        console: Where the tables go.
        baseline: The curve the others are compared with; default: the first.
        equal_kl: KLs to compare at, in nats per response; default: :meth:`Frontier.levels`.

    Raises:
        UserError: for an unknown baseline.
    """
    frontier = Frontier.of(rows)
    base = frontier.curve(baseline)
    console.print("\nLast measurement, mean over seeds; ± is half of a 95% interval over seeds", style="bold")
    console.print(last_table(rows))
    console.print("\nReward at equal KL(policy || reference)", style="bold")
    console.print(equal_kl_table(frontier, base, equal_kl or frontier.levels()))
    console.print()
    if frontier.diverged:
        console.print(f"left out, not finite: {'; '.join(frontier.diverged)}", soft_wrap=True)
    figure = frontier_figure(rows)
    for suffix in ("png", "svg"):
        save_figure(figure, folder / f"frontier.{suffix}")


def last_table(rows: Sequence[Row]) -> Table:
    """Renders the last measurement of every setting, averaged over seeds, with 95% intervals over them."""
    names = [name for name in FIGURES if any(row.get(name, "") != "" for row in rows)]
    table = _table()
    for name in names:
        table.add_column(FIGURES[name][0], justify="right", no_wrap=True)
    groups: dict[tuple[Any, ...], dict[Any, Row]] = {}
    for row in rows:
        groups.setdefault((name_of(row), *setting_of(row)), {})[row["seed"]] = row
    several = {key for key in SETTING if len({row.get(key, "") for row in rows} - {""}) > 1}
    for (label, *setting), found in groups.items():
        varied = [
            value if key == "options" else f"{key} {value:g}"
            for key, value in zip(SETTING, setting, strict=True)
            if key in several and value != ""
        ]
        cells = [[row[name] for row in found.values() if row.get(name, "") != ""] for name in names]
        shown = [_cell(name, values) for name, values in zip(names, cells, strict=True)]
        table.add_row(" ".join([LABELS.get(label, label), *varied]), *shown)
    return table


def _cell(name: str, values: Sequence[float]) -> str:
    """Formats a mean over seeds; only the two figures of the frontier have room for an interval."""
    found = Mean.of(values) if values else None
    if found is None:
        return ""
    return f"{found if name in ('reward', 'kl') else found.mean:{FIGURES[name][1]}}"


def _table() -> Table:
    table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("", no_wrap=True)
    return table


def equal_kl_table(frontier: Frontier, base: Curve, levels: Sequence[float]) -> Table:
    """Renders the reward of each curve at equal KL, and its difference to the baseline, with intervals over seeds."""
    table = _table()
    for level in levels:
        table.add_column(f"{level:.3g}", justify="right", no_wrap=True)
    for curve in frontier.curves:
        rewards = [list(curve.at(level).values()) for level in levels]
        label = LABELS.get(curve.name, curve.name)
        table.add_row(label, *(f"{Mean.of(found):.3f}" if found else "-" for found in rewards))
        if curve is not base:
            gains = [curve.differences(base, level) for level in levels]
            against = f"  minus {LABELS.get(base.name, base.name)}"
            table.add_row(
                against, *(f"{Mean.of(found):+.3f}" if found else "-" for found in gains), style="bright_black"
            )
    return table


def frontier_figure(rows: Sequence[Row]) -> Figure:
    """Draws reward against KL; beside it the sequential KL over training, if each curve has one setting.

    Points are means over seeds with 95% intervals; the line of a curve is its Pareto front.
    """
    frontier = Frontier.of(rows)
    growth = _growth(rows)
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(16, 7.2) if growth else (10, 7.2), facecolor="white")
        axes = figure.subplots(1, 2 if growth else 1, squeeze=False)[0]
        draw_frontier(axes[0], frontier)
        if growth:
            draw_growth(axes[1], growth)
        figure.tight_layout(w_pad=3)
    return figure


def draw_frontier(axes: Axes, frontier: Frontier) -> None:
    """Draws the points and the Pareto front of every curve."""
    for index, curve in enumerate(frontier.curves):
        colour, marker = style_of(curve.name, index)
        line = [*([frontier.sft] if frontier.sft else []), *((p.kl.mean, p.reward.mean) for p in curve.front)]
        axes.plot(*zip(*line, strict=True), color=colour, linewidth=1.8, zorder=3)
        for points, alpha in ((curve.front, 0.95), ([p for p in curve.points if p not in curve.front], 0.3)):
            axes.errorbar(
                [p.kl.mean for p in points], [p.reward.mean for p in points], xerr=[p.kl.half or 0 for p in points],
                yerr=[p.reward.half or 0 for p in points], color=colour, marker=marker, markersize=8, linestyle="none",
                markeredgecolor="white", elinewidth=1.0, alpha=alpha, zorder=4,
                label=LABELS.get(curve.name, curve.name) if alpha > 0.5 else None,
            )  # fmt: skip
    if frontier.sft:
        axes.plot(*frontier.sft, color=SFT_COLOUR, marker="o", markersize=9, linestyle="none", label="SFT", zorder=5)
    axes.set_title("Reward against divergence from the reference", loc="left")
    axes.set_xlabel("KL(policy || reference) along samples, nats per response")
    axes.set_ylabel("mean reward of samples")
    axes.margins(x=0.06, y=0.12)
    # Lines start at the lower left, where every policy equals the reference: the lower right is free.
    axes.legend(loc="lower right")


def draw_growth(axes: Axes, growth: Mapping[str, Mapping[int, tuple[float, float]]]) -> None:
    """Draws sequential KL over training steps: solid for rejected responses, dashed for chosen ones."""
    for index, (name, curve) in enumerate(growth.items()):
        colour, marker = style_of(name, index)
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 7, "markeredgecolor": "white"}
        for part, (side, width, line) in enumerate((("chosen", 1.6, DASHES), ("rejected", 2.2, "-"))):
            style |= {"label": f"{LABELS.get(name, name)} {side}", "linewidth": width, "linestyle": line}
            axes.plot(
                [0, *curve], [0.0, *(values[part] for values in curve.values())], clip_on=False, zorder=3, **style
            )
    axes.set_title("Sequential KL on held-out pairs over training", loc="left")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("KL(reference || policy), nats per response")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left", handlelength=3.5)


def _growth(rows: Sequence[Row]) -> dict[str, dict[int, tuple[float, float]]]:
    """Returns sequential KL of chosen and rejected responses by curve and step, if every curve has one setting."""
    trained = [row for row in rows if row["objective"] != SFT and row.get("kl_chosen", "") != ""]
    settings = {(name_of(row), *setting_of(row)) for row in trained}
    names = dict.fromkeys(name_of(row) for row in trained)
    if len(settings) > len(names) or len(names) > 4:
        return {}
    found: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in names}
    for name, step in sorted({(name_of(row), row["step"]) for row in trained}, key=lambda pair: pair[1]):
        own = [row for row in trained if (name_of(row), row["step"]) == (name, step)]
        chosen, rejected = (Mean.of([row[side] for row in own]).mean for side in ("kl_chosen", "kl_rejected"))
        found[name][step] = chosen, rejected
    return found


def save_figure(figure: Figure, path: Path) -> None:
    """Writes the figure as PNG, 100 pixels an inch, or as SVG, by the file's suffix."""
    with matplotlib.rc_context(SETTINGS):
        if path.suffix == ".svg":
            FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})
        else:
            FigureCanvasAgg(figure)
            figure.savefig(path, format="png", dpi=100, facecolor="white", metadata={"Software": None})


def style_of(name: str, index: int = 0) -> tuple[str, str]:
    """Returns colour and marker of a curve; one without its own takes a spare pair by its index."""
    return STYLES.get(name) or SPARE_STYLES[index % len(SPARE_STYLES)]
