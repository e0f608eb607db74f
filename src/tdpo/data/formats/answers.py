"""Several answers to a prompt, scored or ranked, and the pairs they make."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tdpo.data.formats.fields import (
    as_text,
    chat_options,
    check_kinds,
    checked,
    field_of,
    first_of,
    is_chat,
    is_empty,
    number,
    plain_text,
)
from tdpo.data.formats.markup import html_to_text
from tdpo.data.formats.prompts import (
    PROMPT_USES,
    assistant_turn,
    check_placeholders,
    has_prompt,
    prompt_of,
    with_system,
)
from tdpo.data.formats.report import DataReport, RowDropped, RowError
from tdpo.data.row_spec import SHP_SCORE_RATIO, RowSpec
from tdpo.data.sources import SourceRow, describe
from tdpo.types import PreferenceRecord, Text

LISTS = ("completions", "responses", "answers", "candidates", "generations")
TEXTS = ("response", "text", "completion", "answer", "content", "output", "generation")
SCORES = ("score", "reward", "rating", "overall_score", "pm_score")
RANKS = ("rank", "ranking")
ANSWER_KEYS = (*TEXTS, *SCORES, *RANKS)
ANSWERS_USES = (*PROMPT_USES, LISTS, tuple(name + "s" for name in SCORES))
RANKED_USES = (*PROMPT_USES, LISTS, tuple(name + "s" for name in RANKS))
SHP_USES = ("history", "human_ref_A", "human_ref_B", "score_A", "score_B", "labels")
COMPLETION_USES = (*PROMPT_USES, ("completion", "response"), ("reward", "score"))


@dataclass(frozen=True)
class Answer:
    """One answer with its score, the larger the better, and where it stands."""

    text: Text
    score: float
    source: str
    row: int


@dataclass(frozen=True)
class Completion(Answer):
    """An answer whose row holds nothing but it and its prompt; ``group`` tells the prompt from any other."""

    prompt: Text
    group: str
    options: dict[str, Any]


def answers(row: SourceRow, reading: RowSpec) -> list[PreferenceRecord]:
    """UltraFeedback's shape: a prompt and a list of answers with scores, in objects or in a list beside it."""
    return _ranked_records(row, prompt_of(row), _listed(row, SCORES, "score", lambda score: score), reading)


def ranked(row: SourceRow, reading: RowSpec) -> list[PreferenceRecord]:
    """A prompt and a list of answers with ranks from 1, the best, or without any, and then the best first."""
    return _ranked_records(row, prompt_of(row), _listed(row, RANKS, "rank", lambda rank: -rank), reading)


def stackexchange(row: SourceRow, reading: RowSpec) -> list[PreferenceRecord]:
    """StackExchange preferences: ``question`` and ``answers`` with ``text`` and ``pm_score``, all of it HTML.

    They become dialogues in the words of HH, as in the DPO and TDPO authors' code; code stays as it is.
    """
    question = html_to_text(plain_text(field_of(row, "question"), "field 'question'"))
    if not question:
        raise RowError("field 'question' is empty")
    listed = field_of(row, "answers")
    if not isinstance(listed, list) or not listed:
        raise RowError(f"field 'answers' must be a list of answers, found {describe(listed)}")
    found = []
    for place, entry in enumerate(listed, 1):
        what = f"field 'answers', answer {place}"
        if not isinstance(entry, dict):
            raise RowError(f"{what} must be an object, found {describe(entry)}")
        text = html_to_text(plain_text(entry.get("text"), f"{what}, 'text'"))
        score = entry.get("pm_score")
        if not _is_unusable(row, text, score):
            found.append(Answer(" " + text, number(score, f"{what}, 'pm_score'"), row.source, row.row))
    return pairs(dialogue(question), _any_left(found, row), reading)


def shp(row: SourceRow, reading: RowSpec) -> list[PreferenceRecord]:
    """Stanford Human Preferences: a post in ``history`` and two comments with the scores Reddit gave them.

    Only pairs whose scores stand at least 2 to 1 (``min_score_ratio``) are kept, as in the DPO and TDPO authors' code.
    """
    history = plain_text(field_of(row, "history"), "field 'history'")
    texts = [plain_text(field_of(row, name), f"field {name!r}") for name in ("human_ref_A", "human_ref_B")]
    first, second = (number(field_of(row, name), f"field {name!r}") for name in ("score_A", "score_B"))
    for name, text in (("history", history), ("human_ref_A", texts[0]), ("human_ref_B", texts[1])):
        if not text.strip():
            raise RowError(f"field {name!r} is empty")
    if first == second:
        raise RowDropped("both comments have one score")
    better = _label_agrees(row, first > second)
    high, low = max(first, second), min(first, second)
    least = SHP_SCORE_RATIO if reading.min_score_ratio is None else reading.min_score_ratio
    if low > 0 and high / low < least:
        raise RowDropped(f"score ratio below {least:g}")
    chosen, rejected = (" " + text for text in (texts if better else texts[::-1]))
    return [checked(PreferenceRecord(dialogue(history), chosen, rejected, row.source, row.row))]


def completion(row: SourceRow, reading: RowSpec) -> list[Completion]:
    """One row of scored completions: ``prompt``, ``completion`` (or ``response``) and ``reward`` (or ``score``)."""
    prompt = prompt_of(row)
    text_name, score_name = (first_of(row.fields, names) for names in (("completion", "response"), ("reward", "score")))
    text = as_text(field_of(row, text_name), f"field {text_name!r}")
    prompt, text = with_system(row, prompt, text)
    text = assistant_turn(text) if is_chat(prompt) else text
    check_kinds(prompt=prompt, **{text_name: text})
    if is_empty(text):
        raise RowError(f"field {text_name!r} is an empty response")
    score = number(field_of(row, score_name), f"field {score_name!r}")
    options = chat_options(row, prompt)
    return [
        Completion(text, score, row.source, row.row, prompt, repr((prompt, options) if options else prompt), options)
    ]


def completion_pairs(
    completions: Sequence[Completion], reading: RowSpec, report: DataReport
) -> Iterator[PreferenceRecord]:
    """Pairs of the completions that share their prompt, wherever in the source they stand.

    A pair's row is that of its chosen completion.
    """
    by_prompt: dict[str, list[Completion]] = {}
    for found in completions:
        by_prompt.setdefault(found.group, []).append(found)
    for group in by_prompt.values():
        try:
            yield from pairs(group[0].prompt, group, reading, group[0].options)
        except RowDropped as reason:
            for found in group:
                report.drop(found, "the only completion of its prompt" if len(group) == 1 else str(reason))


def pairs(
    prompt: Text, found: Sequence[Answer], reading: RowSpec, options: dict[str, Any] | None = None
) -> list[PreferenceRecord]:
    """The pairs of some answers to one prompt.

    Args:
        prompt: Their prompt.
        found: The answers in their order.
        reading: Which pairs: all whose scores differ, the best against the worst, or all that differ by a margin.
        options: Further fields of the records.

    Raises:
        RowDropped: if there is no pair among them.
    """
    if reading.pairs_from == "best_worst":
        best = max(found, key=lambda answer: answer.score)
        worst = min(reversed(found), key=lambda answer: answer.score)
        candidates = [(best, worst)] if best.score > worst.score else []
    else:
        least = reading.min_margin or 0.0
        both_ways = itertools.combinations(found, 2)
        ordered = ((one, two) if one.score > two.score else (two, one) for one, two in both_ways)
        candidates = [(one, two) for one, two in ordered if _apart(one.score - two.score, least)]
    differing = [(one, two) for one, two in candidates if one.text != two.text]
    if not differing:
        margin = f" by {reading.min_margin:g} or more" if reading.min_margin else ""
        raise RowDropped("chosen and rejected are identical" if candidates else f"no two scores differ{margin}")
    return [
        checked(PreferenceRecord(prompt, one.text, two.text, one.source, one.row, **(options or {})))
        for one, two in differing
    ]


def dialogue(text: str) -> str:
    """A question as the beginning of a dialogue in the words of HH."""
    return f"\n\nHuman: {text}\n\nAssistant:"


def has_scored_list(fields: dict[str, Any]) -> bool:
    """Whether a row is one of :func:`answers`."""
    return _has_list(fields, SCORES)


def has_ranked_list(fields: dict[str, Any]) -> bool:
    """Whether a row is one of :func:`ranked`."""
    return _has_list(fields, RANKS)


def has_posts(fields: dict[str, Any]) -> bool:
    """Whether a row is one of :func:`stackexchange`."""
    listed = fields.get("answers")
    posts = isinstance(listed, list) and any(isinstance(entry, dict) and "pm_score" in entry for entry in listed)
    return "question" in fields and posts


def has_comments(fields: dict[str, Any]) -> bool:
    """Whether a row is one of :func:`shp`."""
    return {"history", "human_ref_A", "human_ref_B", "score_A", "score_B"} <= fields.keys()


def has_completion(fields: dict[str, Any]) -> bool:
    """Whether a row is one of :func:`completion`."""
    return (
        has_prompt(fields)
        and isinstance(fields.get(first_of(fields, ("completion", "response"))), str | list)
        and bool({"reward", "score"} & fields.keys())
    )


def _ranked_records(row: SourceRow, prompt: Text, found: list[Answer], reading: RowSpec) -> list[PreferenceRecord]:
    """Pairs of a row's answers; to a chat, an answer given as text is the assistant's turn."""
    prompt, *texts = with_system(row, prompt, *(answer.text for answer in _any_left(found, row)))
    if is_chat(prompt):
        texts = [assistant_turn(text) for text in texts]
    for text in texts:
        check_kinds(prompt=prompt, answer=text)
    check_placeholders(prompt)
    made = [Answer(text, answer.score, answer.source, answer.row) for text, answer in zip(texts, found, strict=True)]
    return pairs(prompt, made, reading, chat_options(row, prompt))


def _is_unusable(row: SourceRow, text: Text, figure: Any, name: str = "score") -> bool:
    """Whether an answer is left out, which the report counts: it is empty, or its score is null or a word."""
    if is_empty(text):
        row.notes.append("an empty answer left out")
    elif figure is None or (isinstance(figure, str) and not _is_number(figure)) or figure != figure:
        row.notes.append(f"an answer left out, whose {name} is {'null' if figure is None else describe(figure)}")
    else:
        return False
    return True


def _is_number(figure: str) -> bool:
    try:
        return math.isfinite(float(figure))
    except ValueError:
        return False


def _any_left(found: list[Answer], row: SourceRow) -> list[Answer]:
    if len(found) < 2 and row.notes:
        raise RowDropped(f"fewer than two answers: {row.notes[0]}")
    return found


def _apart(difference: float, least: float) -> bool:
    """Whether scores differ by a margin; 0.3 and 0.1 differ by 0.2, whatever binary fractions say."""
    return difference > 0 and (difference >= least or math.isclose(difference, least, rel_tol=1e-9))


def _label_agrees(row: SourceRow, first_is_better: bool) -> bool:
    """Which comment is better by its score, unless ``labels`` says the opposite."""
    label = row.fields.get("labels")
    if label is None:
        return first_is_better
    said = number(label, "field 'labels'")
    if said not in (0, 1):
        raise RowError(f"field 'labels' must be 1 (A is better) or 0, found {describe(label)}")
    if (said == 1) != first_is_better:
        raise RowError("field 'labels' and the scores contradict each other")
    return first_is_better


def _has_list(fields: dict[str, Any], names: tuple[str, ...]) -> bool:
    """Whether the row has a prompt, and answers with one of some figures, in objects or in a list beside them."""
    if not has_prompt(fields):
        return False
    listed = fields.get(first_of(fields, LISTS))
    if not isinstance(listed, list) or not listed:
        return False
    if isinstance(fields.get(first_of(fields, _plurals(names))), list):
        return True
    return isinstance(listed[0], dict) and any(name in listed[0] for name in names)


def _listed(row: SourceRow, names: tuple[str, ...], figure: str, score_of: Callable[[float], float]) -> list[Answer]:
    """The answers of a row with their scores."""
    name = first_of(row.fields, LISTS)
    listed = field_of(row, name)
    if not isinstance(listed, list) or not listed:
        raise RowError(f"field {name!r} must be a list of answers, found {describe(listed)}")
    beside = _figures_beside(row, name, len(listed), names, figure)
    entries = [entry for entry in listed if isinstance(entry, dict)]
    rated = any(key in entry for entry in entries for key in names)
    missing_text = not entries or any(entry.get(first_of(entry, TEXTS)) is not None for entry in entries)
    found = []
    for place, entry in enumerate(listed, 1):
        what = f"field {name!r}, answer {place}"
        value = entry
        if beside is None or (isinstance(entry, dict) and "role" not in entry):
            if not isinstance(entry, dict):
                raise RowError(f"{what} must be an object with its text and {figure}, found {describe(entry)}")
            value = entry.get(first_of(entry, TEXTS))
        key = first_of(entry, names) if beside is None else ""
        figures = entry.get(key) if beside is None else beside[place - 1]
        text = "" if value is None and missing_text else as_text(value, what)
        if beside is None and key not in entry and not rated:
            raise RowError(f"{what}, its {figure} must be a finite number, found null")
        if not _is_unusable(row, text, figures, figure):
            found.append(Answer(text, score_of(number(figures, f"{what}, its {figure}")), row.source, row.row))
    return found


def _figures_beside(row: SourceRow, name: str, count: int, names: tuple[str, ...], figure: str) -> list[Any] | None:
    """The list of figures beside the answers, or None where the answers are objects that hold them."""
    plural = first_of(row.fields, _plurals(names))
    if plural not in row.fields:
        if figure == "rank" and not any(isinstance(entry, dict) for entry in row.fields[name]):
            return list(range(1, count + 1))
        return None
    figures = row.fields[plural]
    if not isinstance(figures, list) or len(figures) != count:
        raise RowError(f"field {plural!r} must list {count} numbers, one an answer, found {describe(figures)}")
    return figures


def _plurals(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name + "s" for name in names)
