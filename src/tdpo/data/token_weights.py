"""Weights of response tokens that pairs carry, read from the columns of a dataset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tdpo.data.formats.report import RowError
from tdpo.data.sources import describe
from tdpo.data.token_texts import token_ends
from tdpo.types import LARGEST_WEIGHT, TokenisedPair, wrong_weights


def token_weights(value: Any, name: str, ids: Sequence[int], text: str, decode: Callable[..., str]) -> list[float]:
    """Reads the weights of a response's tokens from its column.

    Args:
        value: One number per token (the end token may be left out, and gets 1), or ``[start, end, weight]`` for spans
            of characters. A token has the weight of the span with its first character that is not white space, and 1
            outside of all spans.
        name: The column, for messages.
        ids: The response, end token included.
        text: Its text, in which spans count.
        decode: The tokenizer's.

    Raises:
        RowError: for anything else, and for weights that are negative, not finite or all 0.
    """
    if not isinstance(value, list) or not value:
        raise RowError(f"field {name!r} must list numbers or [start, end, weight], found {describe(value)}")
    if all(isinstance(span, list) for span in value):
        weights = _weights_of_spans(value, name, ids, text, decode)
    elif all(isinstance(number, int | float) for number in value):
        weights = value + ([1.0] if len(value) == len(ids) - 1 else [])
    else:
        raise RowError(f"field {name!r} must list numbers alone or [start, end, weight] alone")
    if wrong := wrong_weights(weights, len(ids)):
        raise RowError(f"field {name!r} {wrong}")
    return list(map(float, weights))


def _weights_of_spans(
    spans: list[list[Any]], name: str, ids: Sequence[int], text: str, decode: Callable[..., str]
) -> list[float]:
    for number, span in enumerate(spans, 1):
        if len(span) != 3 or not all(isinstance(part, int | float) for part in span):
            raise RowError(f"field {name!r}, span {number}: expected [start, end, weight], found {describe(span)}")
        if not 0 <= span[0] < span[1] <= len(text):
            raise RowError(f"field {name!r}, span {number}: {span[0]} to {span[1]} of a text of {len(text)} characters")
        if not 0 <= span[2] <= LARGEST_WEIGHT:
            raise RowError(f"field {name!r}, span {number}: a weight is a finite number of at least 0, found {span[2]}")
    shown = partial(decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    offset = shown(list(ids)).rfind(text.strip())  # of a chat the last message
    if offset < 0:
        raise RowError(f"field {name!r}: the tokens do not spell the text, so give one number per token instead")
    offset -= len(text) - len(text.lstrip())
    ends = [0, *token_ends(ids, decode)]
    weights = []
    for begin, end in pairwise(ends):
        begin, end = max(begin - offset, 0), end - offset
        first = next((index for index in range(begin, min(end, len(text))) if not text[index].isspace()), begin)
        inside = end > begin and first < len(text)
        weights.append(next((float(w) for start, stop, w in spans if inside and start <= first < stop), 1.0))
    return weights


def carried_weights(pairs: Sequence[TokenisedPair]) -> Tensor | None:
    """Returns the weights that pairs carry, ``[2, N]`` float32: on log-ratio and KL; None if no pair has any.

    Examples:
        >>> pair = TokenisedPair([1], [2, 3], [4], chosen_weights=[0.5, 2.0], rejected_kl_weights=[3.0])
        >>> carried_weights([pair]).tolist()
        [[0.5, 2.0, 1.0], [1.0, 1.0, 3.0]]
    """
    rows: list[list[float]] = [[], []]
    found = False
    for pair in pairs:
        for ids, *both in (
            (pair.chosen_ids, pair.chosen_weights, pair.chosen_kl_weights),
            (pair.rejected_ids, pair.rejected_weights, pair.rejected_kl_weights),
        ):
            for row, weights in zip(rows, both, strict=True):
                found |= weights is not None
                row += [1.0] * len(ids) if weights is None else weights
    return torch.tensor(rows) if found else None
