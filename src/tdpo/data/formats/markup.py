"""HTML to text, as StackExchange's posts need it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

BLOCKS = {"p", "div", "blockquote", "ul", "ol", "h1", "h2", "h3", "h4", "h5", "h6", "table", "pre", "hr"}
SILENT = {"script", "style"}
NO_TAG = re.compile("<(?![^<>]*>)")
"""What begins no tag, since none ends before the next one begins; the parser would take quadratic time over it."""


def html_to_text(html: str) -> str:
    r"""Text of HTML: paragraphs apart by a blank line, list items by a dash, code as ``<code>...</code>``, unchanged.

    Example:
        >>> html_to_text("<p>Use <code>a &lt; b</code>:</p><pre><code>if a:\n    b</code></pre>")
        'Use <code>a < b</code>:\n\n<code>if a:\n    b</code>'
    """
    reader = _Reader()
    reader.feed(NO_TAG.sub("&lt;", html))
    reader.close()
    return reader.text()


class _Reader(HTMLParser):
    """Collects text; inside ``pre`` and ``code`` as it stands, elsewhere with white space as a browser shows it."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._pieces: list[str] = []
        self._verbatim: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in SILENT:
            self._silent += 1
        elif tag in BLOCKS:
            self._break(2)
        elif tag == "li":
            self._break(1)
            self._pieces.append("- ")
        elif tag == "br":
            self._break(1, always=True)
        elif tag == "tr":
            self._break(1)
        if tag in ("pre", "code"):
            self._verbatim.append(tag)
        if tag == "code":
            self._pieces.append("<code>")

    def handle_endtag(self, tag: str) -> None:
        if tag in SILENT:
            self._silent = max(self._silent - 1, 0)
        if tag in self._verbatim:
            while self._verbatim:
                closed = self._verbatim.pop()
                if closed == "code":
                    self._pieces.append("</code>")
                if closed == tag:
                    break
        if tag in BLOCKS:
            self._break(2)
        elif tag in ("td", "th"):
            self._pieces.append(" ")

    def handle_data(self, data: str) -> None:
        if self._silent:
            return
        if self._verbatim:
            self._pieces.append(data)
            return
        shown = " ".join(data.split())
        if not shown:
            shown = " " if data and self._inside_line() else ""
        else:
            shown = (" " if data[0].isspace() and self._inside_line() else "") + shown
            shown += " " if data[-1].isspace() else ""
        self._pieces.append(shown)

    def text(self) -> str:
        """All that was read."""
        while self._verbatim:
            if self._verbatim.pop() == "code":
                self._pieces.append("</code>")
        return "".join(self._pieces).strip()

    def _inside_line(self) -> bool:
        last = next((piece for piece in reversed(self._pieces) if piece), "\n")
        return not last[-1].isspace()

    def _break(self, lines: int, always: bool = False) -> None:
        """Ends the line, and leaves blank ones so that ``lines`` line ends stand here."""
        while self._pieces and not self._verbatim:
            shorter = self._pieces[-1].rstrip(" ")
            if shorter:
                self._pieces[-1] = shorter
                break
            self._pieces.pop()
        tail = "".join(self._pieces[-3:])
        standing = len(tail) - len(tail.rstrip("\n"))
        if tail.rstrip("\n") or always:
            self._pieces.append("\n" * (1 if always else max(lines - standing, 0)))
