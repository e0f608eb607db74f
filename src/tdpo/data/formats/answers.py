"""Several answers to a prompt, scored or ranked, and the pairs they make."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tdpo.config.row_spec import SHP_SCORE_RATIO, RowSpec
from tdpo.data.formats.fields import (
    as_text,
    assistant_turn,
    chat_options,
    check_kinds,
    field_of,
    first_of,
    is_empty,
    number,
    plain_text,
)
from tdpo.data.formats.prompts import PROMPT_USES, check_placeholders, has_prompt, make_record, prompt_of, with_system
from tdpo.data.formats.report import DataReport, RowDropped, RowError
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
    """An answer to a prompt with its score.

    Attributes:
        text: The answer, of the kind of the prompt.
        score: The larger the better.
        source: The file or dataset it was read from.
        row: Its row there.
        prompt: The prompt.
        options: Further fields of its records.
    """

    text: Text
    score: float
    source: str
    row: int
    prompt: Text
    options: dict[str, Any] = field(default_factory=dict)


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
    _check_left(row, found)
    prompt, *texts = with_system(row, prompt, *(text for text, _ in found))
    if not isinstance(prompt, str):
        texts = [assistant_turn(text) for text in texts]
    for text in texts:
        check_kinds(prompt=prompt, answer=text)
    check_placeholders(prompt)
    options = chat_options(row, prompt)
    scores = (-figure if names is RANKS else figure for _, figure in found)
    return pairs(
        [Answer(*pair, row.source, row.row, prompt, options) for pair in zip(texts, scores, strict=True)], spec
    )


def stackexchange(row: SourceRow, spec: RowSpec) -> list[PreferenceRecord]:
    """Reads StackExchange preferences: ``question`` and ``answers`` with ``text`` and ``pm_score``, all of it HTML.

    They become dialogues as HH writes them, as in the DPO and TDPO authors' code; code stays as it is.
    """
    from tdpo.data.formats.markup import html_to_text

    question = html_to_text(field_of(row, "question", plain_text))
    if not question:
        raise RowError("field 'question' is empty")
    found = []
    for index, entry in enumerate(field_of(row, "answers", _answer_list), 1):
        what = f"field 'answers', answer {index}"
        if not isinstance(entry, dict):
            raise RowError(f"{what} must be an object, found {describe(entry)}")
        text = html_to_text(plain_text(entry.get("text"), f"{what}, 'text'"))
        score = _score_of(row, text, entry.get("pm_score"), f"{what}, 'pm_score'", "score")
        if score is not None:
            found.append(Answer(" " + text, score, row.source, row.row, dialogue(question)))
    _check_left(row, found)
    return pairs(found, spec)


def shp(row: SourceRow, spec: RowSpec) -> list[PreferenceRecord]:
    """Reads Stanford Human Preferences: a post in ``history`` and two comments with the scores Reddit gave them.

    Only pairs whose scores stand at least 2 to 1 (``min_score_ratio``) are kept, as in the DPO and TDPO authors' code.
    """
    names = ("history", "human_ref_A", "human_ref_B")
    history, *texts = (field_of(row, name, plain_text) for name in names)
    first, second = (field_of(row, name, number) for name in ("score_A", "score_B"))
    for name, text in zip(names, (history, *texts), strict=True):
        if not text.strip():
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
    return [make_record(row, dialogue(history), chosen, rejected, {})]


def completion(row: SourceRow, spec: RowSpec) -> list[Answer]:
    """Reads one scored completion: ``prompt``, ``completion`` (or ``response``) and ``reward`` (or ``score``)."""
    prompt = prompt_of(row)
    text_name, score_name = (first_of(row.fields, names) for names in COMPLETION_USES[-2:])
    prompt, text = with_system(row, prompt, field_of(row, text_name, as_text))
    text = text if isinstance(prompt, str) else assistant_turn(text)
    check_kinds(prompt=prompt, **{text_name: text})
    if is_empty(text):
        raise RowError(f"field {text_name!r} is an empty response")
    score = field_of(row, score_name, number)
    return [Answer(text, score, row.source, row.row, prompt, chat_options(row, prompt))]


def completion_pairs(completions: Sequence[Answer], spec: RowSpec, report: DataReport) -> Iterator[PreferenceRecord]:
    """Yields the pairs of completions that share their prompt, in any rows of the source.

    A pair's row is that of its chosen completion.
    """
    by_prompt: dict[str, list[Answer]] = {}
    for answer in completions:
        by_prompt.setdefault(repr((answer.prompt, answer.options)), []).append(answer)
    for group in by_prompt.values():
        try:
            yield from pairs(group, spec)
        except RowDropped as reason:
            for answer in group:
                report.drop(answer, "the only completion of its prompt" if len(group) == 1 else str(reason))


def pairs(answers: Sequence[Answer], spec: RowSpec) -> list[PreferenceRecord]:
    """Makes pairs of the answers to one prompt: all that differ in score, best and worst, or by a margin.

    Args:
        answers: The answers in their order.
        spec: The choice of pairs.

    Raises:
        RowDropped: if they make no pair.
    """
    if spec.pairs_from == "best_worst":
        best = max(answers, key=lambda answer: answer.score)
        worst = min(reversed(answers), key=lambda answer: answer.score)
        candidates = [(best, worst)] if best.score > worst.score else []
    else:
        least = spec.min_margin or 0.0
        both_ways = itertools.combinations(answers, 2)
        ordered = ((one, two) if one.score > two.score else (two, one) for one, two in both_ways)
        candidates = [(one, two) for one, two in ordered if _differs(one.score - two.score, least)]
    differing = [(one, two) for one, two in candidates if one.text != two.text]
    if not differing:
        margin = f" by {spec.min_margin:g} or more" if spec.min_margin else ""
        raise RowDropped("chosen and rejected are identical" if candidates else f"no two scores differ{margin}")
    return [make_record(one, one.prompt, one.text, two.text, one.options) for one, two in differing]


def dialogue(text: str) -> str:
    """Returns a question as the beginning of a dialogue as HH writes it."""
    return f"\n\nHuman: {text}\n\nAssistant:"


def has_list(fields: dict[str, Any], names: tuple[str, ...]) -> bool:
    """Returns whether a row has a prompt, and answers with one of some figures, in objects or in a list beside them."""
    answers = fields.get(first_of(fields, LISTS))
    if not has_prompt(fields) or not isinstance(answers, list) or not answers:
        return False
    if isinstance(fields.get(first_of(fields, _plurals(names))), list):
        return True
    return isinstance(answers[0], dict) and any(name in answers[0] for name in names)


def has_posts(fields: dict[str, Any]) -> bool:
    """Returns whether the answers are StackExchange's posts."""
    listed = fields["answers"]
    return isinstance(listed, list) and any(isinstance(entry, dict) and "pm_score" in entry for entry in listed)


def has_completion(fields: dict[str, Any]) -> bool:
    """Returns whether a row has a prompt, a completion and its score."""
    text = fields.get(first_of(fields, ("completion", "response")))
    return has_prompt(fields) and isinstance(text, str | list) and bool({"reward", "score"} & fields.keys())


def _read_list(row: SourceRow, names: tuple[str, ...]) -> list[tuple[Text, float]]:
    """Reads the answers of a row, each with its figure; one that is empty or has none is left out."""
    name, figure = first_of(row.fields, LISTS), names[0]
    listed = field_of(row, name, _answer_list)
    beside = _figures_beside(row, listed, names)
    entries = [entry for entry in listed if isinstance(entry, dict)]
    rated = any(key in entry for entry in entries for key in names)
    may_lack_text = not entries or any(entry.get(first_of(entry, TEXTS)) is not None for entry in entries)
    found = []
    for index, entry in enumerate(listed):
        what = f"field {name!r}, answer {index + 1}"
        if beside is None and not isinstance(entry, dict):
            raise RowError(f"{what} must be an object with its text and {figure}, found {describe(entry)}")
        is_object = isinstance(entry, dict) and (beside is None or "role" not in entry)
        value = entry.get(first_of(entry, TEXTS)) if is_object else entry
        text = "" if value is None and may_lack_text else as_text(value, what)
        if beside is None and not rated:
            raise RowError(f"{what}, its {figure} must be a finite number, found null")
        given = entry.get(first_of(entry, names)) if beside is None else beside[index]
        score = _score_of(row, text, given, f"{what}, its {figure}", figure)
        if score is not None:
            found.append((text, score))
    return found


def _figures_beside(row: SourceRow, listed: list[Any], names: tuple[str, ...]) -> list[Any] | None:
    """Finds the list of figures beside the answers; None where the answers are objects that hold them."""
    plural = first_of(row.fields, _plurals(names))
    if plural not in row.fields:
        in_order = names is RANKS and not any(isinstance(entry, dict) for entry in listed)
        return list(range(1, len(listed) + 1)) if in_order else None
    figures = row.fields[plural]
    if not isinstance(figures, list) or len(figures) != len(listed):
        raise RowError(f"field {plural!r} must list {len(listed)} numbers, one an answer, found {describe(figures)}")
    return figures


def _score_of(row: SourceRow, text: Text, figure: Any, what: str, name: str) -> float | None:
    """Reads the score of an answer; None, with a note for the report, where it is null or a word, or the text empty."""
    if is_empty(text):
        row.notes.append("an empty answer left out")
        return None
    try:
        return number(figure, what)
    except RowError:
        if figure is not None and not isinstance(figure, str) and figure == figure:  # anything but NaN
            raise
    row.notes.append(f"an answer left out, whose {name} is {'null' if figure is None else describe(figure)}")
    return None


def _check_left(row: SourceRow, found: Sequence[Any]) -> None:
    """Drops a row of which answers were left out, so that no two remain."""
    if len(found) < 2 and row.notes:
        raise RowDropped(f"fewer than two answers: {row.notes[0]}")


def _answer_list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise RowError(f"{what} must be a list of answers, found {describe(value)}")
    return value


def _differs(difference: float, least: float) -> bool:
    """Returns whether scores differ by a margin; 0.3 and 0.1 differ by 0.2, despite binary fractions."""
    return difference > 0 and (difference >= least or math.isclose(difference, least, rel_tol=1e-9))


def _plurals(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name + "s" for name in names)
