"""Renders chats and divides them into prompt and response; special-token text in the user's words stays text."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tdpo.data.calls import without_nulls
from tdpo.data.encode import RenderedTurns
from tdpo.data.formats import RowError
from tdpo.data.omissions import ADVICE, Chat, OmissionFinder
from tdpo.data.special_tokens import RESPONSE, SpecialTokens
from tdpo.data.template import ChatTemplate
from tdpo.types import Message

logger = logging.getLogger("tdpo")

ASKS_IF_DEFINED = re.compile(r"(?<![\w.])([A-Za-z_]\w*) is (?:not )?defined")
"""How templates look for arguments that need not be given."""


class ChatRenderer:
    """Renders chats with a tokenizer's template.

    Args:
        tokenizer: A transformers tokenizer.
        special: Its special tokens.
        arguments: Further arguments of the template for every chat; a row's own win.
    """

    def __init__(self, tokenizer: Any, special: SpecialTokens, arguments: Mapping[str, Any]) -> None:
        self._special, self._arguments = special, dict(arguments)
        self._special_pattern = re.compile("|".join(map(re.escape, special.texts)))
        self._template = ChatTemplate(tokenizer, self._arguments)
        self._omissions = OmissionFinder(self._template.render, self._special.unmark)
        self._warned = False

    def render(
        self,
        messages: Sequence[Message],
        responses: Sequence[Sequence[Message]] = (),
        tools: Any = None,
        arguments: dict[str, Any] | None = None,
        names: Sequence[str] = (),
    ) -> RenderedTurns:
        """Renders a prompt and responses to it; without responses the prompt as the model is asked it.

        The response is what a rendering with it adds to the rendering of the prompt. Where a template renders the
        prompt differently once a response follows, everything up to the response's own words is the prompt; the first
        time, a warning says so.

        Args:
            messages: The prompt.
            responses: The responses.
            tools: Tools that the template shows the model.
            arguments: The row's own arguments of the template.
            names: Names of the responses in messages.

        Raises:
            RowError: if the template refuses the chat, leaves out of it what the response depends on, or renders it so
                that nothing divides prompt and response.
            UserError: if there is no template.
        """
        more = {**self._arguments, **(arguments or {})}
        asking = Chat(self._prepared(messages), self._special.mark(without_nulls(tools)))
        prompt = self._template.render(asking, more, generation_prompt=True)
        if not responses:
            return RenderedTurns(self._special.split(prompt))
        chats = [asking._replace(messages=[*asking.messages, *self._prepared(turns)]) for turns in responses]
        rendered = [self._template.render(chat, more) for chat in chats]
        if not _divides(prompt, rendered):
            asked, prompt = prompt, self._before_content(asking, responses[0][0]["role"], more)
            if not _divides(prompt, rendered):
                raise RowError(self._undivided(asked, asking, rendered, more))
            self._warn_once(asked, prompt)
        unused = [name for name in more if not re.search(rf"\b{re.escape(name)}\b", self._template.source)]
        notices = [f"the chat template does not use the argument {name!r}" for name in unused]
        notices += self._omissions.describe(asking, chats, rendered, len(prompt), more, names)
        cut = [self._special.cut_after_end(whole[len(prompt) :]) for whole in rendered]
        for name, (text, _) in zip(names, cut, strict=True):
            if not self._special_pattern.sub("", text).strip():
                raise RowError(f"the chat template renders {name} as nothing but its end token; {ADVICE}")
        pieces = [self._special.split(text, continues=True) for text, _ in cut]
        return RenderedTurns(self._special.split(prompt), pieces, [ended for _, ended in cut], notices)

    def _prepared(self, messages: Sequence[Message]) -> list[Message]:
        """Returns messages as the template gets them: calls in its form, special-token text of the user's marked."""
        return [self._special.mark(self._template.in_form(message)) for message in messages]

    def _before_content(self, asking: Chat, role: str, arguments: dict[str, Any]) -> str:
        """Returns the rendering up to where a response's first words would be."""
        answer = self._template.in_form({"role": role, "content": RESPONSE})
        rendered = self._template.render(asking._replace(messages=[*asking.messages, answer]), arguments)
        before, mark, _ = rendered.rpartition(RESPONSE)
        if not mark:
            raise RowError(f"the chat template leaves out the response; {ADVICE}")
        return before

    def _undivided(self, asked: str, asking: Chat, rendered: Sequence[str], arguments: dict[str, Any]) -> str:
        """Describes a prompt that no response continues, with the argument of the template that would change it."""
        message = (
            "the chat template renders the prompt differently for different responses, so the two cannot be separated; "
            f"it ends in {self._special.unmark(asked)[-40:]!r}."
        )
        names = dict.fromkeys(ASKS_IF_DEFINED.findall(self._template.source))
        for name, value in itertools.product(names, (True, False)):
            try:
                prompt = self._template.render(asking, {**arguments, name: value}, generation_prompt=True)
            except RowError:
                continue
            if _divides(prompt, rendered):
                return (
                    f"{message} With {name}={value} it ends in {self._special.unmark(prompt)[-20:]!r}, which the "
                    f"responses continue: give --chat_template_kwargs {name}={str(value).lower()}, or the row's own "
                    "field chat_template_kwargs"
                )
        return f"{message} Give another template with --chat_template_path"

    def _warn_once(self, asked: str, prompt: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "the chat template renders a prompt differently once a response follows: asked alone it ends in %r, "
                "before a response in %r. Training takes the latter; --chat_template_path gives another template",
                self._special.unmark(asked)[-60:],
                self._special.unmark(prompt)[-60:],
            )


def _divides(prompt: str, rendered: Sequence[str]) -> bool:
    return all(whole.startswith(prompt) for whole in rendered)
