"""Two responses in two columns, and a label, a strength or two ratings that say which is the better one."""

from __future__ import annotations

from typing import Any

from tdpo.config.row_spec import RowSpec
from tdpo.data.formats.fields import field_of, first_of, number
from tdpo.data.formats.prompts import PROMPT_USES, has_prompt, holds_turns, pair_record, prompt_of
from tdpo.data.formats.report import RowDropped, RowError
from tdpo.data.sources import SourceRow, describe
from tdpo.types import PreferenceRecord

STEMS = ("response", "output", "answer", "completion", "generation", "conversation")
SUFFIXES = (("_0", "_1"), ("_1", "_2"), ("_a", "_b"), ("_A", "_B"), ("1", "2"))
LABELS = ("better_response_id", "preference", "winner", "choice")
"""Columns that name the better response: PKU-SafeRLHF's, AlpacaFarm's, Chatbot Arena's, and one more."""
STRENGTHS = ("preference_strength", "overall_preference")
"""HelpSteer's columns: below zero the first response is better, above zero the second."""
RATINGS = ("score", "rating", "reward")
TIES = (
    "tie", "tie (bothbad)", "tie (both bad)", "bothbad", "both_bad", "both bad", "both_good", "both good", "neither",
)  # fmt: skip
PAIRS = tuple((stem, suffixes) for stem in STEMS for suffixes in SUFFIXES)
LABELLED_USES = (
    *PROMPT_USES,
    tuple(f"{stem}{a}+{stem}{b}" for stem, (a, b) in PAIRS),
    (*LABELS, *STRENGTHS, *(f"{name}{a}+{name}{b}" for name in RATINGS for a, b in SUFFIXES)),
)


def labelled(row: SourceRow, spec: RowSpec) -> list[PreferenceRecord]:
    """Reads two responses and which of them is better.

    ``better_response_id``, ``preference``, ``winner`` and ``choice`` name the better one by the end of its column's
    name (``0``, ``1``, ``a``), by the whole name, or as ``model_a``; ``preference_strength`` and ``overall_preference``
    are below zero where it is the first; of two ratings the larger one is better.
    """
    stem, ends = _pair_of(row.fields) or PAIRS[0]
    sides = [field_of(row, stem + end) for end in ends]
    lead = _lead_of_first(row, stem, ends)
    if lead == 0:
        raise RowDropped("neither response is the better one")
    chats = all(isinstance(side, list) for side in sides) and not has_prompt(row.fields)
    return [pair_record(row, None if chats else prompt_of(row), *(sides if lead > 0 else reversed(sides)))]


def has_labelled_pair(fields: dict[str, Any]) -> bool:
    """Returns whether a row has two responses to a prompt and the better one's label."""
    stem, ends = _pair_of(fields) or ("", ("", ""))
    if not stem or isinstance(fields.get("question"), dict):  # as in webgpt_comparisons
        return False
    prompted = has_prompt(fields) or all(holds_turns(fields[stem + end]) for end in ends)
    labelled = any(fields.get(name) is not None for name in (*LABELS, *STRENGTHS))
    return prompted and (labelled or _rating_of(fields, ends) is not None)


def _pair_of(fields: dict[str, Any]) -> tuple[str, tuple[str, str]] | None:
    """Finds two columns of responses, as the beginning and the two ends of their names."""
    return next((pair for pair in PAIRS if all(pair[0] + end in fields for end in pair[1])), None)


def _rating_of(fields: dict[str, Any], ends: tuple[str, str]) -> str | None:
    return next((name for name in RATINGS if all(name + end in fields for end in ends)), None)


def _lead_of_first(row: SourceRow, stem: str, ends: tuple[str, str]) -> float:
    """Returns a number above zero where the first response is better, below where the second is, and 0 for a tie.

    Raises:
        RowError: for a label that names neither.
    """
    label = first_of(row.fields, (*LABELS, *STRENGTHS))
    value = row.fields.get(label)
    if value is None:
        rating = _rating_of(row.fields, ends)
        if rating is None:
            names = " and ".join(repr(stem + end) for end in ends)
            raise RowError(f"field {label!r} is missing, which says the better of {names}")
        first, second = (field_of(row, rating + end, number) for end in ends)
        return first - second
    if label in STRENGTHS:
        return -number(value, f"field {label!r}")
    short = [end.strip("_").lower() for end in ends]
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    given = "" if isinstance(value, bool) else str(value).strip().lower()
    if given in TIES or (short == ["1", "2"] and given == "1.5"):
        return 0
    for sign, end, suffix in zip((1, -1), short, ends, strict=True):
        if given in (end, (stem + suffix).lower(), f"model_{end}"):
            return sign
    raise RowError(
        f"field {label!r} must name the better response: {short[0]} for {stem + ends[0]!r}, {short[1]} for "
        f"{stem + ends[1]!r} or tie, found {describe(value)}"
    )
