"""The documentation's pages: none is left out, and every public name is on the page of the API."""

from __future__ import annotations

import re

import pytest
import yaml
from conftest import REPOSITORY

import tdpo

DOCS = REPOSITORY / "docs"


def test_every_page_is_in_the_navigation() -> None:
    text = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    pages = set(re.findall(r"[\w/-]+\.md", str(yaml.safe_load(text)["nav"])))
    assert {path.name for path in DOCS.glob("*.md")} <= pages


@pytest.mark.parametrize("name", tdpo.__all__)
def test_every_public_name_has_a_docstring_and_a_place_in_the_api(name: str) -> None:
    found = getattr(tdpo, name)
    assert len((found.__doc__ or "").split()) > 3
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    assert re.search(rf"::: tdpo\.{name}\b|members: \[[^\]]*\b{name}\b", text), f"docs/api.md does not mention {name}"


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("troubleshooting.md", "renders the prompt differently for different responses"),
        ("troubleshooting.md", "renders a prompt differently once a response follows"),
        ("troubleshooting.md", "as nothing but its end token"),
        ("troubleshooting.md", "layout: padded rows"),
    ],
)
def test_a_quoted_message_is_one_of_the_program(page: str, message: str) -> None:
    assert message in (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
    code = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "src").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", code)
    assert message in joined.replace("{'trees' if pack is pack_trees else 'padded rows'}", "padded rows")
