"""A dataset on a terminal: tables, a histogram, and pairs with every token's part marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tdpo.data.check import MEASURES, PERCENTILES, DataCheck
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
BLOCKS = " ▏▎▍▌▋▊▉█"


def counts_table(found: DataCheck, title: str) -> Table:
    """Renders counts of rows by what became of them, and what was found in those that are left."""
    report = found.report
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    table.add_column("rows", justify="right")
    table.add_column("what", overflow="fold", max_width=64)
    table.add_column("where", style="bright_black", overflow="fold")
    table.add_row(f"{report.read:,}", f"read as {report.format}", "")
    if report.elsewhere:
        table.add_row(f"{report.elsewhere:,}", "pairs on the other side of the split", "")
    for reason, rows in report.dropped.items():
        bad = reason.startswith("bad row")
        style = "bold red" if bad else "yellow"
        table.add_row(Text(f"{len(rows):,}", style), Text(reason if bad else f"dropped: {reason}", style), _rows(rows))
    for what, rows in report.noticed.items():
        table.add_row(Text(f"{len(rows):,}", "yellow"), what, _rows(rows))
    for column, row in report.unused.items():
        table.add_row("", Text(f"column {column!r} holds text and is not used", "yellow"), f"from row {row}")
    for part, rows in report.truncated.items():
        table.add_row(Text(f"{len(rows):,}", "yellow"), f"with a {part} that is cut to fit", _rows(rows))
    for what, rows in report.noticed.items():
        table.add_row(Text(f"{len(rows):,}", "yellow"), Text(what, "yellow"), _rows(rows))
    for rows, what in (
        (found.without_end, "with a response that has no end token, because it is cut"),
        (found.repeated, "that repeat an earlier pair"),
        (found.repeated_prompts, "with the prompt of an earlier pair"),
        (found.leaks, "whose prompt is in the evaluation data"),
        (found.contradicted, "that contradict another row of the same prompt"),
        (found.alike, "whose responses differ in white space and case alone"),
        (found.special, "with special-token text, which is encoded as plain text"),
    ):
        if rows:
            table.add_row(Text(f"{len(rows):,}", "yellow"), what, _rows(rows))
    table.add_row(Text(f"{report.kept:,}", "bold green"), Text("pairs to train on", "bold"), "")
    return table


def lengths_table(found: DataCheck) -> Table:
    """Renders tokens by percentile."""
    table = Table(title="tokens, before anything is cut", title_justify="left", title_style="bold", show_edge=False)
    table.add_column("")
    names = {0: "least", 50: "median", 100: "most"}
    for percentile in PERCENTILES:
        table.add_column(names.get(percentile, f"{percentile}%"), justify="right")
    percentiles = found.percentiles()
    for measure in MEASURES:
        style = STYLES.get(measure, "bold")
        table.add_row(Text(measure, style), *(f"{value:,}" for value in percentiles[measure].values()))
    return table


def histogram(lengths: np.ndarray, limit: int | None, bars: int = 14, width: int = 40) -> Text:
    """Sequences by length, and what of them is over the limit.

    Example:
        >>> print(histogram(np.array([1, 2, 2, 9, 12]), limit=10, bars=3, width=3).plain)
        tokens of a sequence (prompt and longer response); --max_length 10
             1 -     5  ███ 3
             6 -    10  █   1
            11 -    15  █   1
    """
    shown = "no --max_length" if limit is None else f"--max_length {limit:,}"
    limit = int(lengths.max()) if limit is None else limit
    edges = _edges(int(lengths.min()), int(np.percentile(lengths, 99)), limit, bars)
    counts = np.histogram(lengths, [*(edge + 0.5 for edge in edges), np.inf])[0]
    text = Text(f"tokens of a sequence (prompt and longer response); {shown}")
    for place, count in enumerate(counts):
        last = place == len(edges) - 1
        if last and not count:
            break
        label = f"  over {edges[-1]:>7,}  " if last else f"{edges[place] + 1:>6,} - {edges[place + 1]:>5,}  "
        text.append(f"\n{label}", "bright_black")
        text.append(_bar(count / counts.max(), width), "green" if not last and edges[place] < limit else "yellow")
        text.append(f" {count:,}")
    return text


def _edges(low: int, high: int, limit: int, bars: int) -> list[int]:
    """Returns round bounds of at most ``bars`` steps from ``low`` to ``high``, with the limit if it is between."""
    step = next(s for s in (f * 10**e for e in range(10) for f in (1, 2, 5)) if (high - low) // s + 1 <= bars)
    edges = list(range((low - 1) // step * step, high + step, step))
    return sorted({*edges, limit}) if edges[0] < limit < edges[-1] else edges


def example(pair: TokenisedPair, uncut: TokenisedPair, tokenizer: Any, title: str) -> Panel:
    """Renders one pair with its parts marked: in the loss, read only, cut, special tokens."""
    bos = _kept_start(pair.prompt_ids, uncut.prompt_ids)
    cut = len(uncut.prompt_ids) - len(pair.prompt_ids)
    prompt = Text()
    if cut and pair.prompt_ids == uncut.prompt_ids[: len(pair.prompt_ids)]:
        prompt += _marked(pair.prompt_ids, tokenizer, "prompt") + _cut(uncut.prompt_ids[-cut:], tokenizer)
    else:
        prompt += _marked(pair.prompt_ids[:bos], tokenizer, "prompt")
        prompt += _cut(uncut.prompt_ids[bos : bos + cut], tokenizer)
        prompt += _marked(pair.prompt_ids[bos:], tokenizer, "prompt")
    parts: list[RenderableType] = [_heading("prompt", len(pair.prompt_ids), cut, "read, masked from the loss"), prompt]
    for name, ids, all_ids in (
        ("chosen", pair.chosen_ids, uncut.chosen_ids),
        ("rejected", pair.rejected_ids, uncut.rejected_ids),
    ):
        gone = all_ids[len(ids) :]
        parts += [Text(), _heading(name, len(ids), len(gone), "in the loss")]
        parts += [_marked(ids, tokenizer, name) + _cut(gone, tokenizer)]
    return Panel(Group(*parts), title=title, title_align="left", border_style="bright_black")


def legend() -> Text:
    """Explains the colours of an example."""
    return Text.assemble(
        "examples: ", ("prompt, masked", STYLES["prompt"]), "  ", ("chosen", STYLES["chosen"]), "  ",
        ("rejected", STYLES["rejected"]), "  ", ("special token", STYLES["special"]), "  ", ("cut off", STYLES["cut"]),
    )  # fmt: skip


def _heading(name: str, kept: int, cut: int, part: str) -> Text:
    more = f", {cut:,} cut off" if cut else ""
    return Text.assemble((name, f"bold reverse {STYLES[name]}"), (f" {kept:,} tokens{more}; {part}", "bright_black"))


def _kept_start(kept: Sequence[int], uncut: Sequence[int]) -> int:
    """Counts the tokens that stayed at the beginning of a prompt whose beginning was cut, such as a start token."""
    cut = len(uncut) - len(kept)
    if not cut or list(kept) == list(uncut[cut:]):
        return 0
    return next((n for n in range(1, len(kept)) if list(kept) == [*uncut[:n], *uncut[cut + n :]]), 0)


def _marked(ids: Sequence[int], tokenizer: Any, part: str) -> Text:
    """Renders ids as text in the colour of their part, special tokens in their own."""
    text = Text()
    for special, run in _runs(ids, tokenizer):
        shown = tokenizer.decode(run, clean_up_tokenization_spaces=False)
        text.append(shown if special else _shortened(shown), STYLES["special" if special else part])
    return text


def _cut(ids: Sequence[int], tokenizer: Any) -> Text:
    if not ids:
        return Text()
    shown = _shortened(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False), SHOWN // 2)
    return Text.assemble(("⟪cut off: ", "yellow"), (shown, STYLES["cut"]), ("⟫", "yellow"))


def _runs(ids: Sequence[int], tokenizer: Any) -> Iterator[tuple[bool, list[int]]]:
    """Groups neighbouring ids that are all special, or all not."""
    known = set(tokenizer.all_special_ids)
    known |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    run: list[int] = []
    for token in ids:
        if run and (token in known) != (run[-1] in known):
            yield run[-1] in known, run
            run = []
        run.append(token)
    if run:
        yield run[-1] in known, run


def _shortened(text: str, limit: int = SHOWN) -> str:
    text = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def _bar(share: float, width: int) -> str:
    eighths = round(share * width * 8)
    eighths = max(eighths, 1) if share > 0 else 0
    return ("█" * (eighths // 8) + BLOCKS[eighths % 8].strip()).ljust(width)


def _rows(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:ROWS_SHOWN])) + (", ..." if len(rows) > ROWS_SHOWN else "")
