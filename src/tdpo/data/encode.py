"""From plain text to ids, word by word: equal to the tokenizer, and several times as fast where that can be proven.

A byte-level BPE tokenizer cuts a text into words by one regular expression and encodes every word alone, so a word
needs to be encoded only once however often it occurs. That holds for tokenizers whose steps are known
(:func:`word_pattern`), for characters that a probe finds in the same class on both sides, and is compared with the
tokenizer itself on samples of what is encoded. Everything else goes through the tokenizer's own batches.
"""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import regex

logger = logging.getLogger("tdpo")

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What a ``ByteLevel`` pre-tokenizer with ``use_regex`` cuts by."""
CL100K_START = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
CL100K_END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPACED = (
    GPT2_WORDS,
    rf"{CL100K_START}|\p{{N}}{{1,3}}|{CL100K_END}",
    rf"{CL100K_START}|\p{{N}}|{CL100K_END}",
)
"""Expressions (of GPT-2, Llama 3, Qwen 2) in which a space between two characters that are none begins a word."""
BETWEEN = re.compile(r"(?<=\S) (?=\S)")
PROBE = "a{0}a {0} 1{0}1\n{0}\n\n{0}{0}  {0}!{0}.'{0}'{0}s\t{0}"
"""Texts that show a character's class: cut the same way on both sides, or the character is not trusted."""
WORDS_KEPT = 1 << 20
"""Words remembered at most; then the memory starts anew."""
LONG_WORD = 64
"""Longer words are seldom met again and not remembered."""
SAMPLED = 512
"""One text in so many is encoded by the tokenizer too, and compared."""


class TextEncoder:
    """Encodes texts with a transformers tokenizer, without its start and end tokens.

    Args:
        tokenizer: Any transformers tokenizer; one with a fast backend is encoded on a private copy of it.

    Attributes:
        spec: The backend as ``tokenizer.json`` holds it, without truncation and padding; None if there is none.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.spec = _spec(tokenizer)
        self._seen = 0

    @cached_property
    def _backend(self) -> Any:
        """A copy free of everyone else's settings."""
        return None if self.spec is None else type(self._tokenizer.backend_tokenizer).from_str(self.spec)

    @cached_property
    def _words(self) -> _Words | None:
        return None if self.spec is None else _Words.of(self._backend, json.loads(self.spec))

    def __call__(self, texts: Sequence[str], literal: bool = True) -> list[list[int]]:
        """Ids of texts.

        Args:
            texts: Texts, of any length.
            literal: Encodes special-token text as the characters it is made of.
        """
        if self._backend is None:
            return self._by_tokenizer(texts, literal)
        words = self._words
        found = [None if words is None else words.encode(text, literal) for text in texts]
        rest = [place for place, ids in enumerate(found) if ids is None]
        for place, ids in zip(rest, self._by_backend([texts[place] for place in rest], literal), strict=True):
            found[place] = ids
        if words is not None and not self._agrees(texts, found, literal):
            self._words = None
            return self(texts, literal)
        return found  # type: ignore[return-value]

    def _by_tokenizer(self, texts: Sequence[str], literal: bool) -> list[list[int]]:
        if not texts:
            return []
        told = self._tokenizer(list(texts), add_special_tokens=False, split_special_tokens=literal, verbose=False)
        return told["input_ids"]

    def _by_backend(self, texts: Sequence[str], literal: bool) -> list[list[int]]:
        self._backend.encode_special_tokens = literal
        return [encoded.ids for encoded in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _agrees(self, texts: Sequence[str], found: Sequence[list[int] | None], literal: bool) -> bool:
        """Whether the tokenizer gives the same on a sample; the first text of all is always in it."""
        first = -self._seen % SAMPLED
        self._seen += len(texts)
        sample = range(first, len(texts), SAMPLED)
        if self._by_backend([texts[place] for place in sample], literal) == [found[place] for place in sample]:
            return True
        logger.warning("word by word this tokenizer gives other ids than on whole texts; texts are encoded whole")
        return False


class _Words:
    """The words of one tokenizer and their ids, as far as they were met."""

    def __init__(self, backend: Any, pattern: str, normalizes: bool, added: Sequence[dict[str, Any]]) -> None:
        self._backend, self._model, self._normalizes = backend, backend.model, normalizes
        self._cut = regex.compile(pattern).findall
        self._spaced = pattern in SPACED
        self._ids: dict[str, tuple[int, ...]] = {}
        self._after_space: dict[str, tuple[int, ...]] = {}
        self._at_start: dict[str, tuple[int, ...]] = {"": ()}
        self._ascii = False
        self._trusted: set[str] = set()
        self._distrusted: set[str] = set()
        self._special = {token["content"]: token["id"] for token in added if token["special"]}
        self._added = {token["content"]: token["id"] for token in added}
        # The tokenizer looks for added tokens in the raw text first, then for the others in what is left.
        stages = [[t["content"] for t in added if t["normalized"] is normalized] for normalized in (False, True)]
        self._stages = [({c[:2] for c in contents}, _longest_first(contents)) for contents in stages if contents]
        self._hints = {token["content"][:2] for token in added}
        self._ascii = all(self._trusts(chr(code)) for code in range(128))

    @classmethod
    def of(cls, backend: Any, spec: dict[str, Any]) -> _Words | None:
        """The words of a tokenizer, or None where it is not known to encode them one by one."""
        pattern, added = word_pattern(spec), spec["added_tokens"]
        plain = all(not (token["lstrip"] or token["rstrip"] or token["single_word"]) for token in added)
        if pattern is None or not plain:
            return None
        try:
            return cls(backend, pattern, spec["normalizer"] is not None, added)
        except regex.error:
            return None

    def encode(self, text: str, literal: bool) -> list[int] | None:
        """The ids of a text, or None if it holds a character that is not trusted."""
        if not self._trusts(text):
            return None
        if not any(hint in text for hint in self._hints):
            return self._plain(text)
        ids: list[int] = []
        for piece, token in self._pieces(text, literal):
            ids += self._plain(piece) if token is None else [token]
        return ids

    def _plain(self, text: str) -> list[int]:
        """Ids of a text without added tokens.

        Where words begin at single spaces, what stands between two of them is looked up in one go. Only chunks that
        begin and end with something else are ever kept, so a text with other white space beside a space misses.
        """
        if not self._spaced:
            return self._by_words(text)
        first, *chunks = text.split(" ")
        try:
            return list(chain(self._at_start[first], *map(self._after_space.__getitem__, chunks)))
        except KeyError:
            first, *chunks = BETWEEN.split(text)
        ids = list(self._at_start.get(first) or self._learn_chunk(first, self._at_start, ""))
        for chunk in chunks:
            ids += self._after_space.get(chunk) or self._learn_chunk(chunk, self._after_space, " ")
        return ids

    def _by_words(self, text: str) -> list[int]:
        words, known = self._cut(text), self._ids
        try:
            return list(chain.from_iterable(map(known.__getitem__, words)))
        except KeyError:
            return list(chain.from_iterable([known.get(word) or self._learn(word) for word in words]))

    def _learn_chunk(self, chunk: str, known: dict[str, tuple[int, ...]], before: str) -> tuple[int, ...]:
        ids = tuple(self._by_words(before + chunk))
        if len(known) >= WORDS_KEPT:
            known.clear()
        if len(chunk) <= LONG_WORD and not chunk[-1:].isspace():
            known[chunk] = ids
        return ids

    def _learn(self, word: str) -> tuple[int, ...]:
        ids = tuple(token.id for token in self._model.tokenize(_as_bytes(word)))
        if len(self._ids) >= WORDS_KEPT:
            self._ids.clear()
        if len(word) <= LONG_WORD:
            self._ids[word] = ids
        return ids

    def _trusts(self, text: str) -> bool:
        if self._ascii and text.isascii():
            return True
        characters = set(text)
        if not characters <= self._trusted:
            for character in characters - self._trusted - self._distrusted:
                (self._trusted if self._same_class(character) else self._distrusted).add(character)
            if not characters <= self._trusted:
                return False
        return not self._normalizes or unicodedata.is_normalized("NFC", text)

    def _same_class(self, character: str) -> bool:
        if "\ud800" <= character <= "\udfff":
            return False
        probe = PROBE.format(character)
        theirs = [piece for piece, _ in self._backend.pre_tokenizer.pre_tokenize_str(probe)]
        return theirs == [_as_bytes(word) for word in self._cut(probe)]

    def _pieces(self, text: str, literal: bool) -> Iterator[tuple[str, int | None]]:
        """The text in pieces: plain ones (token None), and added tokens."""
        pieces: list[tuple[str, int | None]] = [(text, None)]
        for hints, stage in self._stages:
            if any(hint in text for hint in hints):
                pieces = [part for piece in pieces for part in self._split(piece, stage, literal)]
        return iter(pieces)

    def _split(self, piece: tuple[str, int | None], stage: Any, literal: bool) -> Iterator[tuple[str, int | None]]:
        text, token = piece
        if token is not None:
            yield piece
            return
        start = 0
        for match in stage.finditer(text):
            if literal and match[0] in self._special:
                continue
            if match.start() > start:
                yield text[start : match.start()], None
            yield match[0], self._added[match[0]]
            start = match.end()
        if start < len(text):
            yield text[start:], None


def word_pattern(spec: dict[str, Any]) -> str | None:
    r"""The regular expression by which a tokenizer cuts words, if it encodes every word alone and by bytes.

    Args:
        spec: A tokenizer as ``tokenizer.json`` holds it.

    Example:
        >>> spec = {"normalizer": None, "model": {"type": "BPE", "dropout": None}}
        >>> split = {"type": "Split", "pattern": {"Regex": r"\\S+|\\s+"}, "behavior": "Isolated", "invert": False}
        >>> bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        >>> pre = {"type": "Sequence", "pretokenizers": [split, bytes_only]}
        >>> word_pattern({**spec, "pre_tokenizer": pre})
        '\\\\S+|\\\\s+'
        >>> word_pattern({**spec, "pre_tokenizer": {"type": "Metaspace"}}) is None
        True
    """
    model, normalizer = spec["model"], spec["normalizer"]
    if model["type"] != "BPE" or model.get("dropout") or (normalizer and normalizer["type"] != "NFC"):
        return None
    steps = spec["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if len(steps) == 1:
        return GPT2_WORDS if last["use_regex"] else None
    first = steps[0]
    by_regex = first["type"] == "Split" and first["behavior"] == "Isolated" and not first["invert"]
    if len(steps) != 2 or last["use_regex"] or not by_regex:
        return None
    return first["pattern"].get("Regex")


def _spec(tokenizer: Any) -> str | None:
    """The tokenizer's backend as ``tokenizer.json`` holds it, without truncation and padding; None if it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    if backend.truncation is not None or backend.padding is not None:
        backend = type(backend).from_str(backend.to_str())
        backend.no_truncation()
        backend.no_padding()
    return backend.to_str()


def _longest_first(contents: Sequence[str]) -> Any:
    return re.compile("|".join(re.escape(content) for content in sorted(contents, key=len, reverse=True)))


def _byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in a byte-level vocabulary, by the byte's value."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}


_LETTERS = _byte_letters()


def _as_bytes(word: str) -> str:
    """A word in the letters of a byte-level vocabulary."""
    return word.encode().decode("latin-1").translate(_LETTERS)
