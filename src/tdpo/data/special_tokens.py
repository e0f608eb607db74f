"""Texts of a tokenizer's special tokens: marked where they are the user's words, found where they end a response."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "\ue000", "\ue001"
"""Private-use characters around the number of a text that stands for itself, see :meth:`SpecialTokens.pieces`."""
RESPONSE = "\ue002"
"""Stands for a response's content where only its position is needed."""


@dataclass(frozen=True)
class Piece:
    """Text that is encoded in one go.

    Attributes:
        text: The text.
        literal: Whether special-token text in it is plain text; otherwise it is the tokens it names.
        continues: Whether it continues another text, so that no space is put before it.
    """

    text: str
    literal: bool = True
    continues: bool = False


class SpecialTokens:
    """Distinguishes a template's special tokens from the same text in the user's words, which is marked in renderings.

    Args:
        tokenizer: A transformers tokenizer.

    Attributes:
        texts: Texts of all special tokens, the longest first.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.texts = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self.texts)) or r"(?!)")
        self._marked = [*self.texts, OPEN, CLOSE, RESPONSE]
        self._marked_pattern = re.compile("|".join(map(re.escape, self._marked)))

    def protect(self, value: Any) -> Any:
        """Puts marks in place of special-token text in messages or tools, so that a template cannot revive it."""
        if isinstance(value, str):
            return self._marked_pattern.sub(lambda found: f"{OPEN}{self._marked.index(found[0])}{CLOSE}", value)
        if isinstance(value, list):
            return [self.protect(item) for item in value]
        if isinstance(value, dict):
            return {name: value[name] if name == "role" else self.protect(value[name]) for name in value}
        return value

    def pieces(self, rendered: str, continues: bool = False) -> list[Piece]:
        """Splits a rendering into the template's text, whose special tokens are special, and the user's."""
        pieces: list[Piece] = []
        for index, text in enumerate(re.split(f"{OPEN}([0-9]+){CLOSE}", rendered)):
            literal = index % 2 == 1
            # A template that cuts text can leave half a mark; the user's own such characters are marked themselves.
            text = self._marked[int(text)] if literal else text.replace(OPEN, "").replace(CLOSE, "")
            if text:
                pieces.append(Piece(text, literal, continues or bool(pieces)))
        return pieces

    def without_marks(self, rendered: str) -> str:
        """Returns a rendering with the user's own text in place of the marks."""
        return "".join(piece.text for piece in self.pieces(rendered))

    def removed_from(self, rendered: str) -> str:
        """Returns a rendering without its special tokens."""
        return self._pattern.sub("", rendered)

    def through_end(self, rendered: str) -> tuple[str, bool]:
        """Returns a response through the special token that ends it but for white space, and whether there is one."""
        end = max((rendered.rfind(token) + len(token) for token in self.texts if token in rendered), default=0)
        ended = end > 0 and not rendered[end:].strip()
        return (rendered[:end], True) if ended else (rendered, False)
