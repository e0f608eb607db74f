"""Renders chats with a tokenizer's chat template, in the form of tool calls and content that the template shows."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jinja2

from tdpo.data.calls import as_json_text, as_object, map_arguments
from tdpo.data.formats import RowError
from tdpo.data.omissions import SENTINEL, Chat
from tdpo.data.templates import TEMPLATES
from tdpo.errors import UserError
from tdpo.types import Message

PROBE, ARGUMENT = SENTINEL.format(0), SENTINEL.format(1)


class ChatTemplate:
    """Renders chats with a tokenizer's chat template.

    Args:
        tokenizer: A transformers tokenizer.
        arguments: Arguments of the template under which it is probed.
    """

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any]) -> None:
        self._tokenizer, self._arguments = tokenizer, arguments

    @cached_property
    def source(self) -> str:
        """The template's text, of all templates where there are several by name."""
        template = self._tokenizer.chat_template
        return "\n".join(template.values()) if isinstance(template, Mapping) else str(template or "")

    def render(self, chat: Chat, arguments: Mapping[str, Any], generation_prompt: bool = False) -> str:
        """Renders a chat as text.

        Raises:
            RowError: if the template refuses the chat.
            UserError: if there is no template.
        """
        if not self._tokenizer.chat_template:
            raise UserError(
                "the dataset holds chat messages and the tokenizer has no chat template: give one with "
                f"--chat_template_path (a Jinja file, or one of {', '.join(TEMPLATES)}), or text columns instead of "
                "messages; a text in 'question', 'query', 'problem', 'input' or 'instruction' is a user's turn, which "
                "--columns prompt=question takes as it is"
            )
        try:
            return self._tokenizer.apply_chat_template(
                chat.messages,
                tools=chat.tools,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **arguments,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            roles = ", ".join(message["role"] for message in chat.messages)
            raise RowError(f"the chat template refuses a chat with the roles {roles}: {error}") from error

    def in_form(self, message: Message) -> Message:
        """Returns a message with its tool calls and content in the form that the template shows."""
        if message.get("tool_calls"):
            null_content, as_text = self._form_of_calls
            message = map_arguments(message, as_object)
            if as_text:
                message = map_arguments(message, as_json_text)
            if null_content and not message["content"].strip():
                return {**message, "content": None}
        if self._content_in_parts and isinstance(message.get("content"), str):
            return {**message, "content": [{"type": "text", "text": message["content"]}]}
        return message

    @cached_property
    def _form_of_calls(self) -> tuple[bool, bool]:
        """Whether tool calls are shown only beside a null content, and whether their arguments are JSON text.

        The first form in which the template shows a call, and not as Python would print it.
        """
        arguments = {"place": ARGUMENT}
        for null_content, as_text in itertools.product((False, True), repeat=2):
            function = {"name": PROBE, "arguments": json.dumps(arguments) if as_text else arguments}
            call = {"id": "000000001", "type": "function", "function": function}
            shown = self._probe({"content": None if null_content else "", "tool_calls": [call]})
            if ARGUMENT in shown and str(arguments) not in shown:
                return null_content, as_text
        return False, False

    @cached_property
    def _content_in_parts(self) -> bool:
        """Whether the template shows content only as a list of parts, as those of models that see images may."""
        parts = [{"type": "text", "text": PROBE}]
        if PROBE in self._probe({"content": PROBE}):
            return False
        shown = self._probe({"content": parts})
        return PROBE in shown and str(parts) not in shown

    def _probe(self, answer: Message) -> str:
        """Renders an assistant's message after a user's; empty if the template refuses it."""
        for question in ("a", [{"type": "text", "text": "a"}]):
            messages = [{"role": "user", "content": question}, {"role": "assistant", **answer}]
            with contextlib.suppress(RowError):
                if shown := self.render(Chat(messages, None), self._arguments):
                    return shown
        return ""
