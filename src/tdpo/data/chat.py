"""Chats as text: the template's rendering, cut into prompt and response, with the user's words kept words."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jinja2

from tdpo.data.calls import as_json_text, as_object, map_arguments, without_nulls
from tdpo.data.formats import RowError
from tdpo.data.omissions import (
    CALLS,
    CONTENT,
    NAMES,
    THOUGHTS,
    TOOLS,
    Chat,
    Leaf,
    OmissionFinder,
    leaves_of,
    leaves_of_tools,
)
from tdpo.data.templates import TEMPLATES
from tdpo.errors import UserError
from tdpo.types import Message

logger = logging.getLogger("tdpo")

OPEN, CLOSE = "\ue000", "\ue001"
"""Private-use characters around the number of a text that stands for itself, see :meth:`ChatRenderer.pieces`."""
RESPONSE = "\ue002"
"""Stands for a response's content where only its place is wanted."""
ADVICE = "give another template with --chat_template_path, or convert the row"
REFUSES = "the chat template refuses a chat"
OMITS_TOOLS = "the chat template leaves out the tools"
ASKS_IF_DEFINED = re.compile(r"(?<![\w.])([A-Za-z_]\w*) is (?:not )?defined")
"""How templates look for arguments that need not be given."""


@dataclass(frozen=True)
class Piece:
    """Text that is encoded in one go.

    Attributes:
        text: The text.
        literal: Whether special-token text in it is plain text; otherwise it is the tokens it names.
        continues: Whether it goes on where another text ended, so that no space is put before it.
    """

    text: str
    literal: bool = True
    continues: bool = False


@dataclass(frozen=True)
class RenderedChat:
    """A chat cut in two, with marks in place of special-token text of the user's.

    Attributes:
        prompt: All before the response.
        responses: The responses, each through its own end where the template ends it.
        ended: Whether the template did, by each response.
        left_out: What the template leaves out of the chat though the row can be used, in words.
    """

    prompt: str
    responses: tuple[str, ...]
    ended: tuple[bool, ...]
    left_out: tuple[str, ...] = ()


class FormOfCalls(NamedTuple):
    """How a template expects tool calls.

    Attributes:
        null_content: Whether it shows them only of a message whose content is null.
        as_text: Whether it expects their arguments as JSON text, not as an object.
    """

    null_content: bool
    as_text: bool


class ChatRenderer:
    """Renders chats with a tokenizer's template.

    Args:
        tokenizer: A transformers tokenizer.
        arguments: Further arguments of the template for every chat; a row's own win.
    """

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.arguments = dict(arguments or {})
        self._omissions = OmissionFinder(lambda messages, tools, more: self._template(messages, False, tools, more))
        self._warned = False

    def prompt(self, messages: Sequence[Message], tools: Any = None, arguments: dict[str, Any] | None = None) -> str:
        """Renders a prompt as the model is asked it, through the words that make it answer.

        Raises:
            RowError: if the template refuses the chat.
            UserError: if there is no template.
        """
        chat = self._prepared(messages, tools)
        return self._template(chat.messages, True, chat.tools, {**self.arguments, **(arguments or {})})

    def chat(
        self,
        messages: Sequence[Message],
        responses: Sequence[Sequence[Message]],
        tools: Any = None,
        arguments: dict[str, Any] | None = None,
        names: Sequence[str] = ("the response",),
    ) -> RenderedChat:
        """Renders a prompt and responses to it.

        The response is what a rendering with it adds to the rendering of the prompt. Where a template renders the
        prompt differently once a response follows, everything up to the response's own words is the prompt, as it
        stands there; the first time, a warning says so.

        Args:
            messages: The prompt.
            responses: At least one response.
            tools: Tools that the template shows the model.
            arguments: The row's own arguments of the template.
            names: What messages call the responses.

        Raises:
            RowError: if the template refuses the chat, leaves out of it what the response rests on, or renders it so
                that nothing divides prompt and response.
            UserError: if there is no template.
        """
        more = {**self.arguments, **(arguments or {})}
        asking = self._prepared(messages, tools)
        prompt = self._template(asking.messages, True, asking.tools, more)
        chats = [asking._replace(messages=[*asking.messages, *self._prepared(r).messages]) for r in responses]
        wholes = [self._template(chat.messages, False, chat.tools, more) for chat in chats]
        if not all(whole.startswith(prompt) for whole in wholes):
            asked, prompt = prompt, self._before_content(asking, responses[0][0]["role"], more)
            if not all(whole.startswith(prompt) for whole in wholes):
                raise RowError(self._undivided(asked, asking, wholes, more))
            self._warn(asked, prompt)
        left_out = self._left_out(asking, chats, wholes, prompt, more, names)
        cut = [self.through_end(whole[len(prompt) :]) for whole in wholes]
        for name, (text, _) in zip(names, cut, strict=True):
            if not self._special_pattern.sub("", text).strip():
                raise RowError(f"the chat template renders {name} as nothing but its end token; {ADVICE}")
        return RenderedChat(prompt, tuple(text for text, _ in cut), tuple(ended for _, ended in cut), left_out)

    def pieces(self, rendered: str, continues: bool = False) -> list[Piece]:
        """What a rendering is made of: the template's text, whose special tokens are special, and the user's."""
        pieces: list[Piece] = []
        for place, text in enumerate(re.split(f"{OPEN}([0-9]+){CLOSE}", rendered)):
            literal = place % 2 == 1
            # A template that cuts text can leave half a mark; the user's own such characters are marked themselves.
            text = self._literals[int(text)] if literal else text.replace(OPEN, "").replace(CLOSE, "")
            if text:
                pieces.append(Piece(text, literal, continues or bool(pieces)))
        return pieces

    def words(self, rendered: str) -> str:
        """A rendering as a person reads it: the user's own text in place of the marks."""
        return "".join(piece.text for piece in self.pieces(rendered))

    @cached_property
    def special(self) -> list[str]:
        """Special-token texts, the longest first."""
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return sorted({*added, *self.tokenizer.all_special_tokens}, key=len, reverse=True)

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.special)) or r"(?!)")

    @cached_property
    def _literals(self) -> list[str]:
        """Texts that marks stand for, by their number: special tokens, and the marks' own characters."""
        return [*self.special, OPEN, CLOSE, RESPONSE]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {text: number for number, text in enumerate(self._literals)}

    @cached_property
    def _literal_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(text) for text in self._literals))

    def _protect(self, value: Any) -> Any:
        """Puts marks in place of special-token text in the user's words, so that a template cannot revive it."""
        if isinstance(value, str):
            return self._literal_pattern.sub(lambda found: f"{OPEN}{self._numbers[found[0]]}{CLOSE}", value)
        if isinstance(value, list):
            return [self._protect(item) for item in value]
        if isinstance(value, dict):
            return {name: value[name] if name == "role" else self._protect(value[name]) for name in value}
        return value

    def _prepared(self, messages: Sequence[Message], tools: Any = None) -> Chat:
        """Returns a chat as the template gets it: calls in its form, special-token text of the user's marked."""
        return Chat([self._protect(self._in_form(m)) for m in messages], self._protect(without_nulls(tools)))

    def _in_form(self, message: Message) -> Message:
        """Returns a message with its tool calls and content in the form that the template shows."""
        if message.get("tool_calls"):
            form = self._form_of_calls
            message = map_arguments(message, as_object)
            if form.as_text:
                message = map_arguments(message, as_json_text)
            if form.null_content and not message["content"].strip():
                return {**message, "content": None}
        if self._content_in_parts and isinstance(message.get("content"), str):
            return {**message, "content": [{"type": "text", "text": message["content"]}]}
        return message

    @cached_property
    def _form_of_calls(self) -> FormOfCalls:
        """The first form in which the template shows a tool call, not as Python would print it."""
        arguments = {"place": "qz1kv"}
        for null_content, as_text in itertools.product((False, True), repeat=2):
            function = {"name": "qz0kv", "arguments": json.dumps(arguments) if as_text else arguments}
            call = {"id": "000000001", "type": "function", "function": function}
            shown = self._probe({"content": None if null_content else "", "tool_calls": [call]})
            if "qz1kv" in shown and str(arguments) not in shown:
                return FormOfCalls(null_content, as_text)
        return FormOfCalls(False, False)

    @cached_property
    def _content_in_parts(self) -> bool:
        """Whether the template shows content only as a list of parts, as those of models that see images may."""
        if "qz0kv" in self._probe({"content": "qz0kv"}):
            return False
        parts = [{"type": "text", "text": "qz0kv"}]
        shown = self._probe({"content": parts})
        return "qz0kv" in shown and str(parts) not in shown

    def _probe(self, answer: Message) -> str:
        """Renders an assistant's message after a user's; empty if the template refuses it."""
        shown = ""
        for question in ("a", [{"type": "text", "text": "a"}]):
            messages = [{"role": "user", "content": question}, {"role": "assistant", **answer}]
            with contextlib.suppress(RowError):
                shown = shown or self._template(messages, False, None, self.arguments)
        return shown

    def _template(
        self, messages: list[Message], generation_prompt: bool, tools: Any, arguments: dict[str, Any] | None
    ) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(
                "the dataset holds chat messages and the tokenizer has no chat template: give one with "
                f"--chat_template_path (a Jinja file, or one of {', '.join(TEMPLATES)}), or text columns instead of "
                "messages; a text in 'question', 'query', 'problem', 'input' or 'instruction' is a user's turn, which "
                "--columns prompt=question takes as it stands"
            )
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **(arguments or {}),
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise RowError(f"{REFUSES} with the roles {roles}: {error}") from error

    def _before_content(self, asking: Chat, role: str, arguments: dict[str, Any]) -> str:
        """Returns the rendering up to where a response's first words would stand."""
        answer = self._in_form({"role": role, "content": RESPONSE})
        rendered = self._template([*asking.messages, answer], False, asking.tools, arguments)
        before, mark, _ = rendered.rpartition(RESPONSE)
        if not mark:
            raise RowError(f"the chat template leaves out the response; {ADVICE}")
        return before

    def _undivided(self, asked: str, asking: Chat, wholes: Sequence[str], arguments: dict[str, Any]) -> str:
        """Describes a prompt that no response continues, with the argument of the template that would change it."""
        message = (
            "the chat template renders the prompt differently for different responses, so they cannot be told from "
            f"it; it ends in {self.words(asked[-40:])!r}."
        )
        names = dict.fromkeys(ASKS_IF_DEFINED.findall(self._source))
        for name, value in itertools.product(names, (True, False)):
            try:
                prompt = self._template(asking.messages, True, asking.tools, {**arguments, name: value})
            except RowError:
                continue
            if all(whole.startswith(prompt) for whole in wholes):
                return (
                    f"{message} With {name}={value} it ends in {self.words(prompt[-20:])!r}, which the responses "
                    f"continue: give --chat_template_kwargs {name}={str(value).lower()}, or the row's own field "
                    "chat_template_kwargs"
                )
        return f"{message} Give another template with --chat_template_path"

    @cached_property
    def _source(self) -> str:
        """The template's text, of all templates where there are several by name."""
        template = self.tokenizer.chat_template
        return "\n".join(template.values()) if isinstance(template, Mapping) else str(template or "")

    def _left_out(
        self,
        asking: Chat,
        chats: Sequence[Chat],
        wholes: Sequence[str],
        prompt: str,
        arguments: dict[str, Any],
        names: Sequence[str],
    ) -> tuple[str, ...]:
        """Lists in words what the template leaves out.

        Raises:
            RowError: if that is what the preference rests on.
        """
        first = len(asking.messages)
        asked = [*leaves_of_tools(asking.tools), *leaves_of(asking.messages)]
        found = {
            f"the chat template does not use the argument {name!r}": None
            for name in arguments
            if not re.search(rf"\b{re.escape(name)}\b", self._source)
        }
        for number, (chat, whole, name) in enumerate(zip(chats, wholes, names, strict=True)):
            answered = leaves_of(chat.messages[first:], first)
            # The prompt is the same before every response.
            lost = self._omissions.find(chat, asked, answered, whole, len(prompt), arguments, both=number == 0)
            found |= {self._omission(leaf, chat, first, name): None for leaf in lost}
        if OMITS_TOOLS in found:
            found.pop(OMITS_TOOLS.replace("the tools", "'description' of the tools"), None)
        return tuple(found)

    def _omission(self, leaf: Leaf, chat: Chat, first: int, name: str) -> str:
        """Describes a text that is left out; raises where a response or what it answers is not what the row says."""
        if leaf.message >= first and leaf.kind in (CALLS, CONTENT):
            field = leaf.path[0]
            raise RowError(f"the chat template leaves out {field!r} of {name} ({self._shortened(leaf)}); {ADVICE}")
        if leaf.message == first - 1 and leaf.kind == CONTENT:
            role = chat.messages[leaf.message]["role"]
            raise RowError(
                f"the chat template leaves out the turn of role {role!r} that is answered ({self._shortened(leaf)}); "
                f"{ADVICE}"
            )
        part = {
            TOOLS: "the tools" if leaf.path[-1] == "name" else f"{leaf.path[-1]!r} of the tools",
            CALLS: f"{leaf.path[0]!r} of earlier turns",
            CONTENT: f"turns of role {chat.messages[leaf.message]['role']!r}",
            NAMES: "names of speakers ('name')",
            THOUGHTS: f"thoughts ({leaf.path[0]!r}) of {'the response' if leaf.message >= first else 'earlier turns'}",
        }
        return f"the chat template leaves out {part[leaf.kind]}"

    def _shortened(self, leaf: Leaf) -> str:
        text = self.words(str(leaf.text))
        return repr(text if len(text) <= 40 else text[:40] + "...")

    def through_end(self, rendered: str) -> tuple[str, bool]:
        """Returns a response through the special token that ends it but for white space, and whether there is one."""
        end = max((rendered.rfind(token) + len(token) for token in self.special if token in rendered), default=0)
        ended = end > 0 and not rendered[end:].strip()
        return (rendered[:end], True) if ended else (rendered, False)

    def _warn(self, asked: str, prompt: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "the chat template renders a prompt differently once a response follows: asked alone it ends in %r, "
                "before a response in %r. Training takes the latter; --chat_template_path gives another template",
                self.words(asked[-60:]),
                self.words(prompt[-60:]),
            )
