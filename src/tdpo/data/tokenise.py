"""From records to token ids: one end token, no merge across the boundary, truncation that is counted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import jinja2

from tdpo.data.formats import DataReport
from tdpo.errors import UserError
from tdpo.types import Message, PreferenceRecord, Text, TokenisedPair

TruncationMode = Literal["keep_end", "keep_start"]
OnOverlong = Literal["truncate", "drop", "error"]
ANCHOR = "\n"
"""Text put before a response whose tokenizer would otherwise prefix it with a space of its own; its ids are cut off."""
LITERAL = "\ue000{}\ue001"
"""Stands in a rendered chat for special-token text of the user's, by its index; private-use characters."""


class Placed(Protocol):
    """Anything that knows where it was read."""

    @property
    def source(self) -> str:
        """File or dataset."""

    @property
    def row(self) -> int:
        """Row number, from 1."""


@dataclass(frozen=True)
class Lengths:
    """How long sequences may be, in tokens, and what happens to longer ones.

    A pair is overlong if its prompt and its longer response together exceed ``max_length``. Truncation first cuts the
    prompt to ``max_prompt_length``, then the responses to what remains, so a response never becomes empty. A response
    that is cut loses its end token: the model is not taught to stop in the middle of a sentence.

    Attributes:
        max_length: Longest sequence, prompt and response together.
        max_prompt_length: What is left of the prompt of an overlong pair.
        truncation_mode: ``"keep_end"`` keeps a prompt's last tokens (dialogues), ``"keep_start"`` its first.
        on_overlong: ``"truncate"``, ``"drop"`` or ``"error"``.
    """

    max_length: int = 512
    max_prompt_length: int = 256
    truncation_mode: TruncationMode = "keep_end"
    on_overlong: OnOverlong = "truncate"

    def __post_init__(self) -> None:
        if self.max_prompt_length < 1 or self.max_length <= self.max_prompt_length:
            raise UserError(
                f"--max_length {self.max_length} must be larger than --max_prompt_length {self.max_prompt_length}, and "
                "both positive: a truncated prompt has to leave room for a response"
            )


class Tokeniser:
    """Turns text and chats into ids with a transformers tokenizer.

    Args:
        tokenizer: The tokenizer of the policy.
        lengths: Truncation.

    Raises:
        UserError: if the tokenizer has no end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, lengths: Lengths | None = None) -> None:
        self.tokenizer = tokenizer
        self.lengths = lengths or Lengths()
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end-of-sequence token, so no response could ever end; name one with --eos_token"
            )

    @cached_property
    def bos(self) -> list[int]:
        """What the tokenizer puts at the start of a text: its beginning-of-sequence token, or nothing."""
        bos, plain = self.tokenizer.bos_token_id, self._encode(["a"], special=True)[0]
        return [bos] if bos is not None and plain[:1] == [bos] else []

    def pairs(self, records: Sequence[PreferenceRecord], report: DataReport) -> list[TokenisedPair]:
        """Tokenises records; cuts, drops or refuses overlong ones as :class:`Lengths` says, and counts them.

        Raises:
            UserError: for chats without a chat template, and for overlong rows under ``on_overlong: error``.
        """
        prompts = self.prompts([record.prompt for record in records])
        chosen = self.responses([(record.prompt, record.chosen) for record in records])
        rejected = self.responses([(record.prompt, record.rejected) for record in records])
        pairs = []
        for record, prompt, first, second in zip(records, prompts, chosen, rejected, strict=True):
            fitted = self.fit(prompt, (first, second), record, report)
            if fitted is not None:
                prompt_ids, (chosen_ids, rejected_ids) = fitted
                pairs.append(TokenisedPair(prompt_ids, chosen_ids, rejected_ids, record.row))
        report.kept = len(pairs)
        return pairs

    def prompts(self, prompts: Sequence[Text]) -> list[list[int]]:
        """Ids of prompts. An empty prompt becomes the beginning-of-sequence token.

        Raises:
            UserError: for an empty prompt when the tokenizer has no token to begin with.
        """
        return [ids or self._beginning() for ids in self.prompts_of_text(prompts)]

    def prompts_of_text(self, prompts: Sequence[Text]) -> list[list[int]]:
        """As :meth:`prompts`, but an empty prompt is what the tokenizer starts a text with, which may be nothing."""
        chats = [self._render(prompt, True) if not isinstance(prompt, str) else None for prompt in prompts]
        texts = self._encode([prompt if isinstance(prompt, str) else "" for prompt in prompts])
        return [
            (self.bos + ids) if chat is None else self._encode_rendered(chat)
            for chat, ids in zip(chats, texts, strict=True)
        ]

    def responses(self, turns: Sequence[tuple[Text, Text]]) -> list[list[int]]:
        """Ids of responses, given with their prompts, each with exactly one end token."""
        plain = self._encode_continuations([response if isinstance(response, str) else "" for _, response in turns])
        eos = self.tokenizer.eos_token_id
        return [
            [*ids, eos] if isinstance(response, str) else self._chat_response(prompt, response)
            for (prompt, response), ids in zip(turns, plain, strict=True)
        ]

    def _chat_response(self, prompt: Any, response: Any) -> list[int]:
        before, whole = self._render(prompt, True), self._render([*prompt, *response], False)
        if not whole.startswith(before):
            raise UserError(
                "the chat template renders a prompt differently once a response follows, so the response cannot be "
                f"told from it; the prompt ends in {before[-40:]!r}. Give another template with --chat_template_path"
            )
        rendered = whole[len(before) :]
        ends = max((rendered.rfind(token) + len(token) for token in self._special if token in rendered), default=0)
        ended = ends > 0 and not rendered[ends:].strip()
        ids = self._encode_rendered(rendered[:ends] if ended else rendered, continuation=True)
        return ids if ended else [*ids, self.tokenizer.eos_token_id]

    def fit(
        self, prompt: list[int], responses: Sequence[list[int]], place: Placed, report: DataReport
    ) -> tuple[list[int], list[list[int]]] | None:
        """Prompt and responses within the limits, or None if the row is dropped; whatever is cut is counted."""
        limits, longest = self.lengths, max(len(response) for response in responses)
        if len(prompt) + longest <= limits.max_length:
            return prompt, list(responses)
        if limits.on_overlong == "error":
            raise UserError(
                f"{place.source}, row {place.row}: prompt {len(prompt)} + response {longest} tokens exceed "
                f"--max_length {limits.max_length} (--on_overlong truncate or drop would go on)"
            )
        if limits.on_overlong == "drop":
            report.dropped[f"longer than {limits.max_length} tokens"].append(place.row)
            return None
        if len(prompt) > limits.max_prompt_length:
            report.truncated["prompt"].append(place.row)
            prompt = self.cut_prompt(prompt, limits.max_prompt_length)
        room = limits.max_length - len(prompt)
        if longest > room:
            report.truncated["response"].append(place.row)
        return prompt, [response[:room] for response in responses]

    def cut_prompt(self, prompt: list[int], limit: int) -> list[int]:
        """The part of a prompt that stays within a limit; a beginning-of-sequence token stays at the beginning."""
        if len(prompt) <= limit:
            return prompt
        if self.lengths.truncation_mode == "keep_start":
            return prompt[:limit]
        head = self.bos if self.bos and prompt[:1] == self.bos and limit > 1 else []
        return head + prompt[len(prompt) - limit + len(head) :]

    def _beginning(self) -> list[int]:
        if self.tokenizer.bos_token_id is None:
            raise UserError("a prompt is empty and the tokenizer has no beginning-of-sequence token to start from")
        return [self.tokenizer.bos_token_id]

    def _encode(self, texts: Sequence[str], special: bool = False, literal: bool = True) -> list[list[int]]:
        """Ids of plain texts; ``literal`` encodes special-token text in them as the characters it is made of."""
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), add_special_tokens=special, split_special_tokens=literal, verbose=False)
        return encoded["input_ids"]

    @cached_property
    def _anchor_ids(self) -> list[int]:
        """Ids of the anchor if the tokenizer prefixes every text it encodes with a space, else nothing."""
        bare, (anchored,) = self._encode([ANCHOR])[0], self._encode([ANCHOR + "a"])
        alone = self._encode(["a"])[0]
        return [] if anchored == bare + alone or anchored[: len(bare)] != bare else bare

    def _encode_continuations(self, texts: Sequence[str], literal: bool = True) -> list[list[int]]:
        """Ids of texts that go on where another ended: no prefix space of the tokenizer's own."""
        anchor = self._anchor_ids
        if not anchor:
            return self._encode(texts, literal=literal)
        encoded = self._encode([ANCHOR + text for text in texts], literal=literal)
        return [ids[len(anchor) :] for ids in encoded]

    @cached_property
    def _special(self) -> list[str]:
        """Special-token texts, the longest first."""
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return sorted({*added, *self.tokenizer.all_special_tokens}, key=len, reverse=True)

    def _render(self, messages: Any, generation_prompt: bool) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(
                "the dataset holds chat messages and the tokenizer has no chat template: give one with "
                "--chat_template_path FILE (a Jinja file), or text columns instead of messages"
            )
        protected = [self._protect(message) for message in messages]
        try:
            return self.tokenizer.apply_chat_template(
                protected, tokenize=False, add_generation_prompt=generation_prompt
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"the chat template refuses a chat with the roles {roles}: {error}") from error

    def _protect(self, message: Message) -> Message:
        """Puts marks in place of special-token text in the user's words, so that a template cannot revive it."""
        content = message["content"]
        for index, token in enumerate(self._special):
            if token in content:
                content = content.replace(token, LITERAL.format(index))
        return {**message, "content": content}

    def _encode_rendered(self, text: str, continuation: bool = False) -> list[int]:
        """Ids of rendered chat text: the template's special tokens are special, the user's are plain text."""
        ids: list[int] = []
        for position, piece in enumerate(re.split("\ue000([0-9]+)\ue001", text)):
            literal = position % 2 == 1 and int(piece) < len(self._special)
            piece = self._special[int(piece)] if literal else piece
            if not piece:
                continue
            first = not ids and not continuation
            encode = self._encode if first else self._encode_continuations
            ids += encode([piece], literal=literal)[0]
        return ids
