"""Recognises data of other kinds than preference pairs, for messages that say how to convert them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tdpo.data.formats.prompts import has_prompt

ANSWERS = ("completion", "response", "output", "answer", "solution")
LABELS = ("label", "kto_tag", "is_safe")
"""Columns that label a single response as good or bad: TRL's, LLaMA-Factory's and BeaverTails'."""


def refusal(fields: dict[str, Any]) -> str | None:
    """Names the kind of a row that no format of pairs recognises and says how to convert it; None if it is unknown."""
    return next((f"{kind}; {remedy(fields)}" for kind, recognises, remedy in KINDS if recognises(fields)), None)


def _answered(fields: dict[str, Any]) -> bool:
    return has_prompt(fields) and any(isinstance(fields.get(name), str | list) for name in ANSWERS)


def _is_unpaired(fields: dict[str, Any]) -> bool:
    label = next((fields[name] for name in LABELS if name in fields), None)
    return _answered(fields) and (label in (0, 1) or str(label).lower() in ("true", "false"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _pair_unpaired(fields: dict[str, Any]) -> str:
    if _is_number(fields.get("label")):
        return f"{_renamed(fields, 'label')} pairs the good with the bad responses of each prompt"
    return (
        "a pair needs a good and a bad response to one prompt: write the label as a number, 1 or 0, in a column "
        "'reward' beside 'prompt' and 'completion' (the format scored), which pairs the responses of each prompt"
    )


def _pair_rated(fields: dict[str, Any]) -> str:
    names = [name for name, value in fields.items() if _is_number(value)]
    others = f" (there are {', '.join(map(repr, names))})" if names[1:] else ""
    return f"{_renamed(fields, names[0])} pairs the responses of each prompt by the rating {names[0]!r}{others}"


def _renamed(fields: dict[str, Any], rating: str) -> str:
    """Returns the option that makes rows of the format scored of them."""
    answer = next(name for name in ANSWERS if name in fields)
    return f"--columns reward={rating}" + ("" if answer in ANSWERS[:2] else f",completion={answer}")


FUNCTION = "--dataset_format module:function converts them, with def function(row): "
PAIR_ARENA = (
    "p, a, b = (json.loads(row[name])[-1] for name in ('prompt', 'response_a', 'response_b')); "
    "return None if row['winner_tie'] else {'prompt': p, 'response_a': a, 'response_b': b, "
    "'winner': 'a' if row['winner_model_a'] else 'b'}"
)
PAIR_WEBGPT = (
    "return {**{name: row[name] for name in ('answer_0', 'answer_1', 'score_0', 'score_1')}, "
    "'question': row['question']['full_text']}"
)
PAIR_COMPARISON = (
    "two = [s['text'] for s in row['summaries']]; return {'prompt': row['info']['post'] + '\\n\\nTL;DR:', "
    "'chosen': two[row['choice']], 'rejected': two[1 - row['choice']]}"
)
KINDS: tuple[tuple[str, Callable[[dict[str, Any]], bool], Callable[[dict[str, Any]], str]], ...] = (
    (
        "votes between two conversations (lmsys arena) with turns as JSON",
        lambda fields: {"winner_model_a", "winner_model_b"} <= fields.keys(),
        lambda fields: FUNCTION + PAIR_ARENA,
    ),
    (
        "comparisons of answers to questions that are objects (webgpt_comparisons)",
        lambda fields: isinstance(fields.get("question"), dict) and {"answer_0", "answer_1"} <= fields.keys(),
        lambda fields: FUNCTION + PAIR_WEBGPT,
    ),
    (
        "comparisons of summaries (summarize_from_feedback)",
        lambda fields: {"info", "summaries", "choice"} <= fields.keys(),
        lambda fields: FUNCTION + PAIR_COMPARISON,
    ),
    (
        "labels of single steps (stepwise supervision)",
        lambda fields: all(isinstance(fields.get(name), list) for name in ("completions", "labels")),
        lambda fields: "there are no two responses to pair",
    ),
    ("unpaired labels (KTO): one response a row, good or bad", _is_unpaired, _pair_unpaired),
    (
        "ratings of single responses",
        lambda fields: _answered(fields) and any(map(_is_number, fields.values())),
        _pair_rated,
    ),
    (
        "supervised rows without a rejected response",
        lambda fields: "messages" in fields or _answered(fields),
        lambda fields: "tdpo sft trains on them",
    ),
)
"""Each kind with its recognition and the way to make pairs of it."""
