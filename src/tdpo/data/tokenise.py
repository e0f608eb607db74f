"""From records to token ids: one end token, no merge across the boundary, truncation that is counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from tdpo.config.tokens import Lengths, Rendering, TruncationMode
from tdpo.data.chat import ChatRenderer
from tdpo.data.continuation import ContinuationEncoder
from tdpo.data.encode import TextEncoder
from tdpo.data.formats import BAD_ROW_ADVICE, BadRows, DataReport, OnBadRow, Placed, RowError
from tdpo.data.rendered import RenderedTexts
from tdpo.data.sources import SourceRow
from tdpo.data.special_tokens import Piece
from tdpo.errors import UserError
from tdpo.types import PreferenceRecord, Text, TokenisedPair

if TYPE_CHECKING:
    from tdpo.data.supervised import Exchange

REFUSED_ADVICE = (
    f"{BAD_ROW_ADVICE}, --chat_template_path gives another template, --ignore_columns leaves out a column such as "
    "'system'"
)


class Part(NamedTuple):
    """A prompt or a response in pieces.

    Attributes:
        pieces: Texts in their order.
        add_end: Whether the end token is put after them.
    """

    pieces: list[Piece]
    add_end: bool = False


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

    @property
    def names(self) -> tuple[str, ...]:
        """What messages call the responses."""
        return ("chosen", "rejected") if len(self.responses) == 2 else ("the response",) * len(self.responses)

    @classmethod
    def of(cls, record: PreferenceRecord | Exchange, *responses: Text) -> Turns:
        """A record's prompt with some responses to it."""
        return cls(record.prompt, responses, record, record.tools, record.chat_template_kwargs, record.truncation_mode)


class Ids(NamedTuple):
    """Turns as ids.

    Attributes:
        place: The row they come from.
        prompt: Ids of the prompt; empty only for an empty text where the tokenizer starts a text with nothing.
        responses: Ids of each response.
        truncation_mode: As in :class:`Turns`.
        reason_identical: What made the responses identical, if they are.
    """

    place: Placed
    prompt: list[int]
    responses: list[list[int]]
    truncation_mode: TruncationMode | None = None
    reason_identical: str = "after truncation"


class Tokeniser:
    """Turns text and chats into ids with a transformers tokenizer.

    Args:
        tokenizer: The tokenizer of the policy.
        lengths: Truncation.
        encode: The encoder of another ``Tokeniser`` with the same tokenizer, to share it.
        processes: Processes that a whole dataset is tokenised in; see :mod:`tdpo.data.workers`.
        rendering: Arguments of the chat template, and what special-token text in plain texts is.

    Raises:
        UserError: if the tokenizer has no end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: Any,
        lengths: Lengths | None = None,
        encode: TextEncoder | None = None,
        processes: int = 1,
        rendering: Rendering | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.processes = processes
        self.rendering = rendering or Rendering()
        self.lengths = lengths or Lengths()
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end-of-sequence token, so no response could ever end; name one with --eos_token"
            )
        self.chats = ChatRenderer(tokenizer, self.rendering.template_arguments)
        self.texts = RenderedTexts(tokenizer, self.chats.special.texts)
        if encode is not None:
            self.encode = encode

    @cached_property
    def encode(self) -> TextEncoder:
        """Texts to ids, without start and end tokens."""
        return TextEncoder(self.tokenizer)

    @cached_property
    def bos(self) -> list[int]:
        """What the tokenizer puts at the start of a text: nothing, a beginning-of-sequence token, or several tokens."""
        for text in ("a", "1", "."):
            plain = self.encode([text])[0]
            whole = self.tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
            starts = range(len(whole) - len(plain) + 1) if plain else ()
            start = next((start for start in starts if whole[start : start + len(plain)] == plain), None)
            if start is not None:
                return list(whole[:start])
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and whole[:1] == [bos] else []

    @cached_property
    def _unknown(self) -> int | None:
        """The token of text that the tokenizer does not know, where it has such text."""
        unknown = self.tokenizer.unk_token_id
        rare = self.encode(["\U00012031", "\uf8ff", "\u2fd5"])
        return unknown if any(unknown in ids for ids in rare) else None

    def unlimited(self) -> Tokeniser:
        """Returns a tokeniser that cuts nothing and shares the encoder of this one."""
        limits = Lengths(max_length=2**31, max_prompt_length=2**30)
        return Tokeniser(self.tokenizer, limits, self.encode, rendering=self.rendering)

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
            if chosen == rejected:
                report.drop(ids.place, f"chosen and rejected are identical {ids.reason_identical}")
                continue
            pairs.append(TokenisedPair(ids.prompt or self._beginning(ids.place), chosen, rejected, ids.place.row))
        report.kept = len(pairs)
        return pairs

    def turns(self, turns: Sequence[Turns], report: DataReport, on_bad_row: OnBadRow = "error") -> Iterator[Ids]:
        """Ids of prompts and responses, in order and within the limits; what is cut or dropped is counted."""
        return self.within_limits(self.encode_turns(turns, report, on_bad_row), report)

    def encode_turns(self, turns: Sequence[Turns], report: DataReport, on_bad_row: OnBadRow = "error") -> Iterator[Ids]:
        """Encodes prompts and responses of any length, in order. Of a place that is refused, the turns behind too."""
        jobs: list[tuple[Turns, list[Part], Sequence[str]]] = []
        bad, refused = BadRows(report, on_bad_row), None
        for turn in turns:
            if turn.place is refused:
                continue
            try:
                parts, noticed = self._pieces(turn)
            except RowError as error:
                refused = turn.place
                bad.add(turn.place, error)
                continue
            jobs.append((turn, parts, noticed))
            for what in noticed:
                report.notice(turn.place, what)
        bad.raise_error(REFUSED_ADVICE)
        encoded = self._encode_pieces([part for _, parts, _ in jobs for part in parts])
        end = [self.tokenizer.eos_token_id]
        for turn, parts, noticed in jobs:
            prompt, *responses = (next(encoded) for _ in parts)
            if not all(responses):
                bad.add(turn.place, f"the tokenizer leaves nothing of {turn.names[responses.index([])]}")
                continue
            if self._unknown is not None and any(self._unknown in ids for ids in (prompt, *responses)):
                report.notice(turn.place, f"text that the tokenizer does not know becomes {self.tokenizer.unk_token!r}")
            responses = [ids + end if part.add_end else ids for ids, part in zip(responses, parts[1:], strict=True)]
            if isinstance(turn.prompt, str):
                prompt = self._begun(prompt, responses)
            found = Ids(turn.place, prompt, responses, turn.truncation_mode)
            if len(responses) > 1 and responses[0] == responses[1]:
                found = found._replace(reason_identical=_reason_identical(turn, noticed))
            yield found
        bad.raise_error(BAD_ROW_ADVICE)

    def within_limits(self, encoded: Iterable[Ids], report: DataReport) -> Iterator[Ids]:
        """Cuts, drops or refuses what is overlong, as :class:`Lengths` says; whatever is cut or dropped is counted."""
        overlong = BadRows(report)
        for ids in encoded:
            try:
                fitted = self.fit(ids.prompt, ids.responses, ids.place, report, ids.truncation_mode)
            except RowError as error:
                overlong.add(ids.place, error)
                continue
            if fitted is not None:
                prompt, responses = fitted
                yield ids._replace(prompt=prompt, responses=responses)
        overlong.raise_error("--on_overlong truncate or drop would continue")

    def prompts(self, asked: Sequence[Text | Turns]) -> list[list[int]]:
        """Ids of prompts, of any length: as training has them before responses, or as they are asked alone.

        An empty prompt becomes what the tokenizer starts a text with.

        Args:
            asked: Prompts, or turns, whose responses may be none.

        Raises:
            UserError: for an empty prompt when the tokenizer has no token to begin with, or a chat that cannot be
                rendered.
        """
        turns = [
            one if isinstance(one, Turns) else Turns(one, (), SourceRow("prompts", number, {}))
            for number, one in enumerate(asked, 1)
        ]
        parts = []
        for turn in turns:
            try:
                parts.append(self._pieces(turn)[0][0])
            except RowError as error:
                raise UserError(f"{turn.place.source}, row {turn.place.row}: {error}") from error
        ids = self._encode_pieces(parts)
        begun = [
            self._begun(found, ()) if isinstance(t.prompt, str) else found for t, found in zip(turns, ids, strict=True)
        ]
        return [found or self._beginning() for found in begun]

    def _begun(self, prompt: list[int], responses: Sequence[list[int]]) -> list[int]:
        """A prompt of plain text with what the tokenizer puts at the start of a text, unless the text has it."""
        start = self.bos
        written = self.rendering.special_tokens == "tokens" and start
        if written and any(ids[: len(start)] == start for ids in ([prompt] if prompt else responses)):
            return prompt
        return start + prompt

    def _pieces(self, turn: Turns) -> tuple[list[Part], Sequence[str]]:
        """Prompt and responses as pieces of text, and what there is to notice about them."""
        if isinstance(turn.prompt, str):
            return self._pieces_of_texts(turn.prompt, [str(response) for response in turn.responses])
        if not turn.responses:
            prompt = self.chats.prompt(turn.prompt, turn.tools, turn.arguments)
            return [Part(self.chats.special.pieces(prompt))], ()
        chat = self.chats.chat(turn.prompt, turn.responses, turn.tools, turn.arguments, turn.names)  # type: ignore[arg-type]
        responses = [
            Part(self.chats.special.pieces(response, continues=True), add_end=not ended)
            for response, ended in zip(chat.responses, chat.ended, strict=True)
        ]
        chosen = self.rendering.special_tokens is not None
        ends = () if chosen else self.texts.notices_of_turns(turn.responses)  # type: ignore[arg-type]
        return [Part(self.chats.special.pieces(chat.prompt)), *responses], (*chat.left_out, *ends)

    def _pieces_of_texts(self, prompt: str, responses: Sequence[str]) -> tuple[list[Part], Sequence[str]]:
        noticed = tuple(self.texts.notices(prompt, responses, chosen=self.rendering.special_tokens is not None))
        if self.rendering.special_tokens != "tokens":
            return [Part([Piece(prompt)]), *(Part([Piece(r, continues=True)], True) for r in responses)], noticed
        cut = [self.chats.special.through_end(response) for response in responses]
        ended = [Part([Piece(text, literal=False, continues=True)], not ended) for text, ended in cut]
        return [Part([Piece(prompt, literal=False)]), *ended], noticed

    def _encode_pieces(self, parts: Sequence[Part]) -> Iterator[list[int]]:
        """Ids of every part; all pieces of a kind are encoded together."""
        kinds: dict[tuple[bool, bool], list[str]] = {}
        for part in parts:
            for piece in part.pieces:
                kinds.setdefault((piece.literal, piece.continues), []).append(piece.text)
        encoded = {
            (literal, continues): iter(self._continue(texts, literal) if continues else self.encode(texts, literal))
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
        """The part of a prompt that stays within a limit; what the tokenizer starts a text with stays at its start."""
        if len(prompt) <= limit:
            return prompt
        if (mode or self.lengths.truncation_mode) == "keep_start":
            return prompt[:limit]
        starts = [start for start in (self.bos, [self.tokenizer.bos_token_id]) if start]
        head = next((start for start in starts if prompt[: len(start)] == start and limit > len(start)), [])
        return head + prompt[len(prompt) - limit + len(head) :]

    def _beginning(self, place: Placed | None = None) -> list[int]:
        if self.bos or self.tokenizer.bos_token_id is not None:
            return self.bos or [self.tokenizer.bos_token_id]
        where = f"{place.source}, row {place.row}: the" if place else "a"
        raise UserError(f"{where} prompt is empty and the tokenizer has no beginning-of-sequence token to start from")

    @cached_property
    def _continue(self) -> ContinuationEncoder:
        return ContinuationEncoder(self.tokenizer, self.encode)


def _reason_identical(turn: Turns, left_out: Sequence[str]) -> str:
    """Says what made different responses one."""
    if isinstance(turn.prompt, str):
        return "after tokenization"
    leaves_out = "the chat template leaves out "
    what = ", ".join(text.removeprefix(leaves_out) for text in left_out if text.startswith(leaves_out))
    return "after the chat template" + (f", which leaves out {what}" if what else "")


def outside_vocabulary(token: int, vocab_size: int, tokens: int | None) -> str:
    """Describes a token id that the model has no row for.

    Args:
        token: The id.
        vocab_size: Entries of the model's vocabulary.
        tokens: Tokens of the tokenizer, where there is one.
    """
    sizes = f"the tokenizer has {tokens} tokens, the model's vocabulary {vocab_size} entries" if tokens else ""
    return (
        f"token id {token} is outside the model's vocabulary of {vocab_size}; tokenizer and model do not belong "
        "together" + (f" ({sizes}; --tokenizer_name_or_path names another tokenizer)" if sizes else "")
    )
