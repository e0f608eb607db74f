"""HTML to text, as StackExchange's posts need it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from typing_extensions import override

BLOCK, LINE, BREAK, VERBATIM = "\v", "\f", "\n", "\ud800"
"""Marks in the text that is collected: a paragraph's border, a line's, a line break, and a text taken as it is.

No text that can be encoded holds the last, a lone surrogate.
"""
BLOCKS = dict.fromkeys(
    ("p", "div", "blockquote", "ul", "ol", "h1", "h2", "h3", "h4", "h5", "h6", "table", "pre", "hr"), BLOCK
)
STARTS = {**BLOCKS, "li": LINE + "- ", "tr": LINE, "br": BREAK, "code": "<code>"}
ENDS = {**BLOCKS, "td": " ", "th": " "}
NESTED = ("pre", "code", "script", "style")
NO_TAG = re.compile("<(?![^<>]*>)")
"""A ``<`` that begins no tag, since none ends before the next one begins; the parser would take quadratic time."""


def html_to_text(html: str) -> str:
    r"""Returns the text of HTML: blank lines between paragraphs, a dash before list items, code in ``<code>`` tags.

    Code stays as it is; other white space is what a browser shows.

    Examples:
        >>> html_to_text("<p>Use <code>a &lt; b</code>:</p><pre><code>if a:\n    b</code></pre>")
        'Use <code>a < b</code>:\n\n<code>if a:\n    b</code>'
    """
    reader = _Reader()
    reader.feed(NO_TAG.sub("&lt;", html))
    reader.close()
    reader.close_tags(None)
    verbatim = iter(reader.verbatim)
    shown = re.sub(rf"[ {BLOCK}{LINE}{BREAK}]+", _white_space, "".join(reader.pieces))
    return re.sub(VERBATIM, lambda _: next(verbatim), shown).strip()


class _Reader(HTMLParser):
    """Collects text and marks, and the texts inside ``pre`` and ``code`` as they stand."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.verbatim: list[str] = []
        self.open_tags: list[str] = []

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.pieces.append(STARTS.get(tag, ""))
        if tag in NESTED:
            self.open_tags.append(tag)

    @override
    def handle_endtag(self, tag: str) -> None:
        if tag in self.open_tags:
            self.close_tags(tag)
        self.pieces.append(ENDS.get(tag, ""))

    @override
    def handle_data(self, data: str) -> None:
        inner = self.open_tags[-1] if self.open_tags else ""
        if inner in ("pre", "code"):
            text = data if inner == "code" else data.rstrip("\n")
            self.verbatim.append(text)
            self.pieces.append(VERBATIM + BREAK * (len(data) - len(text)))
        elif not inner:
            self.pieces.append(re.sub(r"\s+", " ", data))

    def close_tags(self, tag: str | None) -> None:
        """Closes the open tags up to one of a name; all of them for None."""
        while self.open_tags:
            closed = self.open_tags.pop()
            if closed == "code":
                self.pieces.append("</code>")
            if closed == tag:
                return


def _white_space(marks: re.Match[str]) -> str:
    """Returns the line ends that adjacent marks make together, or a space."""
    lines = 0
    for mark in marks[0].replace(" ", ""):
        lines = lines + 1 if mark == BREAK else max(lines, 2 if mark == BLOCK else 1)
    return "\n" * lines or " "
