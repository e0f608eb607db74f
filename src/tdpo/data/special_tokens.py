"""Texts of a tokenizer's special tokens: marked where they are the user's words, found where they end a response."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

OPEN, CLOSE = "\ue000", "\ue001"
"""Private-use characters around the index of a text that is the user's, see :class:`Marks`."""
RESPONSE = "\ue002"
"""Marks a response's content where only its position is needed."""
Piece = tuple[str, bool, bool]
"""A text that is encoded in one go; whether special-token text in it is plain text; whether it continues other text."""


class RenderedTurns(NamedTuple):
    """A prompt and the responses to it as text to encode.

    Attributes:
        prompt: Pieces of the prompt.
        responses: Pieces of each response, through its own end where it has one.
        ended: Whether each response has its own end token.
        notices: Warnings about the row, for the report.
    """

    prompt: list[Piece]
    responses: Sequence[list[Piece]] = ()
    ended: Sequence[bool] = ()
    notices: Sequence[str] = ()


def special_texts(tokenizer: Any) -> list[str]:
    """Returns the texts of all special tokens, the longest first."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)


def cut_after_end(response: str, special: Sequence[str]) -> tuple[str, bool]:
    """Cuts the white space after a special token that ends a response, and returns whether there is such a token."""
    end = max((response.rfind(token) + len(token) for token in special if token in response), default=0)
    ended = end > 0 and not response[end:].strip()
    return (response[:end], True) if ended else (response, False)


class Marks:
    """Marks special-token text in messages and tools, so that a chat template's own can be distinguished from it.

    Args:
        special: Texts of the special tokens.
    """

    def __init__(self, special: Sequence[str]) -> None:
        self._texts = [*special, OPEN, CLOSE, RESPONSE]
        self._pattern = re.compile("|".join(map(re.escape, self._texts)))

    def add(self, value: Any) -> Any:
        """Returns messages or tools with marks in place of special-token text."""
        if isinstance(value, str):
            return self._pattern.sub(lambda found: f"{OPEN}{self._texts.index(found[0])}{CLOSE}", value)
        if isinstance(value, list):
            return [self.add(item) for item in value]
        if isinstance(value, dict):
            return {name: value[name] if name == "role" else self.add(value[name]) for name in value}
        return value

    def split(self, rendered: str, continues: bool = False) -> list[Piece]:
        """Splits a rendering into the template's text, whose special tokens are special, and the user's."""
        pieces: list[Piece] = []
        for index, text in enumerate(re.split(f"{OPEN}([0-9]+){CLOSE}", rendered)):
            literal = index % 2 == 1
            # A template that cuts text can leave half a mark; the user's own such characters are marked themselves.
            text = self._texts[int(text)] if literal else text.replace(OPEN, "").replace(CLOSE, "")
            if text:
                pieces.append((text, literal, continues or bool(pieces)))
        return pieces

    def remove(self, rendered: str) -> str:
        """Returns a rendering with the user's own text in place of the marks."""
        return "".join(text for text, _, _ in self.split(rendered))
