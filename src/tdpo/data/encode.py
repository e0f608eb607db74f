"""Encodes plain text: alone, or as it continues other text, without the tokenizer's start and end tokens."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from itertools import chain
from typing import Any, NamedTuple

logger = logging.getLogger("tdpo")

ANCHORS = ("\n", "(", ".", "0", "x", "\u3002")
"""Texts that may precede a continuation while it is encoded; their ids are cut off again."""
PROBES = ("a", " a", "4", " 4", "The end", ".")
"""Continuations that an anchor is proven on."""
Anchor = tuple[str, list[int]]
"""A text and its ids."""
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


class TextEncoder:
    """Encodes texts with a transformers tokenizer, without its start and end tokens, truncation and padding.

    Args:
        tokenizer: Any transformers tokenizer; one with a fast backend is encoded on a private copy of it.

    Attributes:
        spec: The backend as ``tokenizer.json`` holds it, without truncation and padding; None if there is none.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None and (backend.truncation is not None or backend.padding is not None):
            backend = type(backend).from_str(backend.to_str())
            backend.no_truncation()
            backend.no_padding()
        self.spec = None if backend is None else backend.to_str()

    @cached_property
    def _backend(self) -> Any:
        """A copy, so that settings of the user's tokenizer neither apply here nor change."""
        return None if self.spec is None else type(self._tokenizer.backend_tokenizer).from_str(self.spec)

    def __call__(self, texts: Sequence[str], literal: bool = True) -> list[list[int]]:
        """Returns the ids of each text.

        Args:
            texts: Texts, of any length.
            literal: Encodes special-token text as the characters it is made of.
        """
        if not texts:
            return []
        if self._backend is not None:
            self._backend.encode_special_tokens = literal
            return [encoded.ids for encoded in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        encoded = self._tokenizer(list(texts), add_special_tokens=False, split_special_tokens=literal, verbose=False)
        return encoded["input_ids"]

    def turns(self, rendered: Sequence[RenderedTurns]) -> Iterator[list[list[int]]]:
        """Yields ids of each prompt and its responses; all pieces of a kind are encoded in one batch."""
        parts = [[turns.prompt, *turns.responses] for turns in rendered]
        texts: dict[tuple[bool, bool], list[str]] = defaultdict(list)
        for text, literal, continues in chain.from_iterable(chain.from_iterable(parts)):
            texts[literal, continues].append(text)
        encoded = {
            (literal, continues): iter((self.continuations if continues else self)(batch, literal))
            for (literal, continues), batch in texts.items()
        }
        for pieces_of_parts in parts:
            yield [
                list(chain.from_iterable(next(encoded[literal, continues]) for _, literal, continues in pieces))
                for pieces in pieces_of_parts
            ]

    def continuations(self, texts: Sequence[str], literal: bool = True) -> list[list[int]]:
        """Encodes texts as they are after other text: without the space a tokenizer may put before a text."""
        if not self.anchors:
            return self(texts, literal)
        found: dict[int, list[int]] = {}
        rest: Sequence[int] = range(len(texts))
        for anchor, bare in self.anchors:
            encoded = self([anchor + texts[index] for index in rest], literal)
            # Otherwise the anchor became one token with the beginning of the text.
            found |= {i: ids[len(bare) :] for i, ids in zip(rest, encoded, strict=True) if ids[: len(bare)] == bare}
            rest = [index for index in rest if index not in found]
        if rest:
            logger.warning("the tokenizer puts a space before %d texts that continue another", len(rest))
            found |= zip(rest, self([texts[index] for index in rest], literal), strict=True)
        return [found[index] for index in range(len(texts))]

    @cached_property
    def anchors(self) -> list[Anchor]:
        """Anchors that a text can follow without a space added or lost, the preferred one first.

        Decoding proves them. There are none for a tokenizer that puts no space before a text.
        """
        decode = partial(self._tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        probes = [text for text in PROBES if decode(self([text])[0]).strip() == text.strip()]
        if len(probes) < 2:  # decoding proves nothing here: ids alone decide
            first = ANCHORS[0]
            bare, anchored, plain = self([first, first + "a", "a"])
            return [] if anchored == bare + plain or anchored[: len(bare)] != bare else [(first, bare)]
        alone = self(probes)
        proven = []
        for anchor, bare in zip(ANCHORS, self(ANCHORS), strict=True):
            shown = decode(bare)
            if not bare or shown.strip(" ") != anchor:  # white space that is normalised away, an unknown character
                continue
            expected = [shown + text for text in probes]
            if [decode(bare + ids) for ids in alone] == expected:
                return []
            together = self([anchor + text for text in probes])
            if all(ids[: len(bare)] == bare for ids in together) and [decode(ids) for ids in together] == expected:
                proven.append((anchor, bare))
        if not proven:
            logger.warning(
                "the tokenizer puts a space before every text and none of %s keeps it from that: responses that "
                "continue a word of the prompt begin with a space",
                ", ".join(map(repr, ANCHORS)),
            )
        return proven

    @cached_property
    def start(self) -> list[int]:
        """Ids that the tokenizer puts at the start of a text: none, its beginning-of-sequence token, or several."""
        for text in ("a", "1", "."):
            plain = self([text])[0]
            whole = self._tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
            for start in range(len(whole) - len(plain) + 1):
                if plain and whole[start : start + len(plain)] == plain:
                    return list(whole[:start])
        bos = self._tokenizer.bos_token_id
        return [bos] if bos is not None and whole[:1] == [bos] else []

    @cached_property
    def unknown(self) -> int | None:
        """The token of text that the tokenizer does not know, where it has such text."""
        unknown = self._tokenizer.unk_token_id
        return unknown if any(unknown in ids for ids in self(["\U00012031", "\uf8ff", "\u2fd5"])) else None
