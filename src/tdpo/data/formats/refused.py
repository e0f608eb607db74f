"""Recognises data of other kinds than preference pairs, for messages that say how to convert them."""

from __future__ import annotations

from typing import Any

from tdpo.data.formats.prompts import has_prompt

ANSWERS = ("completion", "response", "output", "answer", "solution")
LABELS = ("label", "kto_tag", "is_safe")
"""Columns that label a single response as good or bad: TRL's, LLaMA-Factory's and BeaverTails'."""
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


def refusal(fields: dict[str, Any]) -> str | None:
    """Names the kind of a row that no format of pairs recognises and says how to convert it; None if it is unknown."""
    if {"winner_model_a", "winner_model_b"} <= fields.keys():
        return f"votes between two conversations (lmsys arena) with turns as JSON; {FUNCTION}{PAIR_ARENA}"
    if isinstance(fields.get("question"), dict) and {"answer_0", "answer_1"} <= fields.keys():
        return f"comparisons of answers to questions that are objects (webgpt_comparisons); {FUNCTION}{PAIR_WEBGPT}"
    if {"info", "summaries", "choice"} <= fields.keys():
        return f"comparisons of summaries (summarize_from_feedback); {FUNCTION}{PAIR_COMPARISON}"
    if all(isinstance(fields.get(name), list) for name in ("completions", "labels")):
        return "labels of single steps (stepwise supervision); there are no two responses to pair"
    answer = next((name for name in ANSWERS if isinstance(fields.get(name), str | list)), None)
    if answer is None or not has_prompt(fields):
        return "supervised rows without a rejected response; tdpo sft trains on them" if "messages" in fields else None
    renaming = "" if answer in ANSWERS[:2] else f",completion={answer}"
    ratings = [n for n, value in fields.items() if isinstance(value, int | float) and not isinstance(value, bool)]
    label = next((fields[name] for name in LABELS if name in fields), None)
    if label in (0, 1) or str(label).lower() in ("true", "false"):
        remedy = (
            "a pair needs a good and a bad response to one prompt: write the label as a number, 1 or 0, in a column "
            "'reward' beside 'prompt' and 'completion' (the format scored), which pairs the responses of each prompt"
        )
        if "label" in ratings:
            remedy = f"--columns reward=label{renaming} pairs the good with the bad responses of each prompt"
        return f"unpaired labels (KTO): one response a row, good or bad; {remedy}"
    if ratings:
        others = f" (there are {', '.join(map(repr, ratings))})" if ratings[1:] else ""
        remedy = f"--columns reward={ratings[0]}{renaming} pairs the responses of each prompt by the rating"
        return f"ratings of single responses; {remedy} {ratings[0]!r}{others}"
    return "supervised rows without a rejected response; tdpo sft trains on them"
