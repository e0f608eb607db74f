"""``tdpo report``: writes a page on one or more training runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from tdpo.commands.common import console, quieten, write_text
from tdpo.commands.options import parse
from tdpo.config.checks import documented, option
from tdpo.errors import UserError
from tdpo.report.collect import read_runs
from tdpo.report.run import run_page


@documented
@dataclass
class ReportOptions:
    """The runs and the page.

    Attributes:
        runs: Folders of runs (--output_dir of tdpo train, tdpo sft or transformers' Trainer); may also be given
            without the option, first: tdpo report RUN RUN2.
        output: File to write: a page to open in a browser.
    """

    runs: list[str] = option(list)
    output: str = "report.html"


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    folders = list(takewhile(lambda word: not word.startswith("-"), argv))
    rest = list(argv[len(folders) :])
    (options,) = parse("report", (ReportOptions,), rest)
    quieten()
    options.runs = [*folders, *options.runs]
    if not options.runs:
        raise UserError("name the folder of a run: tdpo report RUN [RUN2 ...] --output page.html")
    write_text(options.output, run_page(read_runs(options.runs)))
    console().print(f"written to {options.output}", soft_wrap=True)
