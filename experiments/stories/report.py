"""Computes the tables of the README and of ``docs/choosing.md`` from ``results/`` and writes them.

python experiments/stories/report.py
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
import claims

from tdpo.evaluate.estimates import Estimate
from tdpo.evaluate.frontier import SFT, Row, read_rows
from tdpo.report.plots import LABELS, SETTINGS, STYLES, save_figure

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DOCS = HERE.parents[1] / "docs"
OBJECTIVES = ("dpo", "tdpo1", "tdpo2")
FIGURES = {"reward": ".3f", "kl": ".1f", "accuracy": ".3f", "entropy": ".2f"}
LINES = ((0, ()), (0, (5, 1.5)), (0, (1.5, 1.5)))
"""Line styles of the values of beta or alpha, from the smallest on."""
Key = tuple[str, float, float | str, float]
"""Objective, beta, alpha (empty without) and learning rate."""


def cells() -> dict[Key, list[Row]]:
    """Returns the last measurements of every setting, one for each seed."""
    found: dict[Key, list[Row]] = {}
    rows = [row for row in read_rows(RESULTS / "sweep.csv") if row["objective"] != SFT]
    last = max(row["step"] for row in rows)
    for row in rows:
        if row["step"] == last:
            key = (row["objective"], row["beta"], row["alpha"], row["learning_rate"])
            found.setdefault(key, []).append(row)
    return found


def values(found: dict[Key, list[Row]], column: int) -> list[float]:
    """Returns the values of one part of the keys, sorted."""
    return sorted({key[column] for key in found if key[column] != ""})


def sensitivity() -> str:
    """Returns a table of what each parameter changes: means over the other settings, paired by seed."""
    found = cells()
    lines = []
    for column, name in ((3, "learning rate"), (1, "beta"), (2, "alpha")):
        for small, large in itertools.pairwise(values(found, column)):
            for objective in OBJECTIVES:
                pairs = [
                    (found[key], found[(*key[:column], large, *key[column + 1 :])])
                    for key in found
                    if key[0] == objective and key[column] == small
                ]
                if not pairs:
                    continue
                seeds = range(len(pairs[0][0]))
                ratios = [
                    math.exp(statistics.fmean(math.log(b[s]["kl"] / a[s]["kl"]) for a, b in pairs)) for s in seeds
                ]
                rewards = [statistics.fmean(b[s]["reward"] - a[s]["reward"] for a, b in pairs) for s in seeds]
                change = f"{name} {small:g} to {large:g}"
                lines.append([change, objective, claims.cell(ratios), claims.cell(rewards, "+.3f")])
    return claims.table(["change", "objective", "KL is multiplied by", "reward changes by"], lines)


def equal_kl() -> str:
    """Returns the comparison of rewards at equal KL, over the range that both objectives reach on every seed."""
    rows = read_rows(RESULTS / "sweep.csv")
    found = {name: [claims.reward_at_equal_kl(rows, name, "dpo")] for name in ("tdpo1", "tdpo2")}
    return claims.comparison_table(found)


def render() -> str:
    """Returns the tables: effects of each parameter, rewards at equal KL, and a row for every setting."""
    found = cells()
    lines = []
    for objective in OBJECTIVES:
        for key in sorted((key for key in found if key[0] == objective), key=lambda key: (key[2], key[1], key[3])):
            estimates = [claims.cell([row[name] for row in found[key]], spec) for name, spec in FIGURES.items()]
            lines.append([objective, f"{key[1]:g}", f"{key[2]}" or "-", f"{key[3]:g}", *estimates])
    (start,) = [row for row in read_rows(RESULTS / "sweep.csv") if row["objective"] == SFT]
    seeds = len(next(iter(found.values())))
    header = ["objective", "beta", "alpha", "learning rate", "reward", "KL(policy \\|\\| ref)", "accuracy", "entropy"]
    steps = next(iter(found.values()))[0]["step"]
    text = (
        f"After {steps} steps; mean ± half of the 95% interval over {seeds} seeds. The SFT model has reward "
        f"{start['reward']:.3f} and entropy {start['entropy']:.2f}. KL in nats per response, entropy in nats per token."
    )
    return "\n\n".join(
        [
            "What changing one parameter does, averaged over the other settings; KL(policy || reference):",
            sensitivity(),
            "Reward at equal KL(policy || reference), along the best settings of each objective:",
            equal_kl(),
            text,
            claims.table(header, lines),
        ]
    )


def draw() -> Figure:
    """Draws reward and KL against the learning rate, for the betas of each objective and the alphas of TDPO2."""
    found = cells()
    betas, alphas = values(found, 1), values(found, 2)
    middle = alphas[len(alphas) // 2]
    panels = [
        (objective, [(beta, middle if objective == "tdpo2" else "") for beta in betas]) for objective in OBJECTIVES
    ]
    panels.append(("tdpo2", [(betas[len(betas) // 2], alpha) for alpha in alphas]))
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(14, 7), layout="constrained")
        axes = figure.subplots(2, len(panels), sharex=True, sharey="row")
        for column, (objective, curves) in enumerate(panels):
            by_alpha = column == len(panels) - 1
            for row, name in enumerate(("reward", "kl")):
                draw_lines(axes[row, column], found, objective, curves, name, by_alpha)
            title = f"{LABELS[objective]}, beta {curves[0][0]:g}" if by_alpha else LABELS[objective]
            title += f", alpha {middle:g}" if objective == "tdpo2" and not by_alpha else ""
            axes[0, column].set_title(title, loc="left")
            axes[0, column].legend(loc="best")
            axes[1, column].set_xlabel("learning rate")
        axes[0, 0].set_ylabel("reward")
        axes[1, 0].set_ylabel("KL(policy || reference), nats")
        return figure


def draw_lines(
    axes: Axes, found: dict[Key, list[Row]], objective: str, curves: Iterable[tuple[float, float | str]], name: str,
    by_alpha: bool,
) -> None:  # fmt: skip
    """Draws one column of the results against the learning rate, a line with intervals for each setting."""
    colour, marker = STYLES[objective]
    for (beta, alpha), line in zip(curves, LINES, strict=True):
        keys = sorted(key for key in found if key[:3] == (objective, beta, alpha))
        means = [Estimate.over_seeds([row[name] for row in found[key]]) for key in keys]
        axes.errorbar(
            [key[3] for key in keys], [mean.mean for mean in means], yerr=[mean.half for mean in means],
            color=colour, marker=marker, linestyle=line, capsize=3, markeredgecolor="white",
            label=f"alpha {alpha:g}" if by_alpha else f"beta {beta:g}",
        )  # fmt: skip
    axes.set_xscale("log")
    rates = sorted({key[3] for key in found})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.set_xticks([], minor=True)
    if name == "kl":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


if __name__ == "__main__":
    for page in (HERE / "README.md", DOCS / "choosing.md"):
        claims.insert(page, render())
    for suffix in ("png", "svg"):
        save_figure(draw(), DOCS / "assets" / f"choosing.{suffix}")
