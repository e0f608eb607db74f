"""Draws the CSVs of step.py and op.py as one figure for the docs.

python benchmarks/plot.py --results benchmarks/results --out docs/assets/benchmarks.png
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Row = dict[str, str]
INK, GRID, OURS, THEIRS = "#222222", "#E3E3E3", "#009E73", "#999999"
STEPS = {
    "tdpo2": "TDPO2, tdpo",
    "dpo": "DPO, tdpo",
    "tdpo2-padded": "TDPO2, tdpo, padded rows",
    "tdpo2-padded-naive": "TDPO2, the authors' arithmetic",
    "liger-dpo": "DPO, Liger's fused loss",
    "trl-dpo-compacted": "DPO, TRL, response tokens alone",
    "trl-dpo": "DPO, TRL as on a CPU",
    "trl-tdpo2": "TDPO2 of TRL's parts",
}
OPERATIONS = {
    "fused": ("fused, one pass", "#009E73", "o"),
    "fused-one-pair": ("fused, a pair over budget", "#56B4E9", "D"),
    "two-pass": ("two passes", "#0072B2", "^"),
    "liger-dpo": ("Liger's fused DPO (no KL)", "#E69F00", "s"),
}


def rows_of(path: Path) -> list[Row]:
    """Reads the rows of a CSV."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def draw_steps(axes: Axes, rows: list[Row], figure: str, title: str) -> None:
    """Bars of one figure's ratio to TDPO2, on a logarithmic scale, with the number beside each."""
    by_name = {row["implementation"]: row for row in rows}
    names = [name for name in STEPS if name in by_name]
    for place, name in enumerate(names):
        ratio = float(by_name[name][f"{figure}_over_tdpo2"])
        axes.barh(-place, ratio, height=0.62, color=OURS if "tdpo," in STEPS[name] + "," else THEIRS)
        axes.text(ratio * 1.06, -place, f"{ratio:.3g}", va="center", color=INK, fontsize=9)
    axes.set_xscale("log")
    axes.set_xlim(0.5, 60)
    axes.set_xticks([1, 3, 10, 30], ["1", "3", "10", "30"])
    axes.minorticks_off()
    axes.set_yticks([-place for place in range(len(names))], [STEPS[name] for name in names])
    axes.set_title(title, loc="left", fontsize=10, color=INK)


def draw_operations(axes: Axes, rows: list[Row], figure: str, title: str) -> None:
    """Lines of one figure's ratio to plain autograd over the vocabulary."""
    for name, (label, colour, marker) in OPERATIONS.items():
        own = [row for row in rows if row["implementation"] == name and row[f"{figure}_over_autograd"]]
        if own:
            words = [int(row["vocabulary"]) / 1000 for row in own]
            values = [float(row[f"{figure}_over_autograd"]) for row in own]
            axes.plot(words, values, color=colour, marker=marker, label=label)
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("vocabulary in thousands")
    axes.set_title(title, loc="left", fontsize=10, color=INK)


def main() -> None:
    """Draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default="benchmarks/results")
    parser.add_argument("--out", default="docs/assets/benchmarks.png")
    options = parser.parse_args()
    steps, operations = (rows_of(Path(options.results) / name) for name in ("step.csv", "op.csv"))
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    draw_steps(axes[0, 0], steps, "seconds", "One training step: time, TDPO2 = 1")
    draw_steps(axes[0, 1], steps, "mebibytes", "One training step: peak memory above the models, TDPO2 = 1")
    axes[0, 1].set_yticklabels([])
    tokens = operations[0]["tokens"]
    draw_operations(axes[1, 0], operations, "seconds", f"The operation on {tokens} tokens: time, plain autograd = 1")
    draw_operations(axes[1, 1], operations, "mebibytes", "The operation: peak memory, plain autograd = 1")
    axes[1, 0].legend(frameon=False, fontsize=9)
    for panel in axes.flat:
        panel.grid(color=GRID, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    row = steps[0]
    where = f"{row['hardware']}, {row['threads']} threads, float32, torch {row['torch']}; commit {row['commit']}"
    figure.text(0.005, -0.01, where, fontsize=8, color="#666666", va="top")
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=110, bbox_inches="tight", facecolor="white")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
