"""Hooks of mkdocs: pages from outside of docs/, the command line's options, and formulas as MathML."""

from __future__ import annotations

import html
import io
import re
from contextlib import redirect_stdout, suppress
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"experiments{part}/README.md" for part in ("", "/imdb", "/hh", "/stories", "/kl-term")),
)
"""Pages outside of docs/ that become pages of the site, below ``project/``."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)

MATH_BLOCK = re.compile(r"<p>\.\. math::(?:</p>\s*<pre[^>]*><code>)?(.*?)(?:</code></pre>|</p>)", re.DOTALL)
MATH_ROLE = re.compile(r":math:<code>(.*?)</code>", re.DOTALL)
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):<code>~?(?:[\w.]+\.(?=\w+</code>))?")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages and pictures that are not in docs/."""
    for page in PAGES:
        if (ROOT / page).exists():
            files.append(File.generated(config, f"project/{page}", abs_src_path=str(ROOT / page)))
    for picture in ROOT.glob("experiments/*/*.png"):
        name = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, f"project/{name}", abs_src_path=str(picture)))
    files.append(File.generated(config, "cli.md", content=command_line()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Points links at pages of the site; text replaces links to files that are not among them."""
    source = page.file.src_uri
    # The page's path in the repository, from which its links are relative.
    own = source.removeprefix("project/") if source.startswith("project/") else f"docs/{source}"

    def replaced(link: re.Match[str]) -> str:
        picture, text, target, anchor = link.groups()
        if "://" in target or target.startswith("mailto:"):
            return link[0]
        path = normpath(str(PurePosixPath(own).parent / target))
        for candidate in (path, f"{path}/README.md"):
            page_of = candidate.removeprefix("docs/") if candidate.startswith("docs/") else f"project/{candidate}"
            if files.get_file_from_path(page_of) is not None:
                return f"{picture}[{text}]({relpath(page_of, str(PurePosixPath(source).parent))}{anchor or ''})"
        if not (ROOT / path).exists():
            return link[0]  # mkdocs reports it
        return text if "`" in text else f"{text} (`{path}`)"

    return LINK.sub(replaced, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Converts formulas to MathML, which browsers render themselves, and the roles of docstrings to plain code."""
    content = FORMULA.sub(lambda found: _mathml(found[3], found[2] == "["), content)
    content = MATH_BLOCK.sub(lambda found: _mathml(found[1], True), content)
    content = MATH_ROLE.sub(lambda found: _mathml(found[1], False), content)
    return ROLE.sub("<code>", content)


def _mathml(formula: str, block: bool) -> str:
    return convert(html.unescape(formula).strip(), display="block" if block else "inline")


def command_line() -> str:
    """Returns a page with the help of every command."""
    from tdpo.cli import COMMANDS, main

    parts = ["# Command line", "Every option can also stand in a YAML file that `--config` names."]
    for name, summary in COMMANDS.items():
        text = io.StringIO()
        with redirect_stdout(text), suppress(SystemExit):
            main([name, "--help"])
        parts += [f"## tdpo {name}", summary[0].upper() + summary[1:] + ".", f"```text\n{text.getvalue()}```"]
    return "\n\n".join(parts) + "\n"
