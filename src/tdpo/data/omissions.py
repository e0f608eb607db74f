"""Finds what a chat template leaves out of a chat, by rendering the chat with other texts in it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

from tdpo.data.formats import RowError
from tdpo.types import Message

TOOLS, CALLS, THOUGHTS, CONTENT, NAMES = "tools", "tool_calls", "thoughts", "content", "names"
FIELDS = {
    "content": CONTENT,
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), THOUGHTS),
    "name": NAMES,
    **dict.fromkeys(("tool_calls", "function_call"), CALLS),
}
"""Kinds of the fields of a message that a rendering must show."""
THOUGHT_AND_ANSWER = re.compile(r"(?:.*?<think>)?(.*)</think>(.*)", re.DOTALL)
WORD = re.compile(r"\S+")
SENTINEL = "qz{}kv"
"""A word that no text holds; letters and digits alone, so that no template changes it."""
Part = tuple[int, str, str]
ADVICE = "give another template with --chat_template_path, or convert the row"
OMITS = "the chat template leaves out"


class Leaf(NamedTuple):
    """A text or number of a chat that its rendering must show.

    Attributes:
        message: Index of the message, -1 for tools.
        kind: One of the kinds of :data:`FIELDS`, or tools.
        path: Keys and indices that lead to it, from the message or the tools.
        text: The text without white space around it, or the number.
        start: Index of the text in the value that the path leads to.
    """

    message: int
    kind: str
    path: tuple[Any, ...]
    text: Any
    start: int = 0

    @property
    def part(self) -> Part:
        """Message, kind and field: leaves of one part are reported as one."""
        if self.kind == CALLS:
            return self.message, CALLS, "arguments" if "arguments" in self.path else "name"
        return self.message, self.kind, self.path[-1 if self.kind == TOOLS else 0]

    def shown_in(self, rendered: str, start: int = 0) -> bool:
        """Returns whether a rendering contains the text as it is, or as JSON has it."""
        if not isinstance(self.text, str):
            return rendered.find(json.dumps(self.text), start) >= 0
        if rendered.find(self.text, start) >= 0:
            return True
        escaped = (json.dumps(self.text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
        return any(rendered.find(text, start) >= 0 for text in escaped)


class Chat(NamedTuple):
    """Messages and tools as a template gets them."""

    messages: list[Message]
    tools: Any

    def replaced(self, leaf: Leaf, text: Any, start: int = 0, length: int | None = None) -> Chat:
        """Returns the chat with ``length`` characters of a leaf replaced, all of them by default."""

        def change(value: Any) -> Any:
            if not isinstance(leaf.text, str):
                return text
            begin = leaf.start + start
            return value[:begin] + text + value[begin + (len(leaf.text) if length is None else length) :]

        if leaf.message < 0:
            return self._replace(tools=_put(self.tools, leaf.path, change))
        return self._replace(messages=_put(self.messages, (leaf.message, *leaf.path), change))

    def leaves(self, first: int = 0) -> list[Leaf]:
        """Returns what a rendering must show of the messages from index ``first`` on; from 0 on, of the tools too."""
        found: list[Leaf] = []
        for index, tool in enumerate((self.tools or ()) if first == 0 else ()):
            inside = isinstance(tool.get("function"), dict)
            described, path = (tool["function"], (index, "function")) if inside else (tool, (index,))
            for name in ("name", "description"):
                if isinstance(described.get(name), str):
                    found += _leaf(-1, TOOLS, (*path, name), described[name])
        for index, message in enumerate(self.messages[first:], first):
            for field, kind in FIELDS.items():
                if field in message and not (kind == NAMES and message["role"] == "tool"):
                    for path, value in _scalars(message[field], (field,)):
                        found += _leaves_of_field(index, message["role"], kind, path, value)
        return found


class OmissionFinder:
    """Finds what a template leaves out; what it does with chats of one shape is found once.

    Args:
        render: Renders a chat with some arguments through the template.
        without_marks: Returns a text of a chat as the user wrote it.
    """

    def __init__(self, render: Callable[[Chat, Any], str], without_marks: Callable[[str], str]) -> None:
        self._render, self._without_marks = render, without_marks
        self._known: dict[Hashable, set[Part]] = {}

    def describe(
        self,
        asking: Chat,
        chats: Sequence[Chat],
        rendered: Sequence[str],
        start: int,
        arguments: Any,
        names: Sequence[str],
    ) -> list[str]:
        """Describes what the template leaves out of a prompt and the responses to it.

        Args:
            asking: The prompt.
            chats: The prompt with each response.
            rendered: Renderings of the chats.
            start: Where the responses begin in them.
            arguments: Further arguments of the template.
            names: Names of the responses in messages.

        Raises:
            RowError: if the preference depends on what is left out.
        """
        first = len(asking.messages)
        asked = asking.leaves()
        found: dict[str, None] = {}
        for number, (chat, whole, name) in enumerate(zip(chats, rendered, names, strict=True)):
            answered = chat.leaves(first)
            always_lost = self._lost_parts(chat, asked + answered, arguments)
            lost: set[Part] = set()
            # The prompt is the same before every response.
            for leaf in answered if number else asked + answered:
                part, begin = leaf.part, start if leaf.message >= first else 0
                if part in lost:
                    continue
                if part in always_lost or not (
                    leaf.shown_in(whole, begin) or self._changes(chat, leaf, whole, begin, arguments)
                ):
                    lost.add(part)
                    found[self._describe_leaf(leaf, chat, first, name)] = None
        if f"{OMITS} the tools" in found:
            found.pop(f"{OMITS} 'description' of the tools", None)
        return list(found)

    def _describe_leaf(self, leaf: Leaf, chat: Chat, first: int, name: str) -> str:
        """Describes a text that is left out; raises where a response or what it answers is not what the row says."""
        text = self._without_marks(str(leaf.text))
        shown = repr(text if len(text) <= 40 else text[:40] + "...")
        field, role, in_response = leaf.path[0], chat.messages[leaf.message]["role"], leaf.message >= first
        if in_response and leaf.kind in (CALLS, CONTENT):
            raise RowError(f"{OMITS} {field!r} of {name} ({shown}); {ADVICE}")
        if leaf.message == first - 1 and leaf.kind == CONTENT:
            raise RowError(f"{OMITS} the turn of role {role!r} that is answered ({shown}); {ADVICE}")
        part = {
            TOOLS: "the tools" if leaf.path[-1] == "name" else f"{leaf.path[-1]!r} of the tools",
            CALLS: f"{field!r} of earlier turns",
            CONTENT: f"turns of role {role!r}",
            NAMES: "names of speakers ('name')",
            THOUGHTS: f"thoughts ({field!r}) of {'the response' if in_response else 'earlier turns'}",
        }
        return f"{OMITS} {part[leaf.kind]}"

    def _lost_parts(self, chat: Chat, leaves: Sequence[Leaf], arguments: Any) -> set[Part]:
        """Returns the parts that the template shows nothing of in chats of this shape, whatever their words are."""
        parts = tuple([leaf.part for leaf in leaves])
        key = tuple([message["role"] for message in chat.messages]), parts, repr(arguments) if arguments else ""
        if key not in self._known:
            # Each text becomes a word of its own, since the template itself may say what the text says.
            for number, leaf in reversed(list(enumerate(leaves))):  # from the end, so that indices before stay
                if isinstance(leaf.text, str):
                    chat = chat.replaced(leaf, SENTINEL.format(number))
            rendered = self._attempt(chat, arguments)
            self._known[key] = {
                leaf.part
                for leaf in chat.leaves()
                if rendered is not None
                and isinstance(leaf.text, str)
                and leaf.text not in rendered
                and not self._changes(chat, leaf, rendered, 0, arguments)
            }
        return self._known[key]

    def _changes(self, chat: Chat, leaf: Leaf, rendered: str, start: int, arguments: Any) -> bool:
        """Returns whether the rendering changes with the leaf.

        Of a text it has to change with the first word, the last, and the first that the rendering lacks, when the word
        is removed and when another takes its place.
        """
        if not isinstance(leaf.text, str):
            return self._attempt(chat.replaced(leaf, 918273), arguments) != rendered
        words = list(WORD.finditer(leaf.text))
        tried = [words[0], words[-1]]
        for word in words:
            found = rendered.find(word[0], start)
            if found < 0:
                tried.insert(0, word)
                break
            start = found + len(word[0])
        for word in dict.fromkeys(tried):
            same_length = ("k" if "q" in word[0] else "q") * len(word[0])
            for text in ("", same_length):
                if self._attempt(chat.replaced(leaf, text, word.start(), len(word[0])), arguments) == rendered:
                    return False
        return True

    def _attempt(self, chat: Chat, arguments: Any) -> str | None:
        try:
            return self._render(chat, arguments)
        except RowError:  # a template may refuse the changed chat, which then says nothing
            return None


def _leaves_of_field(message: int, role: str, kind: str, path: tuple[Any, ...], value: Any) -> list[Leaf]:
    """Returns the leaves of one value of a message; of an assistant's content the thought and the answer."""
    if kind == CALLS:
        return _leaf(message, kind, path, value) if "arguments" in path or path[-1] == "name" else []
    if not isinstance(value, str) or path[-1] not in (path[0], "text"):  # of a part of a content, its text
        return []
    both = THOUGHT_AND_ANSWER.fullmatch(value) if role == "assistant" and "</think>" in value else None
    if both is None or kind != CONTENT:
        return _leaf(message, kind, path, value)
    thought = _leaf(message, THOUGHTS, path, both[1], both.start(1))
    return thought + _leaf(message, CONTENT, path, both[2], both.start(2))


def _leaf(message: int, kind: str, path: tuple[Any, ...], value: Any, start: int = 0) -> list[Leaf]:
    """Returns the leaf of a value, or none for white space."""
    if not isinstance(value, str):
        return [Leaf(message, kind, path, value)]
    text = value.strip()
    return [Leaf(message, kind, path, text, start + value.index(text))] if text else []


def _scalars(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields the texts and numbers inside a value; true, false and null are spelled too variously to be looked for."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _scalars(item, (*path, key))
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield path, value


def _put(value: Any, path: Sequence[Any], change: Callable[[Any], Any]) -> Any:
    """Returns a copy of nested lists and objects with one item changed."""
    if not path:
        return change(value)
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _put(value[path[0]], path[1:], change)
    return copy
