"""Computes the tables and the verdict of the README from ``results/`` and writes them into it.

python experiments/hh/report.py
"""

from __future__ import annotations

import csv
import itertools
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import claims

HERE = Path(__file__).parent
PAPER = {"fdpo": (54.71, 4.708), "dpo": (59.43, 3.196), "tdpo1": (60.08, 4.727), "tdpo2": (67.33, 4.915)}
"""Accuracy in % and entropy in Table 1 of the paper."""
ACCURACY, ENTROPY = (sorted(PAPER, key=lambda name: -PAPER[name][column]) for column in (0, 1))
"""Objectives by the paper's accuracy and entropy, the largest first."""


def read(name: str) -> list[dict[str, Any]]:
    """Reads a result file; a fold is a seed."""
    with (HERE / "results" / f"{name}.csv").open(newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    for row in rows:
        row |= {key: float(value) for key, value in row.items() if key != "objective" and value}
        row |= {"seed": int(row["fold"]), "step": 1, "label": row["objective"]}
    return rows


def decide(rows: list[dict[str, Any]]) -> dict[str, list[claims.Comparison]]:
    """Returns the comparisons of the claim: of neighbours in the paper's order of accuracies, and of entropies."""
    return {
        f"C, {column}": [claims.at_the_end(rows, *names, column) for names in itertools.pairwise(order)]
        for column, order in (("accuracy", ACCURACY), ("entropy", ENTROPY))
    }


def render() -> str:
    """Returns the computed part of the README."""
    rows, validation = read("test"), read("validation")
    decided = decide(rows)
    lines = []
    for name, (accuracy, entropy) in PAPER.items():
        own = [row for row in rows if row["objective"] == name]
        columns = (("accuracy", 100, ".1f"), ("logratio_accuracy", 100, ".1f"), ("entropy", 1, ".3f"))
        cells = [claims.cell([scale * row[column] for row in own], spec) for column, scale, spec in columns]
        cells += [claims.cell([row[column] for row in own]) for column in ("kl_chosen", "kl_rejected")]
        rates = ", ".join(f"{row['learning_rate']:g}" for row in own)
        lines.append([name, rates, f"{accuracy}", *cells[:2], f"{entropy}", *cells[2:]])
    sft = claims.cell([row["sft_entropy"] for row in rows if row["objective"] == "dpo"], ".3f")
    rated = {(row["objective"], row["learning_rate"]) for row in validation}
    loss = {key: [r["loss"] for r in validation if (r["objective"], r["learning_rate"]) == key] for key in rated}
    grid = [[name, f"{rate:g}", validation_cell(loss[name, rate])] for name, rate in sorted(rated)]
    header = (
        "objective", "learning rate by fold", "accuracy %, paper", "accuracy %", "of log-ratios", "entropy, paper",
        "entropy", "seq. KL chosen", "seq. KL rejected",
    )  # fmt: skip
    folds = len({row["seed"] for row in rows})
    return "\n\n".join(
        [
            "## Results",
            "\n".join(f"- Claim {name}: **{claims.verdict(found)}**." for name, found in decided.items()),
            f"Test pairs; mean ± half-width of the 95% confidence interval over {folds} folds.",
            f"The SFT model's entropy is {sft}.",
            claims.table(header, lines),
            claims.comparison_table(decided),
            "Validation loss:",
            claims.table(["objective", "learning rate", "loss"], grid),
        ]
    )


def validation_cell(losses: list[float]) -> str:
    """Returns the validation losses of a learning rate, or says in how many folds it diverged."""
    diverged = sum(not math.isfinite(loss) for loss in losses)
    return f"diverged in {diverged} of {len(losses)} folds" if diverged else claims.cell(losses, ".4f")


if __name__ == "__main__":
    claims.insert(HERE / "README.md", render())
