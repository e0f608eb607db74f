"""Tools and tool calls in the form a chat template expects, whatever table or file they were read from."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tdpo.data.formats import RowError
from tdpo.types import Message


def without_nulls(value: Any) -> Any:
    """Removes keys whose value is null from objects, at every depth; nulls in lists stay.

    A table gives every object the keys of all rows, so a null there is the same as a missing key. The same
    is removed from JSON, so that a dataset has the same ids in every file format. Nulls inside JSON text stay.

    Examples:
        >>> without_nulls({"city": "Oslo", "unit": None, "enum": ["C", None]})
        {'city': 'Oslo', 'enum': ['C', None]}
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def map_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    """Returns a message whose tool calls have their arguments changed, and no null keys."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not calls:
        return message
    return {**message, "tool_calls": [_map_call(without_nulls(call), change) for call in calls]}


def _map_call(call: Any, change: Callable[[Any], Any]) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _map_call(call["function"], change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call


def as_object(arguments: Any) -> Any:
    """Decodes arguments that are JSON text, OpenAI's form.

    Raises:
        RowError: for text that is not a JSON object.
    """
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments) if arguments.strip() else {}
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RowError(f"field 'tool_calls': arguments {arguments[:60]!r} are not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise RowError(f"field 'tool_calls': arguments {arguments[:60]!r} are not a JSON object")
    return found


def as_json_text(arguments: Any) -> str:
    """Encodes arguments as JSON text, for templates that expect it."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
