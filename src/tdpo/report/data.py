"""A dataset on a terminal: tables, a histogram, and pairs with every token's part marked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tdpo.data.check import FINDINGS, PERCENTILES, DataCheck, special_ids
from tdpo.types import TokenisedPair

ROWS_SHOWN = 8
SHOWN = 700
"""Characters of one part of an example at most; the middle of a longer one is left out."""
STYLES = {
    "prompt": "cyan",
    "chosen": "green",
    "rejected": "red",
    "cut": "bright_black strike",
    "special": "bold magenta",
}


def counts_table(found: DataCheck, title: str) -> Table:
    """Renders counts of rows by what became of them, and what was found in those that are left."""
    report = found.report
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    table.add_column("rows", justify="right")
    table.add_column("what", overflow="fold", max_width=64)
    table.add_column("where", style="bright_black", overflow="fold")

    def add(what: str, rows: Sequence[int], style: str = "") -> None:
        more = ", ..." if len(rows) > ROWS_SHOWN else ""
        table.add_row(
            Text(f"{len(rows):,}", style or "yellow"), Text(what, style), ", ".join(map(str, rows[:ROWS_SHOWN])) + more
        )

    table.add_row(f"{report.read:,}", f"read as {report.format}", "")
    if report.elsewhere:
        table.add_row(f"{report.elsewhere:,}", "pairs on the other side of the split", "")
    for reason, rows in report.dropped.items():
        bad = reason.startswith("bad row")
        add(reason if bad else f"dropped: {reason}", rows, "bold red" if bad else "yellow")
    for column, row in report.unused.items():
        table.add_row("", Text(f"column {column!r} holds text and is not used", "yellow"), f"from row {row}")
    for part, rows in report.truncated.items():
        add(f"with a {part} that is cut to fit", rows)
    for what, rows in report.noticed.items():
        add(what, rows, "yellow")
    for name, rows in found.rows.items():
        if rows:
            add(FINDINGS[name], rows)
    for name in found.pairs.weights:
        column = found.pairs.table[name]
        least, most = pc.min_max(pc.list_flatten(column)).as_py().values()
        with_weights = len(column) - column.null_count
        table.add_row(f"{with_weights:,}", f"with token weights: {name} from {least:g} to {most:g}", "")
    table.add_row(Text(f"{report.kept:,}", "bold green"), Text("pairs to train on", "bold"), "")
    return table


def lengths_table(found: DataCheck) -> Table:
    """Renders tokens by percentile."""
    table = Table(title="tokens, before anything is cut", title_justify="left", title_style="bold", show_edge=False)
    names = {0: "least", 50: "median", 100: "most"}
    table.add_column("")
    for percentile in PERCENTILES:
        table.add_column(names.get(percentile, f"{percentile}%"), justify="right")
    for measure, values in found.percentiles().items():
        table.add_row(Text(measure, STYLES.get(measure, "bold")), *(f"{value:,}" for value in values.values()))
    return table


def histogram(lengths: np.ndarray, limit: int | None, bars: int = 14, width: int = 40) -> Group:
    """Renders counts of sequences by length, and which of them are over the limit.

    Examples:
        >>> import rich
        >>> rich.print(histogram(np.array([1, 2, 2, 9, 12]), limit=10, bars=3, width=3))
        tokens of a sequence (prompt and longer response); --max_length 10
         1 -  5  ███  3
         6 - 10  █    1
        11 - 15  █    1
    """
    shown = "no --max_length" if limit is None else f"--max_length {limit:,}"
    limit = int(lengths.max()) if limit is None else limit
    edges = _edges(int(lengths.min()), int(np.percentile(lengths, 99)), limit, bars)
    counts = np.histogram(lengths, [*(edge + 0.5 for edge in edges), np.inf])[0]
    labels = [f"{low + 1:,} - {high:>{len(f'{edges[-1]:,}')},}" for low, high in itertools.pairwise(edges)]
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", style="bright_black")
    for edge, label, count in zip(edges, [*labels, f"over {edges[-1]:,}"], counts, strict=True):
        if count or edge != edges[-1]:
            style = "green" if edge < min(limit, edges[-1]) else "yellow"
            table.add_row(label, Bar(counts.max(), 0, count, width=width, color=style), f"{count:,}")
    return Group(f"tokens of a sequence (prompt and longer response); {shown}", table)


def _edges(low: int, high: int, limit: int, bars: int) -> list[int]:
    """Returns round bounds of at most ``bars`` steps from ``low`` to ``high``, with the limit if it is between."""
    step = next(s for s in (f * 10**e for e in range(10) for f in (1, 2, 5)) if (high - low) // s + 1 <= bars)
    edges = list(range((low - 1) // step * step, high + step, step))
    return sorted({*edges, limit}) if edges[0] < limit < edges[-1] else edges


def example(pair: TokenisedPair, uncut: TokenisedPair, tokenizer: Any, title: str) -> Panel:
    """Renders one pair with its parts marked: in the loss, read only, cut, special tokens."""
    parts: list[RenderableType] = []
    for name, part in (
        ("prompt", "read, masked from the loss"),
        ("chosen", "in the loss"),
        ("rejected", "in the loss"),
    ):
        ids, all_ids = list(getattr(pair, f"{name}_ids")), list(getattr(uncut, f"{name}_ids"))
        cut = len(all_ids) - len(ids)
        # Where it was cut: at the end, or at the beginning but for such tokens as one that starts a text.
        begin = next(n for n in range(len(ids) + 1) if ids == [*all_ids[:n], *all_ids[n + cut :]])
        more = f", {cut:,} cut off" if cut else ""
        heading: list[tuple[str, str]] = [
            (name, f"bold reverse {STYLES[name]}"),
            (f" {len(ids):,} tokens{more}; {part}", "bright_black"),
        ]
        if (weights := getattr(pair, f"{name}_weights", None)) is not None:
            heading.append((_heaviest(ids, weights, tokenizer), "bright_black"))
        text = _marked(ids[:begin], tokenizer, name)
        if cut:
            gone = tokenizer.decode(all_ids[begin : begin + cut], clean_up_tokenization_spaces=False)
            text.append("⟪cut off: ", "yellow").append(_shortened(gone, SHOWN // 2), STYLES["cut"]).append(
                "⟫", "yellow"
            )
        parts += [*([Text()] if parts else []), Text.assemble(*heading), text + _marked(ids[begin:], tokenizer, name)]
    return Panel(Group(*parts), title=title, title_align="left", border_style="bright_black")


def _heaviest(ids: Sequence[int], weights: Sequence[float], tokenizer: Any) -> str:
    """Describes the weights of a response and names its heaviest tokens."""
    order = sorted(range(len(ids)), key=lambda index: -weights[index])[:3]
    named = ", ".join(f"{tokenizer.decode([ids[index]])!r} {weights[index]:g}" for index in order)
    return f"; weights {min(weights):g} to {max(weights):g}, heaviest {named}"


def legend() -> Text:
    """Explains the colours of an example."""
    return Text.assemble(
        "examples: ", ("prompt, masked", STYLES["prompt"]), "  ", ("chosen", STYLES["chosen"]), "  ",
        ("rejected", STYLES["rejected"]), "  ", ("special token", STYLES["special"]), "  ", ("cut off", STYLES["cut"]),
    )  # fmt: skip


def _marked(ids: Sequence[int], tokenizer: Any, part: str) -> Text:
    """Renders ids as text in the colour of their part, special tokens in their own."""
    text = Text()
    for special, run in itertools.groupby(ids, special_ids(tokenizer).__contains__):
        shown = tokenizer.decode(list(run), clean_up_tokenization_spaces=False)
        text.append(shown if special else _shortened(shown), STYLES["special" if special else part])
    return text


def _shortened(text: str, limit: int = SHOWN) -> str:
    text = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
