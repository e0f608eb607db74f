"""Turns records into token ids: one end token, no merge across the boundary, truncation that is counted."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from tdpo.config.tokens import Lengths, Rendering, TruncationMode
from tdpo.data.continuation import Anchor, encode_continuations, find_anchors
from tdpo.data.encode import TextEncoder
from tdpo.data.formats import BAD_ROW_ADVICE, BadRows, DataReport, OnBadRow, RowError
from tdpo.data.rendered import RenderedTexts
from tdpo.data.special_tokens import RenderedTurns, cut_after_end, special_texts
from tdpo.errors import UserError
from tdpo.types import PreferenceRecord, Text, TokenisedPair

if TYPE_CHECKING:
    from tdpo.data.chat import ChatRenderer
    from tdpo.data.supervised import Exchange

REFUSED_ADVICE = (
    f"{BAD_ROW_ADVICE}, --chat_template_path gives another template, --ignore_columns leaves out a column such as "
    "'system'"
)


class Turns(NamedTuple):
    """A prompt and responses to it, which are tokenised together.

    Attributes:
        record: The record they belong to: its location, tools, template arguments and truncation are theirs.
        prompt: Plain text, or chat messages.
        responses: Responses of the same kind; none where a prompt is asked alone.
    """

    record: PreferenceRecord | Exchange
    prompt: Text
    responses: Sequence[Text] = ()

    @property
    def names(self) -> Sequence[str]:
        """Names of the responses in messages."""
        return ("chosen", "rejected") if len(self.responses) == 2 else ("the response",) * len(self.responses)


class Ids(NamedTuple):
    """Turns as ids.

    Attributes:
        record: The record they belong to.
        prompt: Ids of the prompt; empty only for an empty text where the tokenizer starts a text with nothing.
        responses: Ids of each response.
        reason_identical: What made the responses identical, if they are.
    """

    record: PreferenceRecord | Exchange
    prompt: list[int]
    responses: Sequence[list[int]]
    reason_identical: str = "after truncation"


class Tokeniser:
    """Turns text and chats into ids with a transformers tokenizer.

    Args:
        tokenizer: The tokenizer of the policy.
        lengths: Truncation.
        processes: Processes that a whole dataset is tokenised in; see :mod:`tdpo.data.workers`.
        rendering: Arguments of the chat template, and how special-token text in plain texts is encoded.

    Raises:
        UserError: if the tokenizer has no end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: Any,
        lengths: Lengths | None = None,
        processes: int = 1,
        rendering: Rendering | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end-of-sequence token, so no response could ever end; name one with --eos_token"
            )
        self.tokenizer, self.processes = tokenizer, processes
        self.rendering, self.lengths = rendering or Rendering(), lengths or Lengths()
        self.special = special_texts(tokenizer)
        self.texts = RenderedTexts(tokenizer, self.special)

    @cached_property
    def encode(self) -> TextEncoder:
        """Texts to ids, without start and end tokens."""
        return TextEncoder(self.tokenizer)

    @cached_property
    def _anchors(self) -> list[Anchor]:
        return find_anchors(self.tokenizer, self.encode)

    @cached_property
    def _chats(self) -> ChatRenderer:
        from tdpo.data.chat import ChatRenderer

        return ChatRenderer(self.tokenizer, self.special, self.rendering.template_arguments)

    @cached_property
    def bos(self) -> list[int]:
        """Ids that the tokenizer puts at the start of a text: none, its beginning-of-sequence token, or several."""
        for text in ("a", "1", "."):
            plain = self.encode([text])[0]
            whole = self.tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
            for start in range(len(whole) - len(plain) + 1):
                if plain and whole[start : start + len(plain)] == plain:
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
        """Returns the same tokeniser without truncation."""
        unlimited = copy.copy(self)
        unlimited.lengths = Lengths(max_length=2**31, max_prompt_length=2**30)
        return unlimited

    def pairs(
        self, records: Sequence[PreferenceRecord], report: DataReport, on_bad_row: OnBadRow = "error"
    ) -> list[TokenisedPair]:
        """Tokenises records; truncates, drops or refuses overlong ones as :class:`Lengths` says, and counts them.

        Raises:
            UserError: for chats without a chat template, rows the template cannot render (unless ``on_bad_row`` is
                ``"drop"``), and overlong rows under ``on_overlong: error``.
        """
        turns = [Turns(record, record.prompt, (record.chosen, record.rejected)) for record in records]
        pairs = []
        for ids in self.truncate(self.encode_turns(turns, report, on_bad_row), report):
            chosen, rejected = ids.responses
            if chosen == rejected:
                report.drop(ids.record, f"chosen and rejected are identical {ids.reason_identical}")
                continue
            pairs.append(TokenisedPair(ids.prompt or self._first_ids(ids.record), chosen, rejected, ids.record.row))
        report.kept = len(pairs)
        return pairs

    def encode_turns(self, turns: Iterable[Turns], report: DataReport, on_bad_row: OnBadRow = "error") -> Iterator[Ids]:
        """Encodes prompts and responses of any length, in order; of a record that is refused, no later turns."""
        bad, refused = BadRows(report, on_bad_row), None
        rendered: list[tuple[Turns, RenderedTurns]] = []
        for turn in turns:
            if turn.record is refused:
                continue
            try:
                rendered.append((turn, self._render(turn)))
            except RowError as error:
                refused = turn.record
                bad.add(refused, error)
                continue
            for notice in rendered[-1][1].notices:
                report.notice(turn.record, notice)
        bad.raise_error(REFUSED_ADVICE)
        end = [self.tokenizer.eos_token_id]
        encoded = self._encode_pieces([text for _, text in rendered])
        for (turn, text), (prompt, *responses) in zip(rendered, encoded, strict=True):
            if not all(responses):
                bad.add(turn.record, f"the tokenizer leaves nothing of {turn.names[responses.index([])]}")
                continue
            if self._unknown is not None and any(self._unknown in ids for ids in (prompt, *responses)):
                report.notice(
                    turn.record, f"text that the tokenizer does not know becomes {self.tokenizer.unk_token!r}"
                )
            responses = [ids if ended else ids + end for ids, ended in zip(responses, text.ended, strict=True)]
            if isinstance(turn.prompt, str):
                prompt = self._with_start(prompt, responses)
            ids = Ids(turn.record, prompt, responses)
            if len(responses) > 1 and responses[0] == responses[1]:
                ids = ids._replace(reason_identical=_reason_identical(turn, text.notices))
            yield ids
        bad.raise_error(BAD_ROW_ADVICE)

    def truncate(self, encoded: Iterable[Ids], report: DataReport) -> Iterator[Ids]:
        """Truncates, drops or refuses what is overlong, as :class:`Lengths` says, and counts it.

        Raises:
            UserError: for all overlong rows together, under ``on_overlong: error``.
        """
        limits, overlong = self.lengths, BadRows(report)
        for ids in encoded:
            prompt, longest, row = ids.prompt, max(map(len, ids.responses)), ids.record.row
            if len(prompt) + longest <= limits.max_length:
                yield ids
            elif limits.on_overlong == "error":
                lengths = f"prompt {len(prompt)} + response {longest} tokens"
                overlong.add(ids.record, f"{lengths} exceed --max_length {limits.max_length}")
            elif limits.on_overlong == "drop":
                report.drop(ids.record, f"longer than {limits.max_length} tokens")
            else:
                if len(prompt) > limits.max_prompt_length:
                    report.truncated["prompt"].append(row)
                    prompt = self.cut_prompt(prompt, limits.max_prompt_length, ids.record.truncation_mode)
                room = limits.max_length - len(prompt)
                if longest > room:
                    report.truncated["response"].append(row)
                yield ids._replace(prompt=prompt, responses=[response[:room] for response in ids.responses])
        overlong.raise_error("--on_overlong truncate or drop would continue")

    def prompts(self, asked: Sequence[Text | Turns]) -> list[list[int]]:
        """Encodes prompts of any length: as training has them before responses, or as they are asked alone.

        An empty prompt becomes the ids that the tokenizer starts a text with.

        Args:
            asked: Prompts, or turns, whose responses may be none.

        Raises:
            UserError: for an empty prompt when the tokenizer has no token to begin with, or a chat that cannot be
                rendered.
        """
        turns = [
            one if isinstance(one, Turns) else Turns(PreferenceRecord(one, "", "", "prompts", number), one)
            for number, one in enumerate(asked, 1)
        ]
        rendered = []
        for turn in turns:
            try:
                rendered.append(RenderedTurns(self._render(turn).prompt))
            except RowError as error:
                raise UserError(f"{turn.record.source}, row {turn.record.row}: {error}") from error
        encoded = [ids for (ids,) in self._encode_pieces(rendered)]
        pairs = zip(turns, encoded, strict=True)
        ids = [self._with_start(found, ()) if isinstance(turn.prompt, str) else found for turn, found in pairs]
        return [found or self._first_ids() for found in ids]

    def cut_prompt(self, prompt: list[int], limit: int, mode: TruncationMode | None = None) -> list[int]:
        """Returns what a limit leaves of a prompt; ids that the tokenizer starts a text with stay at its start."""
        if len(prompt) <= limit:
            return prompt
        if (mode or self.lengths.truncation_mode) == "keep_start":
            return prompt[:limit]
        starts = [start for start in (self.bos, [self.tokenizer.bos_token_id]) if start]
        head = next((start for start in starts if prompt[: len(start)] == start and limit > len(start)), [])
        return head + prompt[len(prompt) - limit + len(head) :]

    def _render(self, turn: Turns) -> RenderedTurns:
        """Returns prompt and responses as text to encode.

        Raises:
            RowError: for a chat that cannot be rendered.
        """
        prompt, record, chosen = turn.prompt, turn.record, self.rendering.special_tokens
        responses: Any = turn.responses
        if not isinstance(prompt, str):
            chat = self._chats.render(prompt, responses, record.tools, record.chat_template_kwargs, turn.names)
            ends = () if chosen else self.texts.notices_of_turns(responses)
            return chat._replace(notices=[*chat.notices, *ends])
        notices = list(self.texts.notices(prompt, responses, chosen=chosen is not None))
        literal = chosen != "tokens"
        cut = [(response, False) if literal else cut_after_end(response, self.special) for response in responses]
        pieces = [[(text, literal, True)] for text, _ in cut]
        return RenderedTurns([(prompt, literal, False)], pieces, [ended for _, ended in cut], notices)

    def _encode_pieces(self, rendered: Sequence[RenderedTurns]) -> Iterator[list[list[int]]]:
        """Yields ids of each prompt and its responses; all pieces of a kind are encoded in one batch."""
        parts = [[turns.prompt, *turns.responses] for turns in rendered]
        texts: dict[tuple[bool, bool], list[str]] = defaultdict(list)
        for text, literal, continues in chain.from_iterable(chain.from_iterable(parts)):
            texts[literal, continues].append(text)
        encoded = {}
        for (literal, continues), batch in texts.items():
            anchors = self._anchors if continues else ()
            encoded[literal, continues] = iter(encode_continuations(batch, literal, anchors, self.encode))
        for pieces_of_parts in parts:
            yield [
                list(chain.from_iterable(next(encoded[literal, continues]) for _, literal, continues in pieces))
                for pieces in pieces_of_parts
            ]

    def _with_start(self, prompt: list[int], responses: Sequence[list[int]]) -> list[int]:
        """Returns a prompt of plain text behind the ids that start a text, unless its text has their tokens."""
        start = self.bos
        may_have_it = self.rendering.special_tokens == "tokens" and start
        if may_have_it and any(ids[: len(start)] == start for ids in ([prompt] if prompt else responses)):
            return prompt
        return start + prompt

    def _first_ids(self, record: PreferenceRecord | Exchange | None = None) -> list[int]:
        """Returns the ids that an empty prompt becomes."""
        if self.bos or self.tokenizer.bos_token_id is not None:
            return self.bos or [self.tokenizer.bos_token_id]
        where = f"{record.source}, row {record.row}: the" if record else "a"
        raise UserError(f"{where} prompt is empty and the tokenizer has no beginning-of-sequence token to start from")


def _reason_identical(turn: Turns, left_out: Sequence[str]) -> str:
    """Says what made different responses one."""
    if isinstance(turn.prompt, str):
        return "after tokenization"
    leaves_out = "the chat template leaves out "
    what = ", ".join(text.removeprefix(leaves_out) for text in left_out if text.startswith(leaves_out))
    return "after the chat template" + (f", which leaves out {what}" if what else "")
