"""Pages in a real browser, and what goes wrong on them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
AXE = Path(sys.prefix) / "node_modules" / "axe-core" / "axe.min.js"


class Page:
    """A page that is open.

    Attributes:
        page: Playwright's page.
        problems: Messages of the console, errors, and addresses of requests over the network.
    """

    ready = "body"
    """What the page shows once it is drawn."""

    def __init__(self, browser: Any, file: Path, **settings: Any) -> None:
        self.page = browser.new_page(**settings)
        self.problems: list[str] = []
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda r: r.url.startswith(("file:", "data:")) or self.problems.append(r.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector(self.ready)

    def serious_findings(self) -> list[tuple[str, str]]:
        """Returns what axe finds, by rule and element; skips without axe."""
        if not AXE.exists():
            pytest.skip("needs axe-core, which `make install` installs where npm is")
        self.page.evaluate(AXE.read_text(encoding="utf-8"))
        found = self.page.evaluate("axe.run()")
        assert len(found["passes"]) > 10
        serious = [violation for violation in found["violations"] if violation["impact"] in ("serious", "critical")]
        return [(violation["id"], violation["nodes"][0]["html"]) for violation in serious]
