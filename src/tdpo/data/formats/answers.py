"""Several answers to a prompt, scored or ranked, and the pairs they make."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from tdpo.config.row_spec import SHP_SCORE_RATIO, RowSpec
from tdpo.data.formats.fields import (
    as_text,
    chat_options,
    field_of,
    first_of,
    is_empty,
    mixed_kinds,
    number,
    plain_text,
)
from tdpo.data.formats.prompts import check_placeholders, has_prompt, make_record, prompt_of, with_system
from tdpo.data.formats.report import DataReport, RowDropped, RowError
from tdpo.data.sources import SourceRow, describe
from tdpo.types import PreferenceRecord, Text

LISTS = ("completions", "responses", "answers", "candidates", "generations")
TEXTS = ("response", "text", "completion", "answer", "content", "output", "generation")
SCORES = ("score", "reward", "rating", "overall_score", "pm_score")
RANKS = ("rank", "ranking")
BESIDE: dict[tuple[str, ...], tuple[str, ...]] = {
    names: tuple(f"{name}s" for name in names) for names in (SCORES, RANKS)
}
"""Columns that list such figures beside the answers."""
ANSWER_KEYS = (*TEXTS, *SCORES, *RANKS)
SHP_COLUMNS = ("history", "human_ref_A", "human_ref_B", "score_A", "score_B")
COMPLETION_COLUMNS = (("completion", "response"), ("reward", "score"))
Scored = tuple[float, PreferenceRecord]
"""A score, the larger the better, and its answer as the ``chosen`` of a record that has no ``rejected`` yet."""


def listed(row: SourceRow, spec: RowSpec, names: tuple[str, ...]) -> list[PreferenceRecord]:
    """Reads a prompt and a list of answers with scores (UltraFeedback) or ranks, in objects or in a list beside it.

    Ranks begin with 1, the best; without any the best is the first. To a chat, an answer as text is the assistant's.

    Args:
        row: The row.
        spec: The choice of pairs.
        names: :data:`SCORES` or :data:`RANKS`.
    """
    prompt = prompt_of(row)
    found = _read_list(row, names)
    if len(found) < 2 and row.notes and not (found and spec.best_alone):
        raise RowDropped(f"fewer than two answers: {row.notes[0]}")
    return pairs(_scored(row, prompt, found), spec)


def stackexchange(row: SourceRow, spec: RowSpec) -> list[PreferenceRecord]:
    """Reads StackExchange preferences: ``question`` and ``answers`` with ``text`` and ``pm_score``, all of it HTML.

    They become dialogues as HH writes them, as in the DPO and TDPO authors' code; code stays as it is.
    """
    from tdpo.data.formats.markup import html_to_text

    question = html_to_text(field_of(row, "question", plain_text))
    if not question:
        raise RowError("field 'question' is empty")
    answers = field_of(row, "answers", _answer_list)
    for index, entry in enumerate(answers):
        if isinstance(entry, dict):
            text = html_to_text(plain_text(entry.get("text"), f"field 'answers', answer {index + 1}, 'text'"))
            answers[index] = {"text": " " + text, "score": entry.get("pm_score")}
    return listed(replace(row, fields={"prompt": dialogue(question), "answers": answers}), spec, SCORES)


def shp(row: SourceRow, spec: RowSpec) -> list[PreferenceRecord]:
    """Reads Stanford Human Preferences: a post in ``history`` and two comments with the scores Reddit gave them.

    Only pairs whose scores stand at least 2 to 1 (``min_score_ratio``) are kept, as in the DPO and TDPO authors' code.
    """
    history, *texts = (field_of(row, name, plain_text) for name in SHP_COLUMNS[:3])
    first, second = (field_of(row, name, number) for name in SHP_COLUMNS[3:])
    for name in SHP_COLUMNS[:3]:
        if is_empty(row.fields[name]):
            raise RowError(f"field {name!r} is empty")
    if first == second:
        raise RowDropped("both comments have one score")
    if row.fields.get("labels") is not None:
        label = field_of(row, "labels", number)
        if label not in (0, 1):
            raise RowError(f"field 'labels' must be 1 (A is better) or 0, found {describe(row.fields['labels'])}")
        if (label == 1) != (first > second):
            raise RowError("field 'labels' and the scores contradict each other")
    low, high = sorted((first, second))
    least = SHP_SCORE_RATIO if spec.min_score_ratio is None else spec.min_score_ratio
    if low > 0 and high / low < least:
        raise RowDropped(f"score ratio below {least:g}")
    chosen, rejected = (" " + text for text in (texts if first > second else texts[::-1]))
    return [make_record(row, dialogue(history), chosen, rejected)]


def completion(row: SourceRow, spec: RowSpec) -> list[Scored]:
    """Reads one scored completion: ``prompt``, ``completion`` (or ``response``) and ``reward`` (or ``score``)."""
    name, score_name = (first_of(row.fields, names) for names in COMPLETION_COLUMNS)
    ((score, answer),) = _scored(row, prompt_of(row), [(field_of(row, name), field_of(row, score_name, number))])
    if isinstance(answer.prompt, str) != isinstance(answer.chosen, str):
        raise mixed_kinds(prompt=answer.prompt, **{name: answer.chosen})
    if is_empty(answer.chosen):
        raise RowError(f"field {name!r} is an empty response")
    return [(score, answer)]


def completion_pairs(completions: Sequence[Scored], spec: RowSpec, report: DataReport) -> Iterator[PreferenceRecord]:
    """Yields the pairs of completions that share their prompt, in any rows of the source.

    A pair's row is that of its chosen completion.
    """
    by_prompt: dict[str, list[Scored]] = {}
    for score, answer in completions:
        key = repr((answer.prompt, answer.tools, answer.chat_template_kwargs))
        by_prompt.setdefault(key, []).append((score, answer))
    for group in by_prompt.values():
        try:
            yield from pairs(group, spec)
        except RowDropped as reason:
            for _, answer in group:
                report.drop(answer, "the only completion of its prompt" if len(group) == 1 else str(reason))


def pairs(answers: Sequence[Scored], spec: RowSpec) -> list[PreferenceRecord]:
    """Makes pairs of the answers to one prompt by ``spec.pairs_from``, or takes the best one (``spec.best_alone``).

    Args:
        answers: The answers in their order.
        spec: The choice of pairs.

    Raises:
        RowDropped: if they make no pair.
        RowError: if the best alone is taken and empty.
    """
    if spec.best_alone and answers:
        _, best = max(answers, key=lambda answer: answer[0])
        if is_empty(best.chosen):
            raise RowError("the best response is empty")
        return [best]
    if spec.pairs_from == "best_worst" and answers:
        ends = max(answers, key=lambda answer: answer[0]), min(reversed(answers), key=lambda answer: answer[0])
        candidates = [ends]
    else:
        two = itertools.combinations(answers, 2)
        candidates = [(one, other) if one[0] > other[0] else (other, one) for one, other in two]
    least = spec.min_margin or 0.0
    apart = [(one, two) for (high, one), (low, two) in candidates if _differ(high - low, least)]
    differing = [(one, two) for one, two in apart if one.chosen != two.chosen]
    if not differing:
        margin = f" by {spec.min_margin:g} or more" if spec.min_margin else ""
        raise RowDropped("chosen and rejected are identical" if apart else f"no two scores differ{margin}")
    options = {"tools": answers[0][1].tools, "chat_template_kwargs": answers[0][1].chat_template_kwargs}
    return [make_record(one, one.prompt, one.chosen, two.chosen, options) for one, two in differing]


def dialogue(text: str) -> str:
    """Returns a question as the beginning of a dialogue as HH writes it."""
    return f"\n\nHuman: {text}\n\nAssistant:"


def has_list(fields: dict[str, Any], names: tuple[str, ...]) -> bool:
    """Returns whether a row has a prompt, and answers with one of some figures, in objects or in a list beside them."""
    answers = fields.get(first_of(fields, LISTS))
    if not has_prompt(fields) or not isinstance(answers, list) or not answers:
        return False
    if isinstance(fields.get(first_of(fields, BESIDE[names])), list):
        return True
    return isinstance(answers[0], dict) and any(name in answers[0] for name in names)


def has_posts(fields: dict[str, Any]) -> bool:
    """Returns whether the answers are StackExchange's posts."""
    answers = fields["answers"]
    return isinstance(answers, list) and any(isinstance(entry, dict) and "pm_score" in entry for entry in answers)


def has_completion(fields: dict[str, Any]) -> bool:
    """Returns whether a row has a prompt, a completion and its score."""
    text = fields.get(first_of(fields, COMPLETION_COLUMNS[0]))
    return has_prompt(fields) and isinstance(text, str | list) and bool({"reward", "score"} & fields.keys())


def _scored(row: SourceRow, prompt: Text, answers: Sequence[tuple[Text, float]]) -> list[Scored]:
    """Makes the records of answers, as chats if the prompt is one."""
    prompt, *texts = with_system(row, prompt, *(text for text, _ in answers))
    check_placeholders(prompt)
    options = chat_options(row, prompt)
    records = [PreferenceRecord(prompt, text, "", row.source, row.row, **options) for text in texts]
    return [(score, record) for (_, score), record in zip(answers, records, strict=True)]


def _read_list(row: SourceRow, names: tuple[str, ...]) -> list[tuple[Text, float]]:
    """Reads the answers of a row, each with its score; one that is empty or has none is left out."""
    name, plural, figure = first_of(row.fields, LISTS), first_of(row.fields, BESIDE[names]), names[0]
    answers = field_of(row, name, _answer_list)
    objects = [entry for entry in answers if isinstance(entry, dict)]
    figures: Any = row.fields.get(plural)
    if plural in row.fields and not (isinstance(figures, list) and len(figures) == len(answers)):
        raise RowError(f"field {plural!r} must list {len(answers)} numbers, one an answer, found {describe(figures)}")
    if figures is None and names is RANKS and not objects:
        figures = range(1, len(answers) + 1)
    beside = figures is not None
    # One answer without text or figure is left out, but where none has any, its key is another one.
    may_lack_text = not objects or any(entry.get(first_of(entry, TEXTS)) is not None for entry in objects)
    rated = beside or any(key in entry for entry in objects for key in names)
    found = []
    for index, entry in enumerate(answers):
        what, is_object = f"field {name!r}, answer {index + 1}", isinstance(entry, dict)
        if not (beside or is_object):
            raise RowError(f"{what} must be an object with its text and {figure}, found {describe(entry)}")
        value = entry.get(first_of(entry, TEXTS)) if is_object and not (beside and "role" in entry) else entry
        text = "" if value is None and may_lack_text else as_text(value, what)
        if not rated:
            raise RowError(f"{what}, its {figure} must be a finite number, found null")
        given = figures[index] if beside else entry.get(first_of(entry, names))
        if is_empty(text):
            row.notes.append("an empty answer left out")
            continue
        try:
            score = number(given, f"{what}, its {figure}")
        except RowError:
            if not (given is None or isinstance(given, str) or given != given):  # nor NaN
                raise
            row.notes.append(f"an answer left out, whose {figure} is {describe(given)}")
            continue
        found.append((text, -score if names is RANKS else score))
    return found


def _answer_list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise RowError(f"{what} must be a list of answers, found {describe(value)}")
    return list(value)


def _differ(difference: float, least: float) -> bool:
    """Returns whether scores differ by a margin; 0.3 and 0.1 differ by 0.2, despite binary fractions."""
    return difference > 0 and (difference >= least or math.isclose(difference, least, rel_tol=1e-9))
