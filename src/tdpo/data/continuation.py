"""Encodes text that continues another text, for tokenizers that put a space before every text they are given."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

logger = logging.getLogger("tdpo")

ANCHORS = ("\n", "(", ".", "0", "x", "\u3002")
"""Texts that may precede a continuation while it is encoded; their ids are cut off again."""
PROBES = ("a", " a", "4", " 4", "The end", ".")
"""Continuations that an anchor is proven on."""
Encode = Callable[..., list[list[int]]]
Anchor = tuple[str, list[int]]
"""A text and its ids."""


def encode_continuations(
    texts: Sequence[str], literal: bool, anchors: Sequence[Anchor], encode: Encode
) -> list[list[int]]:
    """Encodes texts as they are after other text: without the space a tokenizer may put before a text.

    Args:
        texts: The texts.
        literal: Encodes special-token text as the characters it is made of.
        anchors: Proven anchors of the tokenizer, see :func:`find_anchors`.
        encode: The tokenizer's encoder, see :class:`~tdpo.data.encode.TextEncoder`.
    """
    if not anchors:
        return encode(texts, literal)
    found: dict[int, list[int]] = {}
    rest: Sequence[int] = range(len(texts))
    for anchor, bare in anchors:
        encoded = encode([anchor + texts[index] for index in rest], literal)
        # Otherwise the anchor became one token with the beginning of the text.
        found |= {i: ids[len(bare) :] for i, ids in zip(rest, encoded, strict=True) if ids[: len(bare)] == bare}
        rest = [index for index in rest if index not in found]
    if rest:
        logger.warning("the tokenizer puts a space before %d texts that continue another", len(rest))
        found |= zip(rest, encode([texts[index] for index in rest], literal), strict=True)
    return [found[index] for index in range(len(texts))]


def find_anchors(tokenizer: Any, encode: Encode) -> list[Anchor]:
    """Returns anchors that a text can follow without a space added or lost, the preferred one first.

    Decoding proves them. There are none for a tokenizer that puts no space before a text.

    Args:
        tokenizer: A transformers tokenizer, which decodes.
        encode: Its encoder, see :class:`~tdpo.data.encode.TextEncoder`.
    """
    decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    probes = [text for text in PROBES if decode(encode([text])[0]).strip() == text.strip()]
    if len(probes) < 2:  # decoding proves nothing here: ids alone decide
        first = ANCHORS[0]
        bare, anchored, plain = encode([first, first + "a", "a"])
        return [] if anchored == bare + plain or anchored[: len(bare)] != bare else [(first, bare)]
    alone = encode(probes)
    proven = []
    for anchor, bare in zip(ANCHORS, encode(ANCHORS), strict=True):
        shown = decode(bare)
        if not bare or shown.strip(" ") != anchor:  # white space that is normalised away, an unknown character
            continue
        expected = [shown + text for text in probes]
        if [decode(bare + ids) for ids in alone] == expected:
            return []
        together = encode([anchor + text for text in probes])
        if all(ids[: len(bare)] == bare for ids in together) and [decode(ids) for ids in together] == expected:
            proven.append((anchor, bare))
    if not proven:
        logger.warning(
            "the tokenizer puts a space before every text and none of %s keeps it from that: responses that "
            "continue a word of the prompt begin with a space",
            ", ".join(map(repr, ANCHORS)),
        )
    return proven
