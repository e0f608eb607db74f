"""Fields of a row: texts, chats and numbers, or a :class:`RowError` that names the field and what was found."""

from __future__ import annotations

import ast
import json
import math
import numbers
import re
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any, TypeGuard

from tdpo.data.formats.report import RowDropped, RowError
from tdpo.data.row_spec import parse_json
from tdpo.data.sources import SourceRow, describe
from tdpo.errors import UserError
from tdpo.types import Message, PreferenceRecord, Text

CHAT_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*(["'])(role|content|from|value)\1\s*:""")
"""How a chat begins that a table of texts holds."""
NOT_OF_A_ROW = (
    "conversation", "tools", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message", "padding",
    "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip
"""Arguments of ``apply_chat_template`` that are not for the template."""
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
    "developer": "developer",
    "prompter": "user",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool_call": "assistant",
    "tool_response": "tool",
}
"""Names of speakers, in ShareGPT's turns and as others write them into ``role``, and the roles they are."""
CALLERS = ("function_call", "tool_call")
"""Speakers whose turns are calls of tools as JSON, in LLaMA-Factory's data and ms-swift's."""
PAIR_FIELDS = ("prompt", "chosen", "rejected")
ANSWER_FIELDS = ("completion", "completions", "reward", "score", "scores", "rank", "ranks", "instruction", "response")
ASKING_ROLES = ("user", "system", "developer", "tool")
"""Roles whose turn no response can begin with."""


def text_of(row: SourceRow, name: str) -> Text:
    """The field as text or as chat messages with role and content.

    Messages are as they were found, but for what means the same: a key whose value is null is left out (tables cannot
    tell it from a missing one), content given as a list of text parts is one text, and a chat that a table of texts
    holds as JSON is that chat.

    Raises:
        RowError: if it is missing, empty or of another type.
    """
    return as_text(field_of(row, name), f"field {name!r}")


def field_of(row: SourceRow, name: str) -> Any:
    """The field as it is.

    Raises:
        RowError: if there is none.
    """
    if name not in row.fields:
        raise RowError(f"field {name!r} is missing")
    return row.fields[name]


def as_text(value: Any, what: str) -> Text:
    """A value as text or chat messages; see :func:`text_of`.

    Args:
        value: What was found.
        what: What messages call it.
    """
    if isinstance(value, str) and CHAT_AS_TEXT.match(value):
        try:
            value = parsed_chat(value)
        except (ValueError, RecursionError) as error:
            raise RowError(
                f"{what} looks like a chat as text and is not valid JSON: {error}. Write it with json.dumps, or the "
                "table as Parquet or JSONL"
            ) from error
    if isinstance(value, str):
        return encodable(value, what)
    if isinstance(value, dict) and ("role" in value or "from" in value):
        return [read_turn(value, what)]
    if not isinstance(value, list):
        raise RowError(f"{what} must be a text or a list of chat messages, found {describe(value)}")
    if not value:
        raise RowError(f"{what} is an empty list of messages")
    read = read_turn if isinstance(value[0], dict) and value[0].get("from") is not None else _message
    return [read(message, f"{what}, message {place}") for place, message in enumerate(value, 1)]


def first_of(fields: dict[str, Any], names: Sequence[str]) -> str:
    """Returns the first of some names whose value is not null, or that a row has, or the first of all."""
    there = next((name for name in names if fields.get(name) is not None), None)
    return there or next((name for name in names if name in fields), names[0])


def read_turn(turn: Any, what: str) -> Message:
    """Reads a turn with ``from`` and ``value``, or a message with ``role`` and ``content``, as a message.

    Raises:
        RowError: if it is neither.
    """
    if isinstance(turn, dict) and "role" in turn and "from" not in turn:
        return _message(turn, what)
    speaker = turn.get("from") if isinstance(turn, dict) else None
    if not isinstance(speaker, str) or speaker.lower() not in ROLES:
        found = describe(speaker if isinstance(turn, dict) else turn)
        raise RowError(f"{what} must be 'from' one of {', '.join(ROLES)}, found {found}")
    value = plain_text(turn.get("value"), f"{what}, 'value'")
    if speaker.lower() in CALLERS:
        return {"role": "assistant", "content": "", "tool_calls": _calls(value, what, speaker)}
    return {"role": ROLES[speaker.lower()], "content": value}


def plain_text(value: Any, what: str) -> str:
    """A value that must be a text.

    Raises:
        RowError: if it is another thing.
    """
    if not isinstance(value, str):
        raise RowError(f"{what} must be a text, found {describe(value)}")
    return encodable(value, what)


def number(value: Any, what: str) -> float:
    """A finite number, also where a table of texts spells it.

    Raises:
        RowError: if it is none.
    """
    if isinstance(value, str | numbers.Real | Decimal) and not isinstance(value, bool):
        try:
            found = float(value)
        except (ValueError, OverflowError):
            found = math.nan
        if math.isfinite(found):
            return found
    raise RowError(f"{what} must be a finite number, found {describe(value)}")


def encodable(text: str, what: str) -> str:
    """The text, unless a part of it is no character.

    Raises:
        RowError: for a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{what} holds half a character (a lone surrogate) at position {error.start}") from error
    return text


def chat_options(row: SourceRow, prompt: Text) -> dict[str, Any]:
    """The row's ``tools`` and ``chat_template_kwargs``, as objects or as JSON, for a record.

    Raises:
        RowError: if they are of another type, or the prompt is no chat, which could not use them.
    """
    found = {}
    for name, kind, meaning in (("tools", list, "a list of tools"), ("chat_template_kwargs", dict, "an object")):
        value = row.fields.get(name)
        if isinstance(value, str) and value.strip():
            value = parse_json(value, f"field {name!r} is", RowError)
        if not value:  # null, an empty text of a table, an empty list
            continue
        if not isinstance(value, kind):
            raise RowError(f"field {name!r} must be {meaning}, found {describe(value)}")
        if isinstance(prompt, str):
            raise RowError(f"field {name!r} is for chats, and the prompt is a text")
        found[name] = _json_like(value, f"field {name!r}")
    for place, tool in enumerate(found.get("tools", ()), 1):
        if not isinstance(tool, dict):
            raise RowError(f"field 'tools', tool {place} must be an object, found {describe(tool)}")
    arguments = _template_arguments(found.pop("chat_template_kwargs", {}))
    return {**found, "chat_template_kwargs": arguments} if arguments else found


def _template_arguments(found: dict[str, Any]) -> dict[str, Any]:
    """The row's arguments of the template, without those that a table filled with null."""
    arguments = {key: value for key, value in found.items() if value is not None}
    for key in arguments:
        if not isinstance(key, str) or key in NOT_OF_A_ROW:
            raise RowError(f"field 'chat_template_kwargs' sets {key!r}, which is not for the template")
    return arguments


def is_empty(text: Text) -> bool:
    """Whether there is nothing but white space in a text, or in the last of some messages and it calls no tool."""
    if isinstance(text, str):
        return not text.strip()
    return not (text[-1]["content"].strip() or text[-1].get("tool_calls") or text[-1].get("function_call"))


def is_chat(text: Text) -> TypeGuard[list[Message]]:
    """Whether these are messages."""
    return not isinstance(text, str)


def check_kinds(**texts: Text) -> None:
    """Refuses texts beside chat messages.

    Raises:
        RowError: saying which is which.
    """
    if len({isinstance(text, str) for text in texts.values()}) > 1:
        found = ", ".join(f"{name} {'text' if isinstance(text, str) else 'messages'}" for name, text in texts.items())
        raise RowError(f"texts and chat messages are mixed: {found}")


def checked(record: PreferenceRecord) -> PreferenceRecord:
    """The record, unless a response is empty or begins with a question (errors), or it prefers nothing (dropped)."""
    for name in ("chosen", "rejected"):
        response: Text = getattr(record, name)
        if is_empty(response):
            raise RowError(f"field {name!r} is an empty response")
        if is_chat(response) and response[0]["role"] in ASKING_ROLES:
            role = response[0]["role"]
            raise RowError(
                f"field {name!r} begins with a message of role {role!r}, and a response with the assistant's"
            )
    if record.chosen == record.rejected:
        raise RowDropped("chosen and rejected are identical")
    return record


def renamed(row: SourceRow, columns: Sequence[tuple[str, str]]) -> SourceRow:
    """The row with its columns under the names a format knows.

    A column that the row itself does not have is looked for in the objects its lists hold.

    Raises:
        RowError: for a column that is nowhere.
        UserError: if field and column are the wrong way round.
    """
    if not columns:
        return row
    moved = {column for _, column in columns}
    fields = {key: value for key, value in row.fields.items() if key not in moved}
    for name, column in columns:
        if name in row.fields and name not in moved and _turned_around(name, column, row.fields):
            raise UserError(
                f"--columns {name}={column} is the wrong way round: the row has a column {name!r}, and {column!r} is "
                f"what formats call a field; --columns {column}={name} takes the column {name!r} for it ({row.source})"
            )
        if column in row.fields:
            fields[name] = row.fields[column]
            continue
        inside = {key: value for key, value in fields.items() if _objects_have(value, column)}
        if not inside:
            raise RowError(f"field {column!r}, which --columns takes for {name!r}, is missing")
        for key, objects in inside.items():
            fields[key] = [_moved(entry, column, name) if isinstance(entry, dict) else entry for entry in objects]
    return replace(row, fields=fields)


def _turned_around(name: str, column: str, fields: dict[str, Any]) -> bool:
    """Whether a column of the row is named where a field should be, and the other way round."""
    return name not in PAIR_FIELDS and (column in PAIR_FIELDS or (column in ANSWER_FIELDS and column not in fields))


def _objects_have(value: Any, column: str) -> bool:
    return isinstance(value, list) and any(isinstance(entry, dict) and column in entry for entry in value)


def _moved(entry: dict[str, Any], column: str, name: str) -> dict[str, Any]:
    kept = {key: value for key, value in entry.items() if key != column}
    return {**kept, name: entry[column]} if column in entry else kept


def parsed_chat(text: str) -> Any:
    """Parses a chat that a table of texts holds as JSON, or as Python prints a list.

    Raises:
        ValueError: if it is neither.
        RecursionError: if it is nested too deeply.
    """
    try:
        return json.loads(text)
    except ValueError:
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError):  # as NumPy prints a list
            pass
        raise


def _message(message: Any, what: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
        raise RowError(f"{what} is no chat message with a role: {describe(message)}")
    content = message.get("content")
    if isinstance(content, list) and content:
        content = "".join(_text_part(part, what) for part in content)
    elif content is None and (message.get("tool_calls") or message.get("function_call")):
        content = ""
    if not isinstance(content, str):
        raise RowError(f"{what} has no text content: {describe(content)}")
    rest = {key: value for key, value in message.items() if value is not None}
    speaker = message["role"].lower()
    if speaker in CALLERS:
        rest["tool_calls"], content = _calls(content, what, speaker), ""
    rest["role"] = ROLES.get(speaker, message["role"])
    return _json_like({**rest, "content": encodable(content, what)}, what)


def _text_part(part: Any, what: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else None
    raise RowError(f"{what} holds a part that is no text: {describe(kind if isinstance(kind, str) else part)}")


def _json_like(value: Any, what: str) -> Any:
    """The value, if all it holds could stand in a JSON file."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            waiting += [*found.keys(), *found.values()]
        elif isinstance(found, list):
            waiting += found
        elif isinstance(found, str):
            encodable(found, what)
        elif not (found is None or isinstance(found, bool | int | float)):
            raise RowError(f"{what} holds {describe(found)}")
    return value


def _calls(text: str, what: str, speaker: str) -> list[dict[str, Any]]:
    """The calls of a turn of :data:`CALLERS`: JSON of one object with name and arguments, or of a list of them."""
    calls = parse_json(text, f"{what} is from {speaker} and", RowError)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise RowError(f"{what} is from {speaker} and names no function: {describe(text)}")
    for call in calls:
        encodable(json.dumps(call, ensure_ascii=False), what)
    return [{"type": "function", "function": call} for call in calls]
