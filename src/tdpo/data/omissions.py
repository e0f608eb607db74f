"""Finds what a chat template leaves out of a chat, by rendering it with and without each text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

from tdpo.data.formats import RowError
from tdpo.types import Message

Kind = str
TOOLS, CALLS, THOUGHTS, CONTENT = "tools", "tool_calls", "thoughts", "content"
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message that hold what was thought before its content."""
THOUGHT_END = "</think>"
WORD = re.compile(r"\S+")
SENTINEL = "qz{}kv"
"""A word that no text holds; letters and digits alone, so that no template changes it."""
Render = Callable[[list[Message], Any], str]


class Leaf(NamedTuple):
    """A text or number of a chat that its rendering must show.

    Attributes:
        kind: What part of a row it belongs to.
        message: Index of its message; -1 for tools.
        path: Keys and indices that lead to it, from the tools or the message.
        text: The text, without white space around it, or the number.
        start: Where the text begins in the value the path leads to.
    """

    kind: Kind
    message: int
    path: tuple[Any, ...]
    text: Any
    start: int = 0

    def shown_in(self, rendered: str, start: int = 0) -> bool:
        """Tells whether a rendering holds the text as it is, or as JSON has it."""
        if isinstance(self.text, str):
            if rendered.find(self.text, start) >= 0:
                return True
            escaped = (json.dumps(self.text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
            return any(rendered.find(text, start) >= 0 for text in escaped)
        return rendered.find(json.dumps(self.text), start) >= 0


class Chat(NamedTuple):
    """Messages and tools as a template gets them."""

    messages: list[Message]
    tools: Any

    def replaced(self, leaf: Leaf, text: Any, start: int = 0, length: int | None = None) -> Chat:
        """Returns the chat with ``length`` characters of a leaf replaced, all of them by default."""

        def change(value: Any) -> Any:
            if not (isinstance(value, str) and isinstance(leaf.text, str)):
                return text
            begin = leaf.start + start
            return value[:begin] + text + value[begin + (len(leaf.text) if length is None else length) :]

        if leaf.message < 0:
            return self._replace(tools=_put(self.tools, leaf.path, change))
        return self._replace(messages=_put(self.messages, (leaf.message, *leaf.path), change))


class OmissionFinder:
    """Finds what a template leaves out; what it does with a kind of chat is found out once.

    Args:
        render: Renders messages and tools through the template.
    """

    def __init__(self, render: Callable[..., str]) -> None:
        self._render = render
        self._known: dict[Hashable, frozenset[tuple[int, Kind]]] = {}

    def find(
        self, chat: Chat, leaves: Sequence[Leaf], rendered: str, arguments: Any, start: int = 0, first: int = 0
    ) -> list[Leaf]:
        """Returns the leaves that a rendering does not show, one of each part.

        Args:
            chat: What was rendered.
            leaves: All of its leaves.
            rendered: The rendering.
            arguments: Further arguments of the template.
            start: Where leaves of the messages from ``first`` on are looked for in the rendering.
            first: Index of the first message whose leaves are wanted from there on.
        """
        lost = self._left_out_of_all(chat, leaves, arguments)
        found: dict[tuple[int, Kind], Leaf] = {}
        for leaf in leaves:
            part = (leaf.message, leaf.kind)
            if part in found:
                continue
            if part in lost or not (
                leaf.shown_in(rendered, start if leaf.message >= first else 0)
                or self._matters(chat, leaf, rendered, arguments)
            ):
                found[part] = leaf
        return list(found.values())

    def _left_out_of_all(self, chat: Chat, leaves: Sequence[Leaf], arguments: Any) -> frozenset[tuple[int, Kind]]:
        """Returns the parts that the template shows of no chat with these roles and kinds of parts."""
        key = (
            tuple(message["role"] for message in chat.messages),
            frozenset((leaf.message, leaf.kind) for leaf in leaves),
            repr(arguments) if arguments else "",
        )
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = frozenset(self._probe(chat, leaves, arguments))
        return known

    def _probe(self, chat: Chat, leaves: Sequence[Leaf], arguments: Any) -> Iterator[tuple[int, Kind]]:
        """Renders the chat with a word of its own in every leaf, and looks for those words."""
        words = {}
        for number, leaf in reversed(list(enumerate(leaves))):  # from the end, so that positions before stay
            if isinstance(leaf.text, str):
                words[number] = SENTINEL.format(number)
                chat = chat.replaced(leaf, words[number])
        rendered = self._attempt(chat, arguments)
        if rendered is None:
            return
        for number, word in words.items():
            leaf = leaves[number]
            if word not in rendered:
                where = leaf._replace(text=word, start=_start_in(chat, leaf, word))
                if self._attempt(chat.replaced(where, SENTINEL.format("other")), arguments) == rendered:
                    yield leaf.message, leaf.kind

    def _matters(self, chat: Chat, leaf: Leaf, rendered: str, arguments: Any) -> bool:
        """Tells whether the rendering changes with the leaf and with words at its ends and of those it lacks."""
        if not isinstance(leaf.text, str):
            return self._attempt(chat.replaced(leaf, 918273), arguments) != rendered
        words = list(WORD.finditer(leaf.text))
        missing = next((word for word in words if word[0] not in rendered), None)
        for word in dict.fromkeys(w for w in (missing, words[0], words[-1]) if w is not None):
            other = chat.replaced(leaf, SENTINEL.format("other"), word.start(), len(word[0]))
            if self._attempt(other, arguments) == rendered:
                return False
        return True

    def _attempt(self, chat: Chat, arguments: Any) -> str | None:
        try:
            return self._render(chat.messages, chat.tools, arguments)
        except RowError:  # a template may refuse the changed chat, which then says nothing
            return None


def leaves_of(messages: Sequence[Message], first: int = 0) -> list[Leaf]:
    """Lists what a rendering of messages must show.

    Args:
        messages: The messages.
        first: Index of the first of them in the chat.
    """
    found: list[Leaf] = []
    for number, message in enumerate(messages, first):
        content, path = message.get("content"), ("content",)
        if isinstance(content, list) and len(content) == 1:  # a text as the only part
            content, path = content[0].get("text"), ("content", 0, "text")
        if isinstance(content, str):
            end = content.rfind(THOUGHT_END) if message["role"] == "assistant" else -1
            if end >= 0:
                begin = content.find("<think>") + len("<think>") if content.find("<think>", 0, end) >= 0 else 0
                _add(found, THOUGHTS, number, path, content[begin:end], begin)
                end += len(THOUGHT_END)
                _add(found, CONTENT, number, path, content[end:], end)
            else:
                _add(found, CONTENT, number, path, content)
        if len(message) > 2:
            for name in THOUGHT_FIELDS:
                if isinstance(message.get(name), str):
                    _add(found, THOUGHTS, number, (name,), message[name])
            found += _leaves_of_calls(message, number)
    return found


def leaves_of_tools(tools: Any) -> list[Leaf]:
    """Lists the names and descriptions of tools."""
    found: list[Leaf] = []
    for number, tool in enumerate(tools or ()):
        inside: tuple[Any, ...] = (number, "function") if isinstance(tool.get("function"), dict) else (number,)
        described = tool["function"] if len(inside) > 1 else tool
        for name in ("name", "description"):
            if isinstance(described.get(name), str):
                _add(found, TOOLS, -1, (*inside, name), described[name])
    return found


def _add(found: list[Leaf], kind: Kind, message: int, path: tuple[Any, ...], text: str, start: int = 0) -> None:
    stripped = text.strip()
    if stripped:
        found.append(Leaf(kind, message, path, stripped, start + text.index(stripped)))


def _leaves_of_calls(message: Message, number: int) -> Iterator[Leaf]:
    for name in ("tool_calls", "function_call"):
        calls = message.get(name)
        for index, call in enumerate(calls if isinstance(calls, list) else [calls]):
            if not isinstance(call, dict):
                continue
            path = (name, index) if isinstance(calls, list) else (name,)
            if isinstance(call.get("function"), dict):
                path, call = (*path, "function"), call["function"]
            for key in ("name", "arguments"):
                for inner, value in _scalars(call.get(key), (*path, key)):
                    found: list[Leaf] = []
                    if isinstance(value, str):
                        _add(found, CALLS, number, inner, value)
                        yield from found
                    else:
                        yield Leaf(CALLS, number, inner, value)


def _scalars(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Lists the texts and numbers inside a value; true, false and null are spelled too variously to be looked for."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _scalars(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _scalars(item, (*path, index))
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield path, value


def _put(value: Any, path: Sequence[Any], change: Callable[[Any], Any]) -> Any:
    if not path:
        return change(value)
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _put(value[path[0]], path[1:], change)
    return copy


def _start_in(chat: Chat, leaf: Leaf, word: str) -> int:
    value: Any = chat.tools if leaf.message < 0 else chat.messages[leaf.message]
    for key in leaf.path:
        value = value[key]
    return str(value).index(word)
