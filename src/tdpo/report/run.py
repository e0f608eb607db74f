"""The page on one or more runs: results, curves with what to look for, samples, data, settings, environment."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure
from rich.table import Table

from tdpo import __version__
from tdpo.report.collect import HELD_OUT, Run
from tdpo.report.plots import figure_bytes
from tdpo.report.run_figures import charts, colour_of, draw, throughput

RESULTS = {
    "loss": "loss", "rewards/accuracies": "accuracy of the objective's reward",
    "implicit_rewards/accuracies": "accuracy of the log-ratio", "rewards/margins": "reward margin",
    "kl/chosen": "sequential KL, chosen, nats", "kl/rejected": "sequential KL, rejected, nats",
    "logps/chosen": "log-probability, chosen, nats", "logps/rejected": "log-probability, rejected, nats",
    "throughput": "rows per second",
}  # fmt: skip
"""Metrics in the table of results, with their labels."""
FALLEN = -1.0
"""Mean log-ratio in nats below which a chosen response has noticeably become less likely."""


def run_page(
    runs: Sequence[Run], title: str = "", figure: Figure | None = None, tables: Sequence[Table] = (), note: str = ""
) -> str:
    """Returns the report on runs as one HTML page that loads nothing.

    Args:
        runs: The runs; their curves share the charts.
        title: Title of the page; default: the names of the runs.
        figure: Figure at the beginning.
        tables: Tables after it.
        note: A sentence after the tables.
    """
    runs = [throughput(run) for run in runs]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    part = {name: (files("tdpo.report") / f"run.{name}").read_text("utf-8") for name in ("html", "css")}
    drawn = [(chart, draw(chart, runs)) for chart in charts()]
    images = [(chart, _images(curves)) for chart, curves in drawn if curves is not None]
    return environment.from_string(part["html"]).render(
        title=title or "Run report: " + ", ".join(run.name for run in runs), note=note, colour=colour_of,
        tables_first=map(_cells, tables),
        figure=figure and _images(figure), style=Markup(part["css"]),
        runs=runs, warnings=[warning for run in runs for warning in _warnings(run)], results=list(_results(runs)),
        charts=images, samples=_samples, tables=_tables, version=__version__,
    )  # fmt: skip


def _results(runs: Sequence[Run]) -> Iterator[tuple[str, list[str]]]:
    """Yields rows of the table: the last value of each metric of each run, held out first."""
    prefixes = dict.fromkeys(prefix for run in runs for prefix in run.held_out)
    notes = {prefix: f", held out {prefix.removeprefix(HELD_OUT).removesuffix('_')}".rstrip() for prefix in prefixes}
    for prefix, note in (notes | {"": ", training"}).items():
        for name, label in RESULTS.items():
            values = [run.last(prefix + name) for run in runs]
            if any(value is not None for value in values):
                yield label + (note if name != "throughput" else ""), ["-" if v is None else f"{v:.4g}" for v in values]
    yield "optimizer steps", [f"{run.steps:,}" for run in runs]


def _warnings(run: Run) -> Iterator[str]:
    """Yields what a reader should know first."""
    if run.status != "finished":
        yield f"{run.name}: {run.status}."
    scale = run.reward_scale
    if not scale:
        return
    for prefix in (*run.held_out, ""):
        sides = [run.last(f"{prefix}implicit_rewards/{side}") for side in ("chosen", "rejected")]
        ratios = [value / scale for value in sides if value is not None]
        if len(ratios) == 2 and ratios[0] < FALLEN and ratios[1] < 0:
            where = "held-out" if prefix else "training"
            yield (
                f"{run.name}: likelihood displacement. Both {where} responses became less likely than under the "
                f"reference (log-ratio of chosen {ratios[0]:.3g} nats, of rejected {ratios[1]:.3g})."
            )
            return


def _samples(run: Run) -> list[tuple[str, list[tuple[int, str]]]]:
    """Returns the samples by prompt, in the order of steps."""
    found: dict[str, list[tuple[int, str]]] = {}
    for sample in run.samples:
        found.setdefault(sample["prompt"], []).append((sample["step"], sample["response"]))
    return list(found.items())


def _tables(run: Run) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Yields the tables of settings and environment that a run has."""
    names = {
        "model": "model",
        "weights": "weights",
        "layout": "layout",
        "reference": "reference",
        "per_step": "rows per step",
    }
    facts = [
        (label, str(run.start[name]).removeprefix(f"{label}: ")) for name, label in names.items() if run.start.get(name)
    ]
    settings = [*facts, *sorted(run.start.get("settings", {}).items())]
    if settings:
        yield "Settings", settings
    if run.start.get("environment"):
        yield "Environment", list(run.start["environment"].items())


def _cells(table: Table) -> dict[str, Any]:
    """Returns title, headings, rows and caption of a table."""
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    heads = [str(column.header).replace("\n", " ") for column in table.columns]
    return {
        "title": table.title,
        "heads": heads,
        "rows": list(zip(*columns, strict=True)),
        "caption": table.caption or "",
    }


def _images(figure: Figure) -> dict[str, str]:
    return {kind: _data_url(figure_bytes(figure, kind), kind) for kind in ("png", "svg")}


def _data_url(content: bytes, kind: str) -> str:
    return f"data:image/{'svg+xml' if kind == 'svg' else kind};base64,{base64.b64encode(content).decode()}"
