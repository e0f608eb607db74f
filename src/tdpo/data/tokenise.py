"""Turns records into token ids: one end token, no merge across the boundary, truncation that is counted."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from tdpo.config.tokens import Lengths, Rendering, TruncationMode
from tdpo.data.encode import RenderedTurns, TextEncoder
from tdpo.data.formats import BAD_ROW_ADVICE, BadRows, DataReport, OnBadRow, RowError
from tdpo.data.special_tokens import SpecialTokens
from tdpo.data.token_weights import token_weights
from tdpo.errors import UserError
from tdpo.types import PreferenceRecord, Text, TokenisedPair

if TYPE_CHECKING:
    from tdpo.data.chat import ChatRenderer

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

    record: PreferenceRecord
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
        beside: Lists of one item for each response token, such as labels, which are truncated with the responses.
        reason_identical: What made the responses identical, if they are.
    """

    record: PreferenceRecord
    prompt: list[int]
    responses: Sequence[list[int]]
    beside: Sequence[list[Any]] = ()
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
        self.special, self.encode = SpecialTokens(tokenizer), TextEncoder(tokenizer)

    @cached_property
    def _chats(self) -> ChatRenderer:
        from tdpo.data.chat import ChatRenderer

        return ChatRenderer(self.tokenizer, self.special, self.rendering.template_arguments)

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
            weights = dict(zip(ids.record.weights or (), ids.beside, strict=True))
            unused = next((name for name, numbers in weights.items() if not any(numbers)), "")
            if unused:
                report.drop(ids.record, f"{unused!r} is 0 for every token that truncation leaves")
                continue
            prompt = ids.prompt or self._first_ids(ids.record)
            pairs.append(TokenisedPair(prompt, chosen, rejected, ids.record.row, **weights))
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
        encoded = self.encode.turns([text for _, text in rendered])
        unknown = self.encode.unknown
        for (turn, text), (prompt, *responses) in zip(rendered, encoded, strict=True):
            if not all(responses):
                bad.add(turn.record, f"the tokenizer leaves nothing of {turn.names[responses.index([])]}")
                continue
            if unknown is not None and any(unknown in ids for ids in (prompt, *responses)):
                report.notice(
                    turn.record, f"text that the tokenizer does not know becomes {self.tokenizer.unk_token!r}"
                )
            responses = [ids if ended else ids + end for ids, ended in zip(responses, text.ended, strict=True)]
            if isinstance(turn.prompt, str):
                prompt = self._with_start(prompt, responses)
            ids = Ids(turn.record, prompt, responses)
            if turn.record.weights:
                try:
                    ids = ids._replace(beside=self._weights(turn, responses))
                except RowError as error:
                    bad.add(turn.record, error)
                    continue
            if len(responses) > 1 and responses[0] == responses[1]:
                ids = ids._replace(reason_identical=_reason_identical(turn, text.notices))
            yield ids
        bad.raise_error(BAD_ROW_ADVICE)

    def _weights(self, turn: Turns, responses: Sequence[list[int]]) -> list[list[float]]:
        """Returns the token weights of a record, a list for each of its columns.

        Raises:
            RowError: naming the column, for weights that do not fit the tokens or the text.
        """
        found = []
        for name, value in (turn.record.weights or {}).items():
            side = name.startswith("rejected")
            response = turn.responses[side]
            text = response if isinstance(response, str) else str(response[-1].get("content"))
            found.append(token_weights(value, name, responses[side], text, self.tokenizer.decode))
        return found

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
                responses, beside = ([part[:room] for part in parts] for parts in (ids.responses, ids.beside))
                yield ids._replace(prompt=prompt, responses=responses, beside=beside)
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
        encoded = [ids for (ids,) in self.encode.turns(rendered)]
        pairs = zip(turns, encoded, strict=True)
        ids = [self._with_start(found, ()) if isinstance(turn.prompt, str) else found for turn, found in pairs]
        return [found or self._first_ids() for found in ids]

    def cut_prompt(self, prompt: list[int], limit: int, mode: TruncationMode | None = None) -> list[int]:
        """Returns what a limit leaves of a prompt; ids that the tokenizer starts a text with stay at its start."""
        if len(prompt) <= limit:
            return prompt
        if (mode or self.lengths.truncation_mode) == "keep_start":
            return prompt[:limit]
        starts = [start for start in (self.encode.start, [self.tokenizer.bos_token_id]) if start]
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
            ends = () if chosen else self.special.notices_of_turns(responses)
            return chat._replace(notices=[*chat.notices, *ends])
        notices = list(self.special.notices(prompt, responses, chosen=chosen is not None))
        literal = chosen != "tokens"
        cut = [(response, False) if literal else self.special.cut_after_end(response) for response in responses]
        pieces = [[(text, literal, True)] for text, _ in cut]
        return RenderedTurns([(prompt, literal, False)], pieces, [ended for _, ended in cut], notices)

    def _with_start(self, prompt: list[int], responses: Sequence[list[int]]) -> list[int]:
        """Returns a prompt of plain text behind the ids that start a text, unless its text has their tokens."""
        start = self.encode.start
        may_have_it = self.rendering.special_tokens == "tokens" and start
        if may_have_it and any(ids[: len(start)] == start for ids in ([prompt] if prompt else responses)):
            return prompt
        return start + prompt

    def _first_ids(self, record: PreferenceRecord | None = None) -> list[int]:
        """Returns the ids that an empty prompt becomes."""
        if self.encode.start or self.tokenizer.bos_token_id is not None:
            return self.encode.start or [self.tokenizer.bos_token_id]
        where = f"{record.source}, row {record.row}: the" if record else "a"
        raise UserError(f"{where} prompt is empty and the tokenizer has no beginning-of-sequence token to start from")


def _reason_identical(turn: Turns, left_out: Sequence[str]) -> str:
    """Says what made different responses one."""
    if isinstance(turn.prompt, str):
        return "after tokenization"
    leaves_out = "the chat template leaves out "
    what = ", ".join(text.removeprefix(leaves_out) for text in left_out if text.startswith(leaves_out))
    return "after the chat template" + (f", which leaves out {what}" if what else "")
