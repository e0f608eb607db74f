"""Finds what a chat template leaves out of a chat, by rendering it with and without each text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

from tdpo.data.formats import RowError
from tdpo.types import Message

Kind = str
TOOLS, CALLS, THOUGHTS, CONTENT, NAMES = "tools", "tool_calls", "thoughts", "content", "names"
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message that hold what was thought before its content."""
THOUGHT_END = "</think>"
WORD = re.compile(r"\S+")
SENTINEL = "qz{}kv"
"""A word that no text holds; letters and digits alone, so that no template changes it."""
Part = tuple[int, Kind, str]
ADVICE = "give another template with --chat_template_path, or convert the row"
OMITS = "the chat template leaves out"


class Leaf(NamedTuple):
    """A text or number of a chat that its rendering must show.

    Attributes:
        part: What is left out or shown as one: index of the message (-1 for tools), kind, and the field, of calls
            and tools whether it is a name.
        path: Keys and indices that lead to it, from the tools or the message.
        text: The text, without white space around it, or the number.
        start: Where the text begins in the value the path leads to.
    """

    part: Part
    path: tuple[Any, ...]
    text: Any
    start: int = 0

    @property
    def message(self) -> int:
        """Index of the message; -1 for tools."""
        return self.part[0]

    @property
    def kind(self) -> Kind:
        """Which kind of part it belongs to."""
        return self.part[1]

    def shown_in(self, rendered: str, start: int = 0) -> bool:
        """Returns whether a rendering holds the text as it is, or as JSON has it."""
        if type(self.text) is str:
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
        render: Renders a chat with some arguments through the template.
        without_marks: Returns a text of a chat as the user wrote it.
    """

    def __init__(self, render: Callable[[Chat, Any], str], without_marks: Callable[[str], str]) -> None:
        self._render, self._without_marks = render, without_marks
        self._known: dict[Hashable, frozenset[Part]] = {}

    def describe(
        self,
        asking: Chat,
        chats: Sequence[Chat],
        rendered: Sequence[str],
        start: int,
        arguments: Any,
        names: Sequence[str],
    ) -> list[str]:
        """Lists in words what the template leaves out of a prompt and the responses to it.

        Args:
            asking: The prompt.
            chats: The prompt with each response.
            rendered: Their renderings.
            start: Where the responses begin in them.
            arguments: Further arguments of the template.
            names: Names of the responses in messages.

        Raises:
            RowError: if that is what the preference rests on.
        """
        first = len(asking.messages)
        asked = [*leaves_of_tools(asking.tools), *leaves_of(asking.messages)]
        found: dict[str, None] = {}
        for number, (chat, whole, name) in enumerate(zip(chats, rendered, names, strict=True)):
            answered = leaves_of(chat.messages[first:], first)
            # The prompt is the same before every response.
            lost = self._find(chat, asked, answered, whole, start, arguments, both=number == 0)
            found |= {self._omission(leaf, chat, first, name): None for leaf in lost}
        if f"{OMITS} the tools" in found:
            found.pop(f"{OMITS} 'description' of the tools", None)
        return list(found)

    def _omission(self, leaf: Leaf, chat: Chat, first: int, name: str) -> str:
        """Describes a text that is left out; raises where a response or what it answers is not what the row says."""
        text = self._without_marks(str(leaf.text))
        shown = repr(text if len(text) <= 40 else text[:40] + "...")
        field, role = leaf.path[0], chat.messages[leaf.message]["role"]
        if leaf.message >= first and leaf.kind in (CALLS, CONTENT):
            raise RowError(f"{OMITS} {field!r} of {name} ({shown}); {ADVICE}")
        if leaf.message == first - 1 and leaf.kind == CONTENT:
            raise RowError(f"{OMITS} the turn of role {role!r} that is answered ({shown}); {ADVICE}")
        part = {
            TOOLS: "the tools" if leaf.path[-1] == "name" else f"{leaf.path[-1]!r} of the tools",
            CALLS: f"{field!r} of earlier turns",
            CONTENT: f"turns of role {role!r}",
            NAMES: "names of speakers ('name')",
            THOUGHTS: f"thoughts ({field!r}) of {'the response' if leaf.message >= first else 'earlier turns'}",
        }
        return f"{OMITS} {part[leaf.kind]}"

    def _find(
        self,
        chat: Chat,
        asked: Sequence[Leaf],
        answered: Sequence[Leaf],
        rendered: str,
        start: int,
        arguments: Any,
        both: bool,
    ) -> list[Leaf]:
        """Returns the leaves that a rendering does not show, one of each part; of the prompt only with ``both``."""
        key = (
            tuple([message["role"] for message in chat.messages]),
            tuple([leaf.part for leaf in asked]),
            tuple([leaf.part for leaf in answered]),
            repr(arguments) if arguments else "",
        )
        lost = self._known.get(key)
        if lost is None:
            lost = self._known[key] = frozenset(self._probe(chat, [*asked, *answered], arguments))
        found: dict[Part, Leaf] = {}
        for leaves, begin in ((asked if both else (), 0), (answered, start)):
            for leaf in leaves:
                if (leaf.part not in lost and leaf.shown_in(rendered, begin)) or leaf.part in found:
                    continue
                if leaf.part in lost or self._is_lost(chat, leaf, rendered, begin, arguments):
                    found[leaf.part] = leaf
        return list(found.values())

    def _probe(self, chat: Chat, leaves: Sequence[Leaf], arguments: Any) -> Iterator[Part]:
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
                    yield leaf.part

    def _is_lost(self, chat: Chat, leaf: Leaf, rendered: str, start: int, arguments: Any) -> bool:
        """Returns whether the rendering stays the same without a word of the leaf, or with another in its place.

        The words are the first, the last, and the first that the rendering lacks.
        """
        if not isinstance(leaf.text, str):
            return self._attempt(chat.replaced(leaf, 918273), arguments) == rendered
        words = list(WORD.finditer(leaf.text))
        for word in dict.fromkeys((*_missing(words, rendered, start), words[0], words[-1])):
            same_length = ("k" if "q" in word[0] else "q") * len(word[0])
            for text in ("", same_length):
                other = chat.replaced(leaf, text, word.start(), len(word[0]))
                if self._attempt(other, arguments) == rendered:
                    return True
        return False

    def _attempt(self, chat: Chat, arguments: Any) -> str | None:
        try:
            return self._render(chat, arguments)
        except RowError:  # a template may refuse the changed chat, which then says nothing
            return None


def _missing(words: Sequence[re.Match[str]], rendered: str, start: int) -> Iterator[re.Match[str]]:
    """Gives the first word that does not follow those before it in a rendering."""
    for word in words:
        found = rendered.find(word[0], start)
        if found < 0:
            yield word
            return
        start = found + len(word[0])


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
            content, path = content[0].get("text"), ("content", 0, "text")  # type: ignore[assignment]
        if isinstance(content, str):
            end = content.rfind(THOUGHT_END) if message["role"] == "assistant" else -1
            if end >= 0:
                begin = content.find("<think>") + len("<think>") if content.find("<think>", 0, end) >= 0 else 0
                found += _leaf(THOUGHTS, number, path, content[begin:end], begin)
                end += len(THOUGHT_END)
                found += _leaf(CONTENT, number, path, content[end:], end)
            else:
                found += _leaf(CONTENT, number, path, content)
        if len(message) > 2:
            for name in THOUGHT_FIELDS:
                if isinstance(message.get(name), str):
                    found += _leaf(THOUGHTS, number, (name,), message[name])
            if isinstance(message.get("name"), str) and message["role"] != "tool":
                found += _leaf(NAMES, number, ("name",), message["name"])
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
                found += _leaf(TOOLS, -1, (*inside, name), described[name])
    return found


def _leaf(kind: Kind, message: int, path: tuple[Any, ...], text: str, start: int = 0) -> list[Leaf]:
    """Returns the leaf of a text, or none for white space."""
    stripped = text.strip()
    field = path[0] if message >= 0 and kind != CALLS else "arguments" if "arguments" in path else path[-1]
    return [Leaf((message, kind, field), path, stripped, start + text.index(stripped))] if stripped else []


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
                    number_leaf = Leaf((number, CALLS, "arguments"), inner, value)
                    yield from _leaf(CALLS, number, inner, value) if isinstance(value, str) else [number_leaf]


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
