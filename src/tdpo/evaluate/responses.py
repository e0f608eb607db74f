"""Reads files of responses, matches two of them by prompt, and reads and writes AlpacaEval's and MT-Bench's formats."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tdpo.data.formats.fields import as_text, first_of, is_empty, plain_text
from tdpo.data.formats.report import RowError
from tdpo.data.sources import SourceRow, describe, read_source
from tdpo.errors import UserError
from tdpo.types import Message, Text

PROMPT_COLUMNS = ("prompt", "instruction")
RESPONSE_COLUMNS = ("response", "output", "completion")
"""Columns of plain files, of AlpacaEval's outputs and of TRL's prompt-completion data."""


@dataclass(frozen=True)
class Question:
    """A conversation's user turns, as MT-Bench has them.

    Attributes:
        id: The number that files of answers name it by.
        category: Its category.
        turns: What the user says in each turn.
    """

    id: int | str
    category: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """A response with its prompt, or the responses to every turn of a conversation.

    Attributes:
        prompts: The prompt of each turn; that of a single turn may be chat messages.
        responses: The response of each turn.
        location: File and row, for messages.
        category: Category of the prompt, or an empty text.
        columns: All columns of the row, which a reward may need.
    """

    prompts: tuple[Text, ...]
    responses: tuple[str, ...]
    location: str
    category: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def key(self) -> str:
        """Identifies the prompt; a text and the single user message that says it are the same prompt."""
        return json.dumps([_single_user_text(prompt) for prompt in self.prompts], sort_keys=True)

    @property
    def length(self) -> int:
        """Characters of all responses."""
        return sum(map(len, self.responses))

    def reward_rows(self) -> list[dict[str, Any]]:
        """Returns the prompt and response of each turn, the turns before it in the prompt, for a reward model."""
        if len(self.responses) == 1:
            return [{**self.columns, "prompt": self.prompts[0], "response": self.responses[0]}]
        rows, said = [], list[Message]()
        for prompt, response in zip(self.prompts, self.responses, strict=True):
            said = [*said, {"role": "user", "content": prompt}]
            rows.append({**self.columns, "prompt": said, "response": response})
            said = [*said, {"role": "assistant", "content": response}]
        return rows


@dataclass(frozen=True)
class Matched:
    """Answers of two files to the same prompts.

    Attributes:
        pairs: An answer of A and one of B.
        unmatched_a: Rows of A whose prompt B does not have.
        unmatched_b: The same of B.
    """

    pairs: list[tuple[Answer, Answer]]
    unmatched_a: int
    unmatched_b: int


def read_questions(name: str) -> list[Question]:
    """Reads MT-Bench's ``question.jsonl``: rows with ``question_id``, ``category`` and ``turns``.

    Raises:
        UserError: naming the row that lacks one of them, repeats an id or has another number of turns than the first.
    """
    found: dict[int | str, Question] = {}
    for row in read_source(name, "test"):
        try:
            question = Question(_question_id(row), row.fields.get("category") or "", _texts(row, "turns"))
            plain_text(question.category, "field 'category'")
        except RowError as error:
            raise UserError(f"{row.location}: {error}") from error
        first = next(iter(found.values()), question)
        if question.id in found or len(question.turns) != len(first.turns):
            what = "its question_id is there twice" if question.id in found else "another number of turns than row 1"
            raise UserError(f"{row.location}: {what}")
        found[question.id] = question
    return list(found.values())


def read_answers(name: str, column: str | None = None, questions: Sequence[Question] = ()) -> list[Answer]:
    """Reads a file of responses; see the page on judging for the formats.

    Args:
        name: A file of rows with ``prompt`` and ``response``, AlpacaEval's outputs, or answers to MT-Bench.
        column: Column of the responses; None for ``response``, ``output`` or ``completion``.
        questions: MT-Bench's questions, which rows then answer by ``question_id``.

    Returns:
        The answers; a row with a list of responses to one prompt gives one for each.

    Raises:
        UserError: naming the row and what is wrong.
    """
    answers: list[Answer] = []
    by_id = {str(question.id): question for question in questions}
    for row in read_source(name, "test"):
        try:
            if row.error:
                raise RowError(row.error)
            found = _answers_by_id(row, by_id) if by_id and "question_id" in row.fields else _answers_of(row, column)
            answers += _with_category(found, questions) if questions else found
        except RowError as error:
            raise UserError(f"{row.location}: {error}") from error
    return answers


def match_answers(answers_a: Sequence[Answer], answers_b: Sequence[Answer], name_a: str, name_b: str) -> Matched:
    """Pairs the answers to the same prompt, in the order of A; the k-th answer to a prompt with the k-th.

    Raises:
        UserError: if no prompt is in both, a prompt has more answers in one than in the other, or turns differ.
    """
    groups_a, groups_b = _by_key(answers_a), _by_key(answers_b)
    both = [key for key in groups_a if key in groups_b]
    if not both:
        raise UserError(
            f"no prompt of {name_a} is in {name_b}: rows are matched by the whole `prompt`. The first ones: "
            f"{_shown(answers_a)} and {_shown(answers_b)}"
        )
    for key in both:
        found, other = groups_a[key], groups_b[key]
        if len(found) != len(other):
            raise UserError(
                f"{found[0].location}: this prompt has {len(found)} responses in {name_a} and {len(other)} in "
                f"{name_b} ({other[0].location}); give the same number, or one"
            )
    pairs = [pair for key in both for pair in zip(groups_a[key], groups_b[key], strict=True)]
    turns = len(pairs[0][0].responses)
    if odd := next((a for a, _ in pairs if len(a.responses) != turns), None):
        raise UserError(f"{odd.location}: {len(odd.responses)} turns, where {pairs[0][0].location} has {turns}")
    count = len(pairs)
    return Matched(pairs, len(answers_a) - count, len(answers_b) - count)


def alpaca_eval_rows(answers: Sequence[Answer], generator: str, dataset: str) -> list[dict[str, str]]:
    """Returns the rows of AlpacaEval's ``model_outputs``.

    Args:
        answers: Responses to single prompts.
        generator: Name of the model.
        dataset: Name of the set of prompts.

    Raises:
        UserError: for conversations of several turns, which the format cannot hold.
    """
    if any(len(answer.responses) > 1 for answer in answers):
        raise UserError("--alpaca_eval has no place for conversations of several turns")
    return [
        {
            "instruction": prompt_text(answer.prompts[0]),
            "output": answer.responses[0],
            "generator": generator,
            "dataset": dataset,
        }
        for answer in answers
    ]


def prompt_text(prompt: Text) -> str:
    """Returns a prompt as one text; messages are named by their role unless there is only the user's.

    Examples:
        >>> print(prompt_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]))
        system: Be brief.
        <BLANKLINE>
        user: Hi
    """
    prompt = _single_user_text(prompt)
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def _single_user_text(prompt: Text) -> Text:
    single = not isinstance(prompt, str) and len(prompt) == 1 and prompt[0]["role"] == "user"
    return prompt[0]["content"] if single else prompt  # type: ignore[index]


def _answers_of(row: SourceRow, column: str | None) -> Iterator[Answer]:
    """Yields the answers of a row with a prompt, or with the prompts of several turns."""
    names = first_of(row.fields, PROMPT_COLUMNS), column or first_of(row.fields, RESPONSE_COLUMNS)
    for name in names:
        if name not in row.fields:
            raise RowError(f"field {name!r} is missing; there are: {', '.join(row.fields) or 'none'}")
    prompt, response = (row.fields[name] for name in names)
    if _is_texts(prompt):
        prompts, responses = _texts(row, names[0]), _texts(row, names[1])
        if len(prompts) != len(responses):
            raise RowError(f"{len(prompts)} prompts and {len(responses)} responses; each turn needs both")
        yield Answer(prompts, responses, row.location, columns=row.fields)
        return
    prompt = as_text(prompt, f"field {names[0]!r}")
    if is_empty(prompt):
        raise RowError(f"field {names[0]!r} is empty")
    samples = response if _is_texts(response) else [response]
    for sample, location in zip(samples, _locations(row, samples), strict=True):
        yield Answer((prompt,), (_response_text(sample, f"field {names[1]!r}"),), location, columns=row.fields)


def _answers_by_id(row: SourceRow, questions: Mapping[str, Question]) -> Iterator[Answer]:
    """Yields the answers of a row of FastChat's: ``question_id`` and ``choices`` with ``turns``, or ``turns`` alone."""
    question = questions.get(str(_question_id(row)))
    if question is None:
        raise RowError(f"question_id {row.fields['question_id']} is none of the {len(questions)} of --mt_bench")
    choices = row.fields.get("choices", [row.fields])
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
        raise RowError(f"field 'choices' must be a list of objects with 'turns', found {describe(choices)}")
    for choice, location in zip(choices, _locations(row, choices), strict=True):
        turns = _texts(SourceRow(row.source, row.row, choice), "turns")
        if len(turns) != len(question.turns):
            raise RowError(f"{len(turns)} turns, and question {question.id} has {len(question.turns)}")
        yield Answer(question.turns, turns, location, columns=row.fields)


def _with_category(answers: Iterable[Answer], questions: Sequence[Question]) -> Iterator[Answer]:
    categories: dict[tuple[Text, ...], str] = {question.turns: question.category for question in questions}
    for answer in answers:
        if answer.prompts not in categories:
            raise RowError("its prompts are none of the questions of --mt_bench, which have several turns each")
        yield replace(answer, category=categories[answer.prompts])


def _locations(row: SourceRow, responses: Sequence[Any]) -> list[str]:
    """Returns the location of each response of a row."""
    if len(responses) == 1:
        return [row.location]
    return [f"{row.location}, response {number}" for number in range(1, len(responses) + 1)]


def _question_id(row: SourceRow) -> int | str:
    if row.error:
        raise RowError(row.error)
    found = row.fields.get("question_id")
    if not isinstance(found, int | str) or isinstance(found, bool):
        raise RowError(f"field 'question_id' must be a number or a text, found {describe(found)}")
    return found


def _texts(row: SourceRow, name: str) -> tuple[str, ...]:
    value = row.fields.get(name)
    if not isinstance(value, list) or not value:
        raise RowError(f"field {name!r} must be a list with a text for each turn, found {describe(value)}")
    return tuple(plain_text(text, f"field {name!r}, turn {number}") for number, text in enumerate(value, 1))


def _response_text(value: Any, what: str) -> str:
    """Reads a response: a text, or one message of the assistant's."""
    found = as_text(value, what)
    if isinstance(found, str):
        return found
    if len(found) != 1 or found[0]["role"] != "assistant":
        raise RowError(f"{what} must be a text or one message of the assistant, found {len(found)} messages")
    return str(found[0]["content"])


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _by_key(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    groups: dict[str, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.key, []).append(answer)
    return groups


def _shown(answers: Sequence[Answer]) -> str:
    return repr(prompt_text(answers[0].prompts[0])[:60])
