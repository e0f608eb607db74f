"""Readers of a row's values: texts, chats and numbers, or a :class:`RowError` naming the field and what was found."""

from __future__ import annotations

import ast
import contextlib
import json
import math
import numbers
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

from tdpo.config.row_spec import parse_json
from tdpo.config.tokens import NOT_OF_A_ROW
from tdpo.data.formats.report import RowError
from tdpo.data.sources import SourceRow, describe
from tdpo.errors import UserError
from tdpo.types import Message, Text

CHAT_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*(["'])(role|content|from|value)\1\s*:""")
"""Beginning of a chat that a table of texts holds."""
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "observation": "tool", "tool": "tool", "function_call": "assistant", "developer": "developer", "prompter": "user",
    "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "tool_call": "assistant", "tool_response": "tool",
}  # fmt: skip
"""Roles by the names of speakers, in ShareGPT's turns and as others write them into ``role``."""
CALLERS = ("function_call", "tool_call")
"""Speakers whose turns are calls of tools as JSON, in LLaMA-Factory's data and ms-swift's."""
PAIR_FIELDS = ("prompt", "chosen", "rejected")
ANSWER_FIELDS = ("completion", "completions", "reward", "score", "scores", "rank", "ranks", "instruction", "response")
ASKING_ROLES = ("user", "system", "developer", "tool")
"""Roles whose turn no response can begin with."""


def first_of(fields: dict[str, Any], names: Sequence[str]) -> str:
    """Returns the first of some names whose value is not null, or that a row has, or the first of all."""
    there = next((name for name in names if fields.get(name) is not None), None)
    return there or next((name for name in names if name in fields), names[0])


def as_text(value: Any, what: str) -> Text:
    """Reads a text or chat messages.

    Messages are as they were found, except for what means the same: a key whose value is null is left out (tables
    cannot distinguish it from a missing one), content given as a list of text parts is one text, and a chat that a
    table of texts holds as JSON is that chat.

    Raises:
        RowError: for any other value.
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
        return plain_text(value, what)
    if isinstance(value, dict) and ("role" in value or "from" in value):
        return [_message(value, what)]
    if not isinstance(value, list):
        raise RowError(f"{what} must be a text or a list of chat messages, found {describe(value)}")
    if not value:
        raise RowError(f"{what} is an empty list of messages")
    return [_message(message, f"{what}, message {number}") for number, message in enumerate(value, 1)]


def field_of(row: SourceRow, name: str, read: Callable[[Any, str], Any] = as_text) -> Any:
    """Reads a column as text or chat, or with another reader of this module.

    Args:
        row: The row.
        name: The column.
        read: Reader of a value and the words that messages name it by.

    Raises:
        RowError: if the column is missing, or of another type.
    """
    if name not in row.fields:
        raise RowError(f"field {name!r} is missing")
    return read(row.fields[name], f"field {name!r}")


def read_turns(value: Any, what: str) -> list[Message]:
    """Reads a list of turns, each with ``from`` and ``value`` or with ``role`` and ``content``.

    Raises:
        RowError: naming the turn that is neither.
    """
    if not isinstance(value, list) or not value:
        raise RowError(f"{what} must be a list of turns, found {describe(value)}")
    turns: Any = as_text(value, what)
    return turns


def plain_text(value: Any, what: str) -> str:
    """Reads a text that can be encoded.

    Raises:
        RowError: for any other value, and for a lone surrogate.
    """
    if not isinstance(value, str):
        raise RowError(f"{what} must be a text, found {describe(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{what} holds half a character (a lone surrogate) at position {error.start}") from error
    return value


def number(value: Any, what: str) -> float:
    """Reads a finite number, also where a table of texts spells it.

    Raises:
        RowError: for any other value.
    """
    if isinstance(value, str | numbers.Real | Decimal) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            if math.isfinite(found := float(value)):
                return found
    raise RowError(f"{what} must be a finite number, found {describe(value)}")


def assistant_turn(text: Text) -> list[Message]:
    """Returns a text as the assistant's turn, and messages as they are."""
    return [{"role": "assistant", "content": text}] if isinstance(text, str) else text


def chat_options(row: SourceRow, prompt: Text) -> dict[str, Any]:
    """Reads the row's ``tools`` and ``chat_template_kwargs``, objects or JSON, as further fields of a record.

    Raises:
        RowError: if they are of another type, or beside a prompt that is a text and could not use them.
    """
    found = {}
    for name, kind, meaning in (("tools", list, "a list of tools"), ("chat_template_kwargs", dict, "an object")):
        value = row.fields.get(name)
        if isinstance(value, str) and value.strip():
            value = parse_json(value, f"field {name!r} is", RowError)
        if isinstance(value, dict):  # a table fills the arguments that only other rows have with null
            value = {key: inner for key, inner in value.items() if inner is not None}
        if not value:  # null, an empty text of a table, an empty list
            continue
        if not isinstance(value, kind):
            raise RowError(f"field {name!r} must be {meaning}, found {describe(value)}")
        if isinstance(prompt, str):
            raise RowError(f"field {name!r} is for chats, and the prompt is a text")
        found[name] = _json_like(value, f"field {name!r}")
    for index, tool in enumerate(found.get("tools", ()), 1):
        if not isinstance(tool, dict):
            raise RowError(f"field 'tools', tool {index} must be an object, found {describe(tool)}")
    for key in found.get("chat_template_kwargs", ()):
        if not isinstance(key, str) or key in NOT_OF_A_ROW:
            raise RowError(f"field 'chat_template_kwargs' sets {key!r}, which is not for the template")
    return found


def is_empty(text: Text) -> bool:
    """Returns whether a text is white space, or the last of some messages is and calls no tool."""
    if isinstance(text, str):
        return not text.strip()
    return not (text[-1]["content"].strip() or text[-1].get("tool_calls") or text[-1].get("function_call"))


def mixed_kinds(**texts: Text) -> RowError:
    """Returns the error for texts beside chat messages, naming the kind of each."""
    found = ", ".join(f"{name} {'text' if isinstance(text, str) else 'messages'}" for name, text in texts.items())
    return RowError(f"texts and chat messages are mixed: {found}")


def without(row: SourceRow, names: Sequence[str]) -> SourceRow:
    """Returns the row without these columns."""
    if not names:
        return row
    return replace(row, fields={name: value for name, value in row.fields.items() if name not in names})


def renamed(row: SourceRow, columns: Sequence[tuple[str, str]]) -> SourceRow:
    """Returns the row with its columns under the names of a format's fields.

    A column that the row itself does not have is looked for in the objects its lists hold.

    Raises:
        RowError: for a column that is nowhere.
        UserError: if field and column are the wrong way round.
    """
    moved = {column for _, column in columns}
    fields = {key: value for key, value in row.fields.items() if key not in moved}
    for name, column in columns:
        swapped = column in PAIR_FIELDS or (column in ANSWER_FIELDS and column not in row.fields)
        if name in row.fields and name not in moved and name not in PAIR_FIELDS and swapped:
            raise UserError(
                f"--columns {name}={column} is the wrong way round: the row has a column {name!r}, and {column!r} is "
                f"what formats call a field; --columns {column}={name} takes the column {name!r} for it ({row.source})"
            )
        if column in row.fields:
            fields[name] = row.fields[column]
            continue
        inside = {key: value for key, value in fields.items() if isinstance(value, list) and any(_has(column, value))}
        if not inside:
            raise RowError(f"field {column!r}, which --columns takes for {name!r}, is missing")
        for key, entries in inside.items():
            fields[key] = [
                {**{key: value for key, value in entry.items() if key != column}, name: entry[column]} if has else entry
                for entry, has in zip(entries, _has(column, entries), strict=True)
            ]
    return replace(row, fields=fields)


def parsed_chat(text: str) -> Any:
    """Parses a chat that a table of texts holds as JSON, or as Python prints a list.

    Raises:
        ValueError: if it is neither.
        RecursionError: if it is nested too deeply.
    """
    try:
        return json.loads(text)
    except ValueError:
        with contextlib.suppress(ValueError, SyntaxError, MemoryError):  # as NumPy prints a list
            return ast.literal_eval(text.strip())
        raise


def _has(key: str, entries: list[Any]) -> Iterator[bool]:
    return (isinstance(entry, dict) and key in entry for entry in entries)


def _message(turn: Any, what: str) -> Message:
    """Reads a turn with ``from`` and ``value``, or a message with ``role`` and ``content``, as a message.

    Raises:
        RowError: for any other value.
    """
    if isinstance(turn, dict) and turn.get("from") is not None:
        if str(turn["from"]).lower() not in ROLES:
            raise RowError(f"{what} must be 'from' one of {', '.join(ROLES)}, found {describe(turn['from'])}")
        turn = {"role": turn["from"], "content": plain_text(turn.get("value"), f"{what}, 'value'")}
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or not turn["role"]:
        raise RowError(f"{what} must be a message with 'role' or a turn with 'from', found {describe(turn)}")
    content, speaker = turn.get("content"), turn["role"].lower()
    if isinstance(content, list) and content:
        content = "".join(_text_part(part, what) for part in content)
    elif content is None and (turn.get("tool_calls") or turn.get("function_call")):
        content = ""
    if not isinstance(content, str):
        raise RowError(f"{what} has no text content: {describe(content)}")
    message = {key: value for key, value in turn.items() if value is not None}
    if speaker in CALLERS:
        message["tool_calls"], content = _calls(content, f"{what} is from {speaker} and"), ""
    message |= {"role": ROLES.get(speaker, turn["role"]), "content": plain_text(content, what)}
    return message if len(message) == 2 else _json_like(message, what)


def _text_part(part: Any, what: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else None
    raise RowError(f"{what} holds a part without text: {describe(kind if isinstance(kind, str) else part)}")


def _calls(text: str, what: str) -> list[dict[str, Any]]:
    """Reads the calls of a turn of :data:`CALLERS`: JSON of one object with name and arguments, or a list of them."""
    calls = parse_json(text, what, RowError)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise RowError(f"{what} names no function: {describe(text)}")
    return [{"type": "function", "function": call} for call in calls]


def _json_like(value: Any, what: str) -> Any:
    """Returns the value, if a JSON file could hold all of it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise RowError(f"{what} cannot be written as JSON: {error}") from error
    return value
