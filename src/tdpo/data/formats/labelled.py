"""Two responses in two columns, and a label, a strength or two ratings that say which is the better one."""

from __future__ import annotations

from typing import Any

from tdpo.data.formats.fields import as_text, field_of, first_of, is_chat, number
from tdpo.data.formats.prompts import PROMPT_USES, has_prompt, holds_turns, pair_record, prompt_of
from tdpo.data.formats.report import RowDropped, RowError
from tdpo.data.row_spec import RowSpec
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
    "tie",
    "tie (bothbad)",
    "tie (both bad)",
    "bothbad",
    "both_bad",
    "both bad",
    "both_good",
    "both good",
    "neither",
)
PAIRS = tuple((stem + first, stem + second) for stem in STEMS for first, second in SUFFIXES)
LABELLED_USES = (
    *PROMPT_USES,
    tuple("+".join(pair) for pair in PAIRS),
    (*LABELS, *STRENGTHS, *(f"{name}{a}+{name}{b}" for name in RATINGS for a, b in SUFFIXES)),
)


def labelled(row: SourceRow, reading: RowSpec) -> list[PreferenceRecord]:
    """Reads two responses and what says which is better.

    ``better_response_id``, ``preference``, ``winner`` and ``choice`` name the better one by the end of its column's
    name (``0``, ``1``, ``a``), by the whole name, or as ``model_a``; ``preference_strength`` and ``overall_preference``
    are below zero where it is the first; of two ratings the larger one is better.
    """
    names = _pair_names(row.fields) or (f"{STEMS[0]}{SUFFIXES[0][0]}", f"{STEMS[0]}{SUFFIXES[0][1]}")
    first, second = (as_text(field_of(row, name), f"field {name!r}") for name in names)
    chosen, rejected = (first, second) if _first_is_better(row, names) else (second, first)
    chats = is_chat(first) and is_chat(second) and not has_prompt(row.fields)
    return [pair_record(row, None if chats else prompt_of(row), chosen, rejected)]


def has_labelled_pair(fields: dict[str, Any]) -> bool:
    """Returns whether a row is one of :func:`labelled`."""
    names = _pair_names(fields)
    if isinstance(fields.get("question"), dict):  # webgpt_comparisons
        return False
    if names is None or not (has_prompt(fields) or all(holds_turns(fields[name]) for name in names)):
        return False
    return (
        any(fields.get(name) is not None for name in (*LABELS, *STRENGTHS)) or _rating_names(fields, names) is not None
    )


def _pair_names(fields: dict[str, Any]) -> tuple[str, str] | None:
    return next((pair for pair in PAIRS if pair[0] in fields and pair[1] in fields), None)


def _ends(names: tuple[str, str]) -> tuple[str, str]:
    stem = next(stem for stem in STEMS if names[0].startswith(stem))
    return names[0].removeprefix(stem), names[1].removeprefix(stem)


def _rating_names(fields: dict[str, Any], names: tuple[str, str]) -> tuple[str, str] | None:
    ends = _ends(names)
    found = [(f"{name}{ends[0]}", f"{name}{ends[1]}") for name in RATINGS]
    return next((pair for pair in found if pair[0] in fields and pair[1] in fields), None)


def _first_is_better(row: SourceRow, names: tuple[str, str]) -> bool:
    """Reads which response is better.

    Raises:
        RowDropped: if neither is.
        RowError: for a label that names neither.
    """
    label = first_of(row.fields, (*LABELS, *STRENGTHS))
    if row.fields.get(label) is None:
        ratings = _rating_names(row.fields, names)
        if ratings is None:
            raise RowError(f"field {label!r} is missing, which says the better of {names[0]!r} and {names[1]!r}")
        first, second = (number(field_of(row, name), f"field {name!r}") for name in ratings)
        difference = first - second
    elif label in STRENGTHS:
        difference = -number(row.fields[label], f"field {label!r}")
    else:
        return _named_side(row.fields[label], label, names) == 0
    if difference == 0:
        raise RowDropped("neither response is the better one")
    return difference > 0


def _named_side(value: Any, label: str, names: tuple[str, str]) -> int:
    """Returns which of two columns a label names: 0 or 1."""
    ends = [end.strip("_").lower() for end in _ends(names)]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    said = "" if isinstance(value, bool) else str(value).strip().lower()
    if said in TIES or (ends == ["1", "2"] and said == "1.5"):
        raise RowDropped("neither response is the better one")
    for side, (end, name) in enumerate(zip(ends, names, strict=True)):
        if said in (end, name.lower(), f"model_{end}"):
            return side
    raise RowError(
        f"field {label!r} must name the better response: {ends[0]} for {names[0]!r}, {ends[1]} for {names[1]!r} "
        f"or tie, found {describe(value)}"
    )
