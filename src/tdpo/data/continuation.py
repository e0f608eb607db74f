"""Encodes text that continues another text, for tokenizers that put a space before every text they are given."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

logger = logging.getLogger("tdpo")

ANCHORS = ("\n", "(", ".", "0", "x", "\u3002")
"""Texts that may stand before a continuation while it is encoded; their ids are cut off again."""
PROBES = ("a", " a", "4", " 4", "The end", ".")
"""Continuations that an anchor is proven on."""
Encode = Callable[..., list[list[int]]]


class ContinuationEncoder:
    """Encodes texts as they stand after other text: without the space a tokenizer may put before a text.

    Args:
        tokenizer: A transformers tokenizer, which decodes.
        encode: Its encoder, see :class:`~tdpo.data.encode.TextEncoder`.

    Attributes:
        anchors: Proven anchors with their ids, the preferred one first; empty for a tokenizer that needs none.
    """

    def __init__(self, tokenizer: Any, encode: Encode) -> None:
        self._tokenizer, self._encode = tokenizer, encode
        self.anchors = self._find_anchors()

    def __call__(self, texts: Sequence[str], literal: bool = True) -> list[list[int]]:
        """Returns the ids of continuations; see :class:`~tdpo.data.encode.TextEncoder` for the arguments."""
        if not self.anchors:
            return self._encode(texts, literal)
        found: list[list[int]] = [[] for _ in texts]
        rest = list(range(len(texts)))
        for anchor, bare in self.anchors:
            encoded = self._encode([anchor + texts[index] for index in rest], literal)
            merged = []
            for index, ids in zip(rest, encoded, strict=True):
                if ids[: len(bare)] == bare:
                    found[index] = ids[len(bare) :]
                else:  # the anchor became one token with the beginning of the text
                    merged.append(index)
            rest = merged
            if not rest:
                return found
        logger.warning("the tokenizer puts a space before %d texts that continue another", len(rest))
        for index, ids in zip(rest, self._encode([texts[index] for index in rest], literal), strict=True):
            found[index] = ids
        return found

    def _find_anchors(self) -> list[tuple[str, list[int]]]:
        """Finds anchors by decoding: what they precede must come back without a space added or lost."""
        probes = [text for text in PROBES if self._decode(self._encode([text])[0]).strip() == text.strip()]
        if len(probes) < 2:  # decoding proves nothing here: ids alone decide
            first = ANCHORS[0]
            bare, anchored, plain = self._encode([first, first + "a", "a"])
            return [] if anchored == bare + plain or anchored[: len(bare)] != bare else [(first, bare)]
        alone = self._encode(probes)
        proven = []
        for anchor, bare in zip(ANCHORS, self._encode(ANCHORS), strict=True):
            shown = self._decode(bare)
            if not bare or shown.strip(" ") != anchor:  # white space that is normalised away, an unknown character
                continue
            if all(self._decode(bare + ids) == shown + text for text, ids in zip(probes, alone, strict=True)):
                return []
            together = self._encode([anchor + text for text in probes])
            if all(
                ids[: len(bare)] == bare and self._decode(ids) == shown + text
                for text, ids in zip(probes, together, strict=True)
            ):
                proven.append((anchor, bare))
        if not proven:
            logger.warning(
                "the tokenizer puts a space before every text and none of %s keeps it from that: responses that "
                "continue a word of the prompt begin with a space",
                ", ".join(map(repr, ANCHORS)),
            )
        return proven

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
