"""Supervised rows: chosen responses of preference data, prompt and completion, chats, or plain text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch.utils.data import Dataset

from tdpo.data.formats import (
    AUTO,
    FORMATS,
    DataReport,
    Format,
    OnBadRow,
    RowError,
    chat_options,
    convert,
    is_empty,
    name_of,
    text_of,
)
from tdpo.data.pack import pack_sequence_trees, pack_sequences
from tdpo.data.reading import Reading
from tdpo.data.sources import Source, SourceRow, from_memory
from tdpo.data.tokenise import Tokeniser, Turns, outside_vocabulary
from tdpo.errors import UserError
from tdpo.types import PreferenceRecord, Text


@dataclass(frozen=True)
class SFTExample:
    """One sequence to learn: the loss is on the response, its end token included.

    Attributes:
        prompt_ids: Ids before the response; of plain text its first token, which nothing predicts.
        response_ids: Ids that are learnt.
        row: Row number in the source.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    row: int = 0


class SFTDataset(Dataset[SFTExample]):
    """Examples with the report of how they came about."""

    def __init__(self, examples: Sequence[SFTExample], report: DataReport) -> None:
        if not examples:
            raise UserError(f"{report.source}: no example is left. " + "; ".join(report.lines()))
        self.examples, self.report = examples, report

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> SFTExample:
        return self.examples[index]

    def __iter__(self) -> Iterator[SFTExample]:
        return iter(self.examples)

    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(example.prompt_ids) + len(example.response_ids) for example in self.examples]


@dataclass(frozen=True)
class SFTCollator:
    """Makes a batch as the loader delivers it: the fields of a :class:`~tdpo.types.PackedBatch`.

    Attributes:
        packed: Whether several examples share a row, each blind to the others.
    """

    packed: bool

    def __call__(self, examples: Sequence[SFTExample]) -> dict[str, Any]:
        """The batch of some examples."""
        pack = pack_sequence_trees if self.packed else pack_sequences
        prompts, responses = [e.prompt_ids for e in examples], [e.response_ids for e in examples]
        return pack(prompts, responses, [e.row for e in examples]).as_dict()


def prepare_sft(
    data: Iterable[Any],
    tokeniser: Tokeniser,
    reading: str | Reading = AUTO,
    on_bad_row: OnBadRow = "error",
    name: str = "dataset",
) -> SFTDataset:
    """Tokenises rows with ``text``, ``messages``, ``prompt`` and ``completion``, or any preference format (its chosen).

    Args:
        data: An ``SFTDataset``, or an iterable of :class:`~tdpo.data.sources.SourceRow` or dictionaries of columns.
        tokeniser: Tokenizer and truncation.
        reading: How rows are read that do not say so themselves.
        on_bad_row: ``"error"`` or ``"drop"``.
        name: What messages call rows that come from memory.

    Raises:
        UserError: for bad rows, unknown columns, and when nothing is left.
    """
    if isinstance(data, SFTDataset):
        return data
    rows: Source | list[SourceRow]
    if isinstance(data, Source):
        rows = data
    else:
        given = list(data)
        rows = given if given and isinstance(given[0], SourceRow) else from_memory(given, name)
    turns, report = _exchanges(rows, reading, on_bad_row)
    examples = []
    watched = tokeniser.texts.refuse_unless_chosen(turns, lambda turn: (turn.prompt, turn.response))
    asked = [Turns.of(turn, turn.response) for turn in (turns if tokeniser.rendering.special_tokens else watched)]
    for ids in tokeniser.turns(asked, report, on_bad_row):
        prompt_ids, (response_ids,) = ids.prompt, ids.responses
        if not prompt_ids:
            prompt_ids, response_ids = response_ids[:1], response_ids[1:]
        examples.append(SFTExample(prompt_ids, response_ids, ids.place.row))
    report.kept = len(examples)
    return SFTDataset(examples, report)


def check_lengths(
    dataset: SFTDataset, positions: int | None, vocab_size: int | None = None, tokens: int | None = None
) -> None:
    """Refuses examples longer than the model's positions, and ids outside its vocabulary.

    Raises:
        UserError: naming the row.
    """
    for example, length in zip(dataset.examples, dataset.lengths(), strict=True):
        if positions is not None and length > positions:
            raise UserError(
                f"{dataset.report.source}, row {example.row}: {length} tokens, but the model has {positions} "
                f"positions; set --max_length to at most {positions}"
            )
        largest = max((*example.prompt_ids, *example.response_ids))
        if vocab_size is not None and largest >= vocab_size:
            raise UserError(
                f"{dataset.report.source}, row {example.row}: {outside_vocabulary(largest, vocab_size, tokens)}"
            )


@dataclass(frozen=True)
class Exchange:
    """A prompt and the response to learn.

    Attributes:
        prompt: Plain text or chat messages; empty before plain text.
        response: The same kind.
        source: The file or dataset it was read from.
        row: Its row there.
        tools: As in :class:`~tdpo.types.PreferenceRecord`.
        chat_template_kwargs: The same.
        truncation_mode: The same.
    """

    prompt: Text
    response: Text
    source: str
    row: int
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    truncation_mode: Literal["keep_end", "keep_start"] | None = None


def _exchanges(
    rows: Iterable[SourceRow], reading: str | Reading, on_bad_row: OnBadRow
) -> tuple[list[Exchange], DataReport]:
    def key(exchange: Exchange) -> Text:
        return exchange.prompt or exchange.response

    report = DataReport(name_of(rows))
    return list(convert(rows, reading, on_bad_row, report, SFT_FORMATS, key)), report


def _text(row: SourceRow, reading: Reading) -> list[Exchange]:
    text = text_of(row, "text")
    if not isinstance(text, str):
        raise RowError("field 'text' must be a text, found chat messages")
    return _exchange(row, "", text, "text")


def _completion(row: SourceRow, reading: Reading) -> list[Exchange]:
    prompt, completion = text_of(row, "prompt"), text_of(row, "completion")
    if isinstance(prompt, str) != isinstance(completion, str):
        raise RowError("one of 'prompt' and 'completion' is a text, the other chat messages")
    return _exchange(row, prompt, completion, "completion")


def _messages(row: SourceRow, reading: Reading) -> list[Exchange]:
    messages = text_of(row, "messages")
    if isinstance(messages, str) or messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise RowError("field 'messages' must be a list of chat messages that ends with the assistant's")
    return _exchange(row, messages[:-1], messages[-1:], "messages")


def _exchange(row: SourceRow, prompt: Text, response: Text, name: str) -> list[Exchange]:
    if is_empty(response):
        raise RowError(f"field {name!r} is empty")
    return [Exchange(prompt, response, row.source, row.row, **chat_options(row, prompt))]


def chosen_of(known: Format) -> Format:
    """A format of preferences as one of responses: the chosen ones, and of several answers the best."""

    def best(reading: Reading) -> Reading:
        return reading if reading.pairs_from else replace(reading, pairs_from="best_worst")

    def responses(records: Iterable[PreferenceRecord]) -> Iterator[Exchange]:
        for record in records:
            kept = ("source", "row", "tools", "chat_template_kwargs")
            yield Exchange(record.prompt, record.chosen, **{name: getattr(record, name) for name in kept})

    def convert_row(row: SourceRow, reading: Reading) -> list[Any]:
        made = known.convert(row, best(reading))
        return list(made if known.join else responses(made))

    def join(made: Sequence[Any], reading: Reading, report: DataReport) -> Iterator[Exchange]:
        assert known.join is not None
        return responses(known.join(made, best(reading), report))

    return replace(known, convert=convert_row, join=join if known.join else None)


SFT_FORMATS: dict[str, Format] = {
    "completion": Format("prompt, completion", lambda fields: {"prompt", "completion"} <= fields.keys(), _completion),
    "messages": Format("messages", lambda fields: "messages" in fields and "chosen" not in fields, _messages),
    "text": Format("text", lambda fields: "text" in fields, _text),
    **{name: chosen_of(known) for name, known in FORMATS.items()},
}
"""Supervised rows, and behind them all preference formats."""
