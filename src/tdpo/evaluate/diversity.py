"""Diversity of responses: distinct n-grams, self-BLEU and compression ratio, at matched length and number.

Each of these depends on the length and the number of responses, so sets are compared on the first tokens of the same
number of responses.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from tdpo.evaluate.estimates import Estimate

SELF_BLEU_RESPONSES = 32
"""Responses of a set that self-BLEU compares with each other; the cost is quadratic."""


@dataclass(frozen=True)
class Diversity:
    """Diversity of one or more sets of responses, averaged over the sets; see :func:`measure_diversity`.

    Attributes:
        distinct_1: Share of distinct tokens.
        distinct_2: Share of distinct token pairs.
        self_bleu: Mean BLEU-4 of a response with the others of its set as references, 0 to 1; lower is more diverse.
        compression_ratio: Bytes of the texts over their bytes after zlib compression; lower is more diverse.
    """

    distinct_1: Estimate
    distinct_2: Estimate
    self_bleu: Estimate
    compression_ratio: Estimate


def measure_diversity(
    sets: Sequence[Sequence[list[int]]], tokenizer: Any, length: int, responses: int
) -> Diversity | None:
    """Measures diversity on the first ``length`` tokens of the first ``responses`` long enough responses of each set.

    Args:
        sets: Token ids of responses: one set of all samples, or a set for each prompt.
        tokenizer: Decodes the tokens for self-BLEU and the compression ratio, which compare texts.
        length: Tokens used of a response; shorter responses are skipped.
        responses: Responses used of a set, at least 2; smaller sets are skipped.

    Returns:
        Means over the sets, with intervals if there are several; None if no set is large enough.
    """
    matched = [[ids[:length] for ids in found if len(ids) >= length][:responses] for found in sets]
    matched = [found for found in matched if len(found) == responses and responses > 1]
    if not matched:
        return None
    texts = [[tokenizer.decode(ids, skip_special_tokens=True) for ids in found] for found in matched]
    return Diversity(
        Estimate.of([distinct_n(found, 1) for found in matched]),
        Estimate.of([distinct_n(found, 2) for found in matched]),
        Estimate.of([self_bleu(found) for found in texts]),
        Estimate.of([compression_ratio(found) for found in texts]),
    )


def distinct_n(sequences: Sequence[Sequence[Hashable]], n: int) -> float:
    """Computes the share of distinct n-grams of a set of sequences (Li et al. 2016, arXiv 1510.03055).

    It decreases with the size of the set, so compare sets of equal size. NaN if no sequence has n items.

    Examples:
        >>> distinct_n([["a", "b", "a", "b"]], 1), round(distinct_n([["a", "b", "a", "b"]], 2), 3)
        (0.5, 0.667)
    """
    grams = [tuple(s[i : i + n]) for s in sequences for i in range(len(s) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def self_bleu(texts: Sequence[str]) -> float:
    """Computes the mean BLEU-4 of each text with the others as references (Zhu et al. 2018, arXiv 1802.01886).

    Sentence BLEU of sacrebleu, with its tokenisation and exponential smoothing, over at most
    :data:`SELF_BLEU_RESPONSES` texts.

    Examples:
        >>> round(self_bleu(["the plot was never dull", "the plot was never dull"]), 6)
        1.0
    """
    from sacrebleu.metrics.bleu import BLEU  # takes a second to import

    texts, bleu = texts[:SELF_BLEU_RESPONSES], BLEU(effective_order=True)
    scores = [
        bleu.sentence_score(text, [other for j, other in enumerate(texts) if j != i]).score
        for i, text in enumerate(texts)
    ]
    return sum(scores) / len(scores) / 100


def compression_ratio(texts: Sequence[str]) -> float:
    """Computes bytes over compressed bytes of the texts, one per line (Shaib et al. 2024, arXiv 2403.00553).

    Examples:
        >>> compression_ratio(["abcdefgh"] * 100) > 20
        True
    """
    raw = "\n".join(texts).encode()
    return len(raw) / len(zlib.compress(raw, 9))
