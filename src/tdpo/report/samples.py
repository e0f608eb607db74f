"""Table of the sample metrics of several models."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.table import Table

from tdpo.evaluate.measure import Measurement

ROWS = {
    "reward": "reward",
    "kl_policy_reference": "KL(policy || reference), nats per response",
    "kl_reference_policy": "KL(reference || policy), nats per response",
    "entropy": "entropy, nats per token",
    "predictive_entropy": "entropy of nucleus samples, nats per token",
    "length": "length, tokens",
    "finished": "share with end token",
    "distinct_1": "distinct 1-grams",
    "distinct_2": "distinct 2-grams",
    "self_bleu": "self-BLEU",
    "compression_ratio": "compression ratio",
    "prompt_distinct_2": "within a prompt: distinct 2-grams",
    "prompt_self_bleu": "within a prompt: self-BLEU",
    "good_share": "share above the reward threshold",
    "good_distinct_2": "above the threshold: distinct 2-grams",
    "good_self_bleu": "above the threshold: self-BLEU",
}
"""Labels of the metrics in the table, in order, by the names of :meth:`Measurement.columns`."""


def sample_table(found: Mapping[str, Measurement], title: str) -> Table:
    """Renders a column for each model and a row for each metric; ± is half the width of the 95% interval."""
    table = Table(title=f"{title}; ± half the width of the 95% interval over prompts", title_justify="left")
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right", no_wrap=True)
    columns = [measurement.columns() for measurement in found.values()]
    for name, label in ROWS.items():
        if any(name in figures for figures in columns):
            table.add_row(label, *(_cell(figures, name) for figures in columns))
    return table


def _cell(figures: Mapping[str, float], name: str) -> str:
    if name not in figures:
        return "-"
    half = (figures.get(f"{name}_high", math.nan) - figures.get(f"{name}_low", math.nan)) / 2
    return f"{figures[name]:.4g}" + ("" if math.isnan(half) else f" ±{half:.2g}")
