"""From records to token ids: one end token, no merge across the boundary, truncation that is counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

from tdpo.data.chat import ChatRenderer, Piece
from tdpo.data.encode import TextEncoder
from tdpo.data.formats import ROWS_NAMED, DataReport, OnBadRow, Placed, RowError
from tdpo.errors import UserError
from tdpo.types import PreferenceRecord, Text, TokenisedPair

TruncationMode = Literal["keep_end", "keep_start"]
OnOverlong = Literal["truncate", "drop", "error"]
ANCHOR = "\n"
"""Text put before a response whose tokenizer would otherwise prefix it with a space of its own; its ids are cut off."""


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


class Part(NamedTuple):
    """A prompt or a response in pieces.

    Attributes:
        pieces: Texts in their order.
        add_end: Whether the end token is put after them.
    """

    pieces: list[Piece]
    add_end: bool = False


class Asked(Placed, Protocol):
    """A prompt as it was read: what records of pairs and of single responses share."""

    @property
    def prompt(self) -> Text:
        """Plain text, or chat messages."""

    @property
    def tools(self) -> list[Any] | None:
        """Tools the chat template shows the model."""

    @property
    def chat_template_kwargs(self) -> dict[str, Any] | None:
        """Further arguments of the chat template."""

    @property
    def truncation_mode(self) -> TruncationMode | None:
        """Which part of the prompt stays when it is cut; None is that of :class:`Lengths`."""


class Turns(NamedTuple):
    """A prompt and the responses to it, as they are tokenised together.

    Attributes:
        prompt: Plain text, or chat messages.
        responses: At least one, of the same kind.
        place: The row they come from.
        tools: Tools of a chat, see :class:`~tdpo.types.PreferenceRecord`.
        arguments: Further arguments of the chat template.
        truncation_mode: Which part of this prompt stays when it is cut; None is that of :class:`Lengths`.
    """

    prompt: Text
    responses: tuple[Text, ...]
    place: Placed
    tools: Any = None
    arguments: dict[str, Any] | None = None
    truncation_mode: TruncationMode | None = None

    @classmethod
    def of(cls, record: Asked, *responses: Text) -> Turns:
        """A record's prompt with some responses to it."""
        return cls(record.prompt, responses, record, record.tools, record.chat_template_kwargs, record.truncation_mode)


class Ids(NamedTuple):
    """Turns as ids.

    Attributes:
        place: The row they come from.
        prompt: Ids of the prompt; empty only for an empty text where the tokenizer starts a text with nothing.
        responses: Ids of each response.
        truncation_mode: As in :class:`Turns`.
    """

    place: Placed
    prompt: list[int]
    responses: list[list[int]]
    truncation_mode: TruncationMode | None = None


class Tokeniser:
    """Turns text and chats into ids with a transformers tokenizer.

    Args:
        tokenizer: The tokenizer of the policy.
        lengths: Truncation.
        encode: The encoder of another ``Tokeniser`` with the same tokenizer, to share what it has learnt.
        processes: Processes that a whole dataset is tokenised in; see :mod:`tdpo.data.workers`.

    Raises:
        UserError: if the tokenizer has no end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: Any,
        lengths: Lengths | None = None,
        encode: TextEncoder | None = None,
        processes: int = 1,
    ) -> None:
        self.tokenizer = tokenizer
        self.processes = processes
        self.lengths = lengths or Lengths()
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end-of-sequence token, so no response could ever end; name one with --eos_token"
            )
        self.chats = ChatRenderer(tokenizer)
        if encode is not None:
            self.encode = encode

    @cached_property
    def encode(self) -> TextEncoder:
        """Texts to ids, without start and end tokens."""
        return TextEncoder(self.tokenizer)

    @cached_property
    def bos(self) -> list[int]:
        """What the tokenizer puts at the start of a text: its beginning-of-sequence token, or nothing."""
        bos = self.tokenizer.bos_token_id
        plain = self.tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"]
        return [bos] if bos is not None and plain[:1] == [bos] else []

    def pairs(
        self, records: Sequence[PreferenceRecord], report: DataReport, on_bad_row: OnBadRow = "error"
    ) -> list[TokenisedPair]:
        """Tokenises records; cuts, drops or refuses overlong ones as :class:`Lengths` says, and counts them.

        Raises:
            UserError: for chats without a chat template, rows the template cannot render (unless ``on_bad_row`` is
                ``"drop"``), and overlong rows under ``on_overlong: error``.
        """
        turns = [Turns.of(record, record.chosen, record.rejected) for record in records]
        pairs = []
        for ids in self.turns(turns, report, on_bad_row):
            chosen, rejected = ids.responses
            pairs.append(TokenisedPair(ids.prompt or self._beginning(ids.place), chosen, rejected, ids.place.row))
        report.kept = len(pairs)
        return pairs

    def turns(self, turns: Sequence[Turns], report: DataReport, on_bad_row: OnBadRow = "error") -> Iterator[Ids]:
        """Ids of prompts and responses, in order and within the limits; what is cut or dropped is counted."""
        return self.within_limits(self.encode_turns(turns, report, on_bad_row), report)

    def encode_turns(self, turns: Sequence[Turns], report: DataReport, on_bad_row: OnBadRow = "error") -> Iterator[Ids]:
        """Encodes prompts and responses of any length, in order. Once a row is refused, its later turns are skipped."""
        rows, jobs, bad, refused = [], [], [], None
        for turn in turns:
            if turn.place is refused:
                continue
            try:
                jobs.append(self._pieces(turn))
                rows.append(turn)
            except RowError as error:
                refused = turn.place
                bad.append(f"{turn.place.source}, row {turn.place.row}: {error}")
                report.drop(turn.place, f"bad row ({error})")
        if bad and on_bad_row == "error":
            raise UserError(_named(bad, "--on_bad_row drop leaves such rows out"))
        ids = self._encode_pieces([part for job in jobs for part in job])
        end = [self.tokenizer.eos_token_id]
        for turn, job in zip(rows, jobs, strict=True):
            prompt, *responses = (next(ids) + (end if part.add_end else []) for part in job)
            if isinstance(turn.prompt, str):
                prompt = self.bos + prompt
            yield Ids(turn.place, prompt, responses, turn.truncation_mode)

    def within_limits(self, encoded: Iterable[Ids], report: DataReport) -> Iterator[Ids]:
        """Cuts, drops or refuses what is overlong, as :class:`Lengths` says; whatever is cut or dropped is counted."""
        overlong = []
        for ids in encoded:
            try:
                fitted = self.fit(ids.prompt, ids.responses, ids.place, report, ids.truncation_mode)
            except RowError as error:
                overlong.append(f"{ids.place.source}, row {ids.place.row}: {error}")
                continue
            if fitted is not None:
                prompt, responses = fitted
                yield ids._replace(prompt=prompt, responses=responses)
        if overlong:
            raise UserError(_named(overlong, "--on_overlong truncate or drop would go on"))

    def prompts(self, prompts: Sequence[Text]) -> list[list[int]]:
        """Ids of prompts alone. An empty prompt becomes the beginning-of-sequence token.

        Raises:
            UserError: for an empty prompt when the tokenizer has no token to begin with, or a chat that cannot be
                rendered.
        """
        try:
            ids = self._encode_pieces([self._prompt_pieces(prompt) for prompt in prompts])
        except RowError as error:
            raise UserError(str(error)) from error
        starts = [self.bos if isinstance(prompt, str) else [] for prompt in prompts]
        return [start + found or self._beginning() for start, found in zip(starts, ids, strict=True)]

    def _prompt_pieces(self, prompt: Text) -> Part:
        if isinstance(prompt, str):
            return Part([Piece(prompt)])
        return Part(self.chats.pieces(self.chats.prompt(prompt)))

    def _pieces(self, turn: Turns) -> list[Part]:
        """Prompt and responses as pieces of text."""
        if isinstance(turn.prompt, str):
            return [Part([Piece(turn.prompt)]), *(Part([Piece(str(r), continues=True)], True) for r in turn.responses)]
        chat = self.chats.chat(turn.prompt, turn.responses, turn.tools, turn.arguments)  # type: ignore[arg-type]
        responses = [
            Part(self.chats.pieces(response, continues=True), add_end=not ended)
            for response, ended in zip(chat.responses, chat.ended, strict=True)
        ]
        return [Part(self.chats.pieces(chat.prompt)), *responses]

    def _encode_pieces(self, parts: Sequence[Part]) -> Iterator[list[int]]:
        """Ids of every part; all pieces of a kind are encoded together."""
        kinds: dict[tuple[bool, bool], list[str]] = {}
        for part in parts:
            for piece in part.pieces:
                kinds.setdefault((piece.literal, piece.continues), []).append(piece.text)
        encoded = {
            (literal, continues): iter(
                self._encode_continuations(texts, literal) if continues else self.encode(texts, literal)
            )
            for (literal, continues), texts in kinds.items()
        }
        for part in parts:
            ids = [next(encoded[piece.literal, piece.continues]) for piece in part.pieces]
            yield ids[0] if len(ids) == 1 else [token for piece in ids for token in piece]

    def fit(
        self,
        prompt: list[int],
        responses: Sequence[list[int]],
        place: Placed,
        report: DataReport,
        mode: TruncationMode | None = None,
    ) -> tuple[list[int], list[list[int]]] | None:
        """Prompt and responses within the limits, or None if the row is dropped; whatever is cut is counted."""
        limits, longest = self.lengths, max(len(response) for response in responses)
        if len(prompt) + longest <= limits.max_length:
            return prompt, list(responses)
        if limits.on_overlong == "error":
            raise RowError(f"prompt {len(prompt)} + response {longest} tokens exceed --max_length {limits.max_length}")
        if limits.on_overlong == "drop":
            report.drop(place, f"longer than {limits.max_length} tokens")
            return None
        if len(prompt) > limits.max_prompt_length:
            report.truncated["prompt"].append(place.row)
            prompt = self.cut_prompt(prompt, limits.max_prompt_length, mode)
        room = limits.max_length - len(prompt)
        if longest > room:
            report.truncated["response"].append(place.row)
        return prompt, [response[:room] for response in responses]

    def cut_prompt(self, prompt: list[int], limit: int, mode: TruncationMode | None = None) -> list[int]:
        """The part of a prompt that stays within a limit; a beginning-of-sequence token stays at the beginning."""
        if len(prompt) <= limit:
            return prompt
        if (mode or self.lengths.truncation_mode) == "keep_start":
            return prompt[:limit]
        bos = self.tokenizer.bos_token_id
        head = prompt[:1] if prompt[0] == bos and limit > 1 else []
        return head + prompt[len(prompt) - limit + len(head) :]

    def _beginning(self, place: Placed | None = None) -> list[int]:
        if self.tokenizer.bos_token_id is None:
            where = f"{place.source}, row {place.row}: the" if place else "a"
            raise UserError(
                f"{where} prompt is empty and the tokenizer has no beginning-of-sequence token to start from"
            )
        return [self.tokenizer.bos_token_id]

    @cached_property
    def _anchor_ids(self) -> list[int]:
        """Ids of the anchor if the tokenizer prefixes every text it encodes with a space, else nothing."""
        bare, anchored, alone = self.encode([ANCHOR, ANCHOR + "a", "a"])
        return [] if anchored == bare + alone or anchored[: len(bare)] != bare else bare

    def _encode_continuations(self, texts: Sequence[str], literal: bool = True) -> list[list[int]]:
        """Ids of texts that go on where another ended: no prefix space of the tokenizer's own."""
        anchor = self._anchor_ids
        if not anchor:
            return self.encode(texts, literal)
        return [ids[len(anchor) :] for ids in self.encode([ANCHOR + text for text in texts], literal)]


def _named(messages: Sequence[str], advice: str) -> str:
    """One message of many, each about a row: the first ten, how many more, and what could be done."""
    more = f"\n... and {len(messages) - ROWS_NAMED} more" if len(messages) > ROWS_NAMED else ""
    return "\n".join(messages[:ROWS_NAMED]) + f"{more}\n({advice})"
