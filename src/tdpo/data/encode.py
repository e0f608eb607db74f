"""Encodes plain text without the tokenizer's start and end tokens and without its truncation and padding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any


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


def _spec(tokenizer: Any) -> str | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    if backend.truncation is not None or backend.padding is not None:
        backend = type(backend).from_str(backend.to_str())
        backend.no_truncation()
        backend.no_padding()
    return backend.to_str()
