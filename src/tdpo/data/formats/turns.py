"""Chats in other words: ShareGPT's turns and Alpaca's instructions, as LLaMA-Factory's preference data has them."""

from __future__ import annotations

import json
from typing import Any

from tdpo.data.formats.fields import as_text, chat_options, checked, encodable, field_of, plain_text
from tdpo.data.formats.report import RowError
from tdpo.data.reading import Reading
from tdpo.data.sources import SourceRow, describe
from tdpo.types import Message, PreferenceRecord

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
}
"""Names of speakers in ShareGPT's turns, and the roles they are."""


def sharegpt(row: SourceRow, reading: Reading) -> list[PreferenceRecord]:
    """``conversations`` of turns with ``from`` and ``value``, and a turn (or a text) ``chosen`` and ``rejected``.

    ``system`` and ``tools`` beside them are taken as LLaMA-Factory takes them.
    """
    name = "conversations" if "conversations" in row.fields else "messages"
    turns = field_of(row, name)
    if not isinstance(turns, list) or not turns:
        raise RowError(f"field {name!r} must be a list of turns, found {describe(turns)}")
    prompt = [*_system(row), *(_turn(turn, f"field {name!r}, turn {place}") for place, turn in enumerate(turns, 1))]
    if prompt[-1]["role"] == "assistant":
        raise RowError(f"field {name!r} ends with the assistant's turn, and chosen and rejected are to be that")
    chosen, rejected = (_answer(field_of(row, side), f"field {side!r}") for side in ("chosen", "rejected"))
    record = PreferenceRecord(prompt, chosen, rejected, row.source, row.row, **chat_options(row, prompt))
    return [checked(record)]


def alpaca(row: SourceRow, reading: Reading) -> list[PreferenceRecord]:
    """``instruction``, perhaps ``input``, ``history`` and ``system``, with ``chosen`` and ``rejected`` texts.

    Instead of the two, ``output`` may list them, the better one first.
    """
    question = plain_text(field_of(row, "instruction"), "field 'instruction'")
    more = row.fields.get("input")
    if more is not None and more != "":
        question += "\n" + plain_text(more, "field 'input'")
    if not question.strip():
        raise RowError("field 'instruction' is empty")
    prompt = [*_system(row), *history_messages(row), {"role": "user", "content": question}]
    chosen, rejected = (_assistant(plain_text(value, what)) for value, what in _two_outputs(row))
    record = PreferenceRecord(prompt, chosen, rejected, row.source, row.row, **chat_options(row, prompt))
    return [checked(record)]


def has_turns(fields: dict[str, Any]) -> bool:
    """Whether a row is one of :func:`sharegpt`."""
    return {"chosen", "rejected"} <= fields.keys() and bool({"conversations", "messages"} & fields.keys())


def has_instruction(fields: dict[str, Any]) -> bool:
    """Whether a row is one of :func:`alpaca`."""
    pair = {"chosen", "rejected"} <= fields.keys() or isinstance(fields.get("output"), list)
    return "instruction" in fields and pair


def read_turns(row: SourceRow, name: str) -> list[Message]:
    """Reads a column of turns, each with ``from`` and ``value`` or with ``role`` and ``content``.

    Raises:
        RowError: naming the turn that is neither.
    """
    turns = field_of(row, name)
    if not isinstance(turns, list) or not turns:
        raise RowError(f"field {name!r} must be a list of turns, found {describe(turns)}")
    return [_turn(turn, f"field {name!r}, turn {number}") for number, turn in enumerate(turns, 1)]


def _two_outputs(row: SourceRow) -> list[tuple[Any, str]]:
    if "chosen" in row.fields or "rejected" in row.fields:
        return [(field_of(row, name), f"field {name!r}") for name in ("chosen", "rejected")]
    outputs = field_of(row, "output")
    if not isinstance(outputs, list) or len(outputs) != 2:
        raise RowError(f"field 'output' must list two texts, the better one first, found {describe(outputs)}")
    return [(text, f"field 'output', text {place}") for place, text in enumerate(outputs, 1)]


def _system(row: SourceRow) -> list[Message]:
    value = row.fields.get("system")
    return [] if value in (None, "") else [{"role": "system", "content": plain_text(value, "field 'system'")}]


def history_messages(row: SourceRow) -> list[Message]:
    """Reads the column ``history``: pairs of question and answer."""
    rounds = row.fields.get("history") or []
    if not isinstance(rounds, list) or not all(isinstance(turns, list) and len(turns) == 2 for turns in rounds):
        raise RowError(f"field 'history' must list pairs of question and answer, found {describe(rounds)}")
    messages = []
    for place, (question, answer) in enumerate(rounds, 1):
        messages.append({"role": "user", "content": plain_text(question, f"field 'history', question {place}")})
        messages.append({"role": "assistant", "content": plain_text(answer, f"field 'history', answer {place}")})
    return messages


def _answer(value: Any, what: str) -> list[Message]:
    """One turn, a list of turns or a text, as messages."""
    if isinstance(value, str):
        return _assistant(encodable(value, what))
    turns = value if isinstance(value, list) else [value]
    if not turns:
        raise RowError(f"{what} is an empty list of turns")
    return [_turn(turn, what) for turn in turns]


def _assistant(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _turn(turn: Any, what: str) -> Message:
    """A turn with ``from`` and ``value``, or a message with ``role`` and ``content``, as a message."""
    if isinstance(turn, dict) and "role" in turn and "from" not in turn:
        return as_text([turn], what)[0]  # type: ignore[return-value]
    speaker = turn.get("from") if isinstance(turn, dict) else None
    if not isinstance(speaker, str) or speaker not in ROLES:
        found = describe(speaker if isinstance(turn, dict) else turn)
        raise RowError(f"{what} must be 'from' one of {', '.join(ROLES)}, found {found}")
    value = plain_text(turn.get("value"), f"{what}, 'value'")
    if speaker == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(value, what)}
    return {"role": ROLES[speaker], "content": value}


def _calls(text: str, what: str) -> list[dict[str, Any]]:
    """The calls of a ``function_call`` turn: JSON of one object with name and arguments, or of a list of them."""
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{what} is from function_call and not valid JSON: {error}") from error
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise RowError(f"{what} is from function_call and names no function: {describe(text)}")
    for call in calls:
        encodable(json.dumps(call, ensure_ascii=False), what)
    return [{"type": "function", "function": call} for call in calls]
