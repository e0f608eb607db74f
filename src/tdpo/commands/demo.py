"""``tdpo demo``: the whole path on the embedded small world."""

from __future__ import annotations

from collections.abc import Sequence

from tdpo.commands.common import quieten
from tdpo.commands.options import parse
from tdpo.demo.run import DemoOptions, run_demo


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    (options,) = parse("demo", (DemoOptions,), argv)
    quieten()
    run_demo(options)
