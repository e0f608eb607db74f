"""The text of each token of a sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers decode bytes to that are not a complete character."""
LONGEST_CHARACTER = 16
"""Tokens after which an incomplete character is given up. A character has at most four bytes."""
CONTEXT = 8
"""Tokens before the sequence that are decoded with it: some tokenizers drop a space at the beginning of a text."""


class Piece(NamedTuple):
    """Text of one token, or of several that complete a character together.

    Attributes:
        text: The text.
        tokens: Number of tokens.
    """

    text: str
    tokens: int


def pieces(ids: Sequence[int], decode: Callable[..., str], before: Sequence[int] = ()) -> list[Piece]:
    """Splits the text of token ids into the text of each token; byte tokens of one character are joined.

    The time is linear in the number of ids: only the last few tokens are decoded at each.

    Args:
        ids: The sequence.
        decode: The tokenizer's ``decode``.
        before: Ids before the sequence.

    Returns:
        Pieces with as many tokens together as there are ids. Their texts joined are the text of the ids.
    """
    begin, all_ids = len(before[-CONTEXT:]), [*before[-CONTEXT:], *ids]
    found, window, done = [], 0, begin
    for end in range(begin + 1, len(all_ids) + 1):
        known, text = (
            decode(all_ids[window:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for stop in (done, end)
        )
        complete = not text.endswith(INCOMPLETE) or end - done >= LONGEST_CHARACTER
        if complete or end == len(all_ids):
            found.append(Piece(text[len(known) :], end - done))
            window, done = done, end
    return found


def token_ends(ids: Sequence[int], decode: Callable[..., str]) -> list[int]:
    """Returns for each token how many characters are complete after it."""
    lengths = [length for piece in pieces(ids, decode) for length in [0] * (piece.tokens - 1) + [len(piece.text)]]
    return list(accumulate(lengths))
