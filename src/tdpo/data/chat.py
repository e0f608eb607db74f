"""Renders chats and divides them into prompt and response; special-token text in the user's words stays text."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tdpo.data.calls import without_nulls
from tdpo.data.formats import RowError
from tdpo.data.omissions import ADVICE, Chat, OmissionFinder
from tdpo.data.special_tokens import RESPONSE, SpecialTokens
from tdpo.data.template import ChatTemplate
from tdpo.types import Message

logger = logging.getLogger("tdpo")

ASKS_IF_DEFINED = re.compile(r"(?<![\w.])([A-Za-z_]\w*) is (?:not )?defined")
"""How templates look for arguments that need not be given."""


@dataclass(frozen=True)
class RenderedChat:
    """A chat divided in two, with marks in place of special-token text of the user's.

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


class ChatRenderer:
    """Renders chats with a tokenizer's template.

    Args:
        tokenizer: A transformers tokenizer.
        arguments: Further arguments of the template for every chat; a row's own win.

    Attributes:
        special: The tokenizer's special tokens.
    """

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any] | None = None) -> None:
        self.arguments = dict(arguments or {})
        self.special = SpecialTokens(tokenizer)
        self._template = ChatTemplate(tokenizer, self.arguments)
        self._omissions = OmissionFinder(self._template.render, self.special.without_marks)
        self._warned = False

    def prompt(self, messages: Sequence[Message], tools: Any = None, arguments: dict[str, Any] | None = None) -> str:
        """Renders a prompt as the model is asked it, through the words that make it answer.

        Raises:
            RowError: if the template refuses the chat.
            UserError: if there is no template.
        """
        chat = self._prepared(messages, tools)
        return self._template.render(chat, {**self.arguments, **(arguments or {})}, generation_prompt=True)

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
        prompt = self._template.render(asking, more, generation_prompt=True)
        chats = [asking._replace(messages=[*asking.messages, *self._prepared(r).messages]) for r in responses]
        wholes = [self._template.render(chat, more) for chat in chats]
        if not _divides(prompt, wholes):
            asked, prompt = prompt, self._before_content(asking, responses[0][0]["role"], more)
            if not _divides(prompt, wholes):
                raise RowError(self._undivided(asked, asking, wholes, more))
            self._warn(asked, prompt)
        unused = [name for name in more if not re.search(rf"\b{re.escape(name)}\b", self._template.source)]
        left_out = self._omissions.describe(asking, chats, wholes, len(prompt), more, names)
        left_out = [*(f"the chat template does not use the argument {name!r}" for name in unused), *left_out]
        cut = [self.special.through_end(whole[len(prompt) :]) for whole in wholes]
        for name, (text, _) in zip(names, cut, strict=True):
            if not self.special.removed_from(text).strip():
                raise RowError(f"the chat template renders {name} as nothing but its end token; {ADVICE}")
        texts, ended = zip(*cut, strict=True)
        return RenderedChat(prompt, texts, ended, tuple(left_out))

    def _prepared(self, messages: Sequence[Message], tools: Any = None) -> Chat:
        """Returns a chat as the template gets it: calls in its form, special-token text of the user's marked."""
        protect = self.special.protect
        return Chat([protect(self._template.in_form(m)) for m in messages], protect(without_nulls(tools)))

    def _before_content(self, asking: Chat, role: str, arguments: dict[str, Any]) -> str:
        """Returns the rendering up to where a response's first words would stand."""
        answer = self._template.in_form({"role": role, "content": RESPONSE})
        rendered = self._template.render(asking._replace(messages=[*asking.messages, answer]), arguments)
        before, mark, _ = rendered.rpartition(RESPONSE)
        if not mark:
            raise RowError(f"the chat template leaves out the response; {ADVICE}")
        return before

    def _undivided(self, asked: str, asking: Chat, wholes: Sequence[str], arguments: dict[str, Any]) -> str:
        """Describes a prompt that no response continues, with the argument of the template that would change it."""
        message = (
            "the chat template renders the prompt differently for different responses, so the two cannot be separated; "
            f"it ends in {self.special.without_marks(asked[-40:])!r}."
        )
        names = dict.fromkeys(ASKS_IF_DEFINED.findall(self._template.source))
        for name, value in itertools.product(names, (True, False)):
            try:
                prompt = self._template.render(asking, {**arguments, name: value}, generation_prompt=True)
            except RowError:
                continue
            if _divides(prompt, wholes):
                return (
                    f"{message} With {name}={value} it ends in {self.special.without_marks(prompt[-20:])!r}, which the "
                    f"responses continue: give --chat_template_kwargs {name}={str(value).lower()}, or the row's own "
                    "field chat_template_kwargs"
                )
        return f"{message} Give another template with --chat_template_path"

    def _warn(self, asked: str, prompt: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "the chat template renders a prompt differently once a response follows: asked alone it ends in %r, "
                "before a response in %r. Training takes the latter; --chat_template_path gives another template",
                self.special.without_marks(asked[-60:]),
                self.special.without_marks(prompt[-60:]),
            )


def _divides(prompt: str, wholes: Sequence[str]) -> bool:
    return all(whole.startswith(prompt) for whole in wholes)
