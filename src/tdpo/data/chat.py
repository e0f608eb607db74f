"""Chats as text: the template's rendering, cut into prompt and response, with the user's words kept words."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2

from tdpo.data.formats import RowError
from tdpo.data.templates import TEMPLATES
from tdpo.errors import UserError
from tdpo.types import Message

logger = logging.getLogger("tdpo")

OPEN, CLOSE = "\ue000", "\ue001"
"""Private-use characters around the number of a text that stands for itself, see :meth:`ChatRenderer.pieces`."""
CONTENT = "\ue002"
"""Stands for a response's content where only its place is wanted."""


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
    """

    prompt: str
    responses: tuple[str, ...]
    ended: tuple[bool, ...]


class ChatRenderer:
    """Renders chats with a tokenizer's template.

    Args:
        tokenizer: A transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._warned = False

    def prompt(self, messages: Sequence[Message], tools: Any = None, arguments: dict[str, Any] | None = None) -> str:
        """A prompt as the model is asked it, through the words that make it answer.

        Raises:
            RowError: if the template refuses the chat.
            UserError: if there is no template.
        """
        return self._render(messages, True, tools, arguments)

    def chat(
        self,
        messages: Sequence[Message],
        responses: Sequence[Sequence[Message]],
        tools: Any = None,
        arguments: dict[str, Any] | None = None,
    ) -> RenderedChat:
        """A prompt and responses to it.

        The response is what a rendering with it adds to the rendering of the prompt. Where a template renders the
        prompt differently once a response follows, everything up to the response's own words is the prompt, as it
        stands there; the first time, a warning says so.

        Raises:
            RowError: if the template refuses the chat, or no place of it divides prompt and response.
            UserError: if there is no template.
        """
        prompt = self._render(messages, True, tools, arguments)
        wholes = [self._render([*messages, *response], False, tools, arguments) for response in responses]
        if not all(whole.startswith(prompt) for whole in wholes):
            asked, prompt = prompt, self._before_content(messages, responses, tools, arguments)
            if not all(whole.startswith(prompt) for whole in wholes):
                raise RowError(
                    "the chat template renders the prompt differently for different responses, so they cannot be told "
                    f"from it; it ends in {asked[-40:]!r}. Give another template with --chat_template_path"
                )
            self._warn(asked, prompt)
        cut = [self._through_end(whole[len(prompt) :]) for whole in wholes]
        if not all(text.strip() for text, _ in cut):
            raise RowError("the chat template leaves nothing of a response")
        return RenderedChat(prompt, tuple(text for text, _ in cut), tuple(ended for _, ended in cut))

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
    def _literals(self) -> list[str]:
        """Texts that marks stand for, by their number: special tokens, and the marks' own characters."""
        return [*self.special, OPEN, CLOSE, CONTENT]

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

    def _render(
        self, messages: Sequence[Message], generation_prompt: bool, tools: Any, arguments: dict[str, Any] | None
    ) -> str:
        return self._template([self._protect(message) for message in messages], generation_prompt, tools, arguments)

    def _template(
        self, messages: list[Message], generation_prompt: bool, tools: Any, arguments: dict[str, Any] | None
    ) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(
                "the dataset holds chat messages and the tokenizer has no chat template: give one with "
                f"--chat_template_path (a Jinja file, or one of {', '.join(TEMPLATES)}), or text columns instead of "
                "messages"
            )
        if self._wants_parts:
            messages = [_in_parts(message) for message in messages]
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=self._protect(tools),
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **(arguments or {}),
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise RowError(f"the chat template refuses a chat with the roles {roles}: {error}") from error

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template renders contents as lists of parts alone, as those of some processors do.

        Such a template renders nothing of a content that is a text, without an error.
        """
        chat = {"role": "user", "content": CONTENT}
        try:
            plain, parts = (self.tokenizer.apply_chat_template([c], tokenize=False) for c in (chat, _in_parts(chat)))
        except (jinja2.TemplateError, TypeError, ValueError, KeyError):
            return False
        return CONTENT not in plain and CONTENT in parts

    def _before_content(
        self,
        messages: Sequence[Message],
        responses: Sequence[Sequence[Message]],
        tools: Any,
        arguments: dict[str, Any] | None,
    ) -> str:
        """The rendering up to where a response's first words would stand."""
        protected = [self._protect(message) for message in messages]
        answer = {"role": responses[0][0]["role"], "content": CONTENT}
        before, mark, _ = self._template([*protected, answer], False, tools, arguments).rpartition(CONTENT)
        if not mark:
            raise RowError("the chat template leaves out the response")
        return before

    def _through_end(self, rendered: str) -> tuple[str, bool]:
        """A response through the special token that ends it, if only white space follows one; whether one did."""
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


def _in_parts(message: Message) -> Message:
    """A message whose content is a list of one text part, where it is a text."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message
