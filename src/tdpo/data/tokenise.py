"""Tokenises records.

Each response ends in one end token, no token spans the end of the prompt, and truncation is counted in a report.
"""

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
    """A prompt and the responses to it, which are tokenised together.

    Attributes:
        record: The record they come from, with its location, tools, template arguments and truncation mode.
        prompt: Plain text, or chat messages.
        responses: Responses of the same kind; empty for a prompt without responses.
    """

    record: PreferenceRecord
    prompt: Text
    responses: Sequence[Text] = ()

    @property
    def names(self) -> Sequence[str]:
        """Names of the responses in messages."""
        return ("chosen", "rejected") if len(self.responses) == 2 else ("the response",) * len(self.responses)


class Ids(NamedTuple):
    """The token ids of turns.

    Attributes:
        record: The record they come from.
        prompt: Ids of the prompt; empty only if its text is empty and the tokenizer adds no start token.
        responses: Ids of each response.
        per_token: Lists with one item per response token, such as labels, which are truncated with the responses.
        reason_identical: What made the responses identical, if they are.
    """

    record: PreferenceRecord
    prompt: list[int]
    responses: Sequence[list[int]]
    per_token: Sequence[list[Any]] = ()
    reason_identical: str = "after truncation"


class Tokeniser:
    """Tokenises text and chats with a transformers tokenizer.

    Args:
        tokenizer: The tokenizer of the policy.
        lengths: Length limits, and what happens to longer rows.
        processes: Number of processes for a whole dataset; see :mod:`tdpo.data.workers`.
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
                "the tokenizer has no end-of-sequence token, so no response could end; name one with --eos_token"
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
        """Tokenises records; truncates, drops or refuses overlong ones as set in :class:`Lengths`, and counts them.

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
            weights = dict(zip(ids.record.weights or (), ids.per_token, strict=True))
            all_zero = next((name for name, numbers in weights.items() if not any(numbers)), "")
            if all_zero:
                report.drop(ids.record, f"{all_zero!r} is 0 for every token left after truncation")
                continue
            prompt = ids.prompt or self._first_ids(ids.record)
            pairs.append(TokenisedPair(prompt, chosen, rejected, ids.record.row, **weights))
        report.kept = len(pairs)
        return pairs

    def encode_turns(self, turns: Iterable[Turns], report: DataReport, on_bad_row: OnBadRow = "error") -> Iterator[Ids]:
        """Encodes prompts and responses in order, without truncation.

        After a turn that cannot be rendered, further turns of its record are skipped.

        Raises:
            UserError: for all bad rows together, under ``on_bad_row: error``.
        """
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
                bad.add(turn.record, f"the tokenizer returns no tokens for {turn.names[responses.index([])]}")
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
                    ids = ids._replace(per_token=self._weights(turn, responses))
                except RowError as error:
                    bad.add(turn.record, error)
                    continue
            if len(responses) > 1 and responses[0] == responses[1]:
                ids = ids._replace(reason_identical=_reason_identical(turn, text.notices))
            yield ids
        bad.raise_error(BAD_ROW_ADVICE)

    def _weights(self, turn: Turns, responses: Sequence[list[int]]) -> list[list[float]]:
        """Returns the token weights of a record, one list per weight column.

        Raises:
            RowError: naming the column, for weights that do not fit the tokens or the text.
        """
        weights = []
        for name, value in (turn.record.weights or {}).items():
            side = 1 if name.startswith("rejected") else 0
            response = turn.responses[side]
            text = response if isinstance(response, str) else str(response[-1].get("content"))
            weights.append(token_weights(value, name, responses[side], text, self.tokenizer.decode))
        return weights

    def truncate(self, encoded: Iterable[Ids], report: DataReport) -> Iterator[Ids]:
        """Truncates, drops or refuses overlong rows as set in :class:`Lengths`, and counts them.

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
                responses, per_token = ([part[:room] for part in parts] for parts in (ids.responses, ids.per_token))
                yield ids._replace(prompt=prompt, responses=responses, per_token=per_token)
        overlong.raise_error("raise --max_length, or use --on_overlong truncate or --on_overlong drop")

    def prompts(self, prompts: Sequence[Text | Turns]) -> list[list[int]]:
        """Encodes prompts without truncation, to generate responses.

        An empty prompt becomes the ids that the tokenizer starts a text with.

        Args:
            prompts: Prompts, or turns. A chat prompt with responses is rendered as training renders it before them.

        Raises:
            UserError: for an empty prompt if the tokenizer has no start token, or a chat that cannot be rendered.
        """
        turns = [
            prompt if isinstance(prompt, Turns) else Turns(PreferenceRecord(prompt, "", "", "prompts", number), prompt)
            for number, prompt in enumerate(prompts, 1)
        ]
        rendered = []
        for turn in turns:
            try:
                rendered.append(RenderedTurns(self._render(turn).prompt))
            except RowError as error:
                raise UserError(f"{turn.record.source}, row {turn.record.row}: {error}") from error
        encoded = zip(turns, self.encode.turns(rendered), strict=True)
        started = [self._with_start(ids, ()) if isinstance(turn.prompt, str) else ids for turn, (ids,) in encoded]
        return [ids or self._first_ids() for ids in started]

    def cut_prompt(self, prompt: list[int], limit: int, mode: TruncationMode | None = None) -> list[int]:
        """Truncates a prompt to ``limit`` ids at its start or end; a start token stays at the start."""
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
        prompt, record, special_tokens = turn.prompt, turn.record, self.rendering.special_tokens
        responses: Any = turn.responses
        if not isinstance(prompt, str):
            chat = self._chats.render(prompt, responses, record.tools, record.chat_template_kwargs, turn.names)
            further = () if special_tokens else self.special.notices_of_turns(responses)
            return chat._replace(notices=[*chat.notices, *further])
        notices = list(self.special.notices(prompt, responses, option_set=special_tokens is not None))
        literal = special_tokens != "tokens"
        cut = [(response, False) if literal else self.special.cut_after_end(response) for response in responses]
        pieces = [[(text, literal, True)] for text, _ in cut]
        return RenderedTurns([(prompt, literal, False)], pieces, [ended for _, ended in cut], notices)

    def _with_start(self, prompt: list[int], responses: Sequence[list[int]]) -> list[int]:
        """Prepends the ids that start a text to a plain-text prompt, unless the text begins with them itself."""
        start = self.encode.start
        may_begin = self.rendering.special_tokens == "tokens" and start
        if may_begin and any(ids[: len(start)] == start for ids in ([prompt] if prompt else responses)):
            return prompt
        return start + prompt

    def _first_ids(self, record: PreferenceRecord | None = None) -> list[int]:
        """Returns the ids that replace an empty prompt."""
        if self.encode.start or self.tokenizer.bos_token_id is not None:
            return self.encode.start or [self.tokenizer.bos_token_id]
        where = f"{record.source}, row {record.row}: the" if record else "a"
        raise UserError(
            f"{where} prompt is empty and the tokenizer has no beginning-of-sequence token to start from; give a prompt"
        )


def _reason_identical(turn: Turns, left_out: Sequence[str]) -> str:
    """Describes what made different responses identical."""
    if isinstance(turn.prompt, str):
        return "after tokenization"
    leaves_out = "the chat template leaves out "
    what = ", ".join(text.removeprefix(leaves_out) for text in left_out if text.startswith(leaves_out))
    return "after the chat template" + (f", which leaves out {what}" if what else "")
