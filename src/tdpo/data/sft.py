"""Supervised rows: chosen responses of preference data, prompt and completion, chats, or plain text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from tdpo.data.formats import DataReport, OnBadRow, RowError, convert, detect_format, is_empty, text_of, to_records
from tdpo.data.pack import pack_sequence_trees, pack_sequences
from tdpo.data.sources import SourceRow, from_memory
from tdpo.data.tokenise import Tokeniser
from tdpo.errors import UserError
from tdpo.types import Text


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
    data: Iterable[Any], tokeniser: Tokeniser, on_bad_row: OnBadRow = "error", name: str = "dataset"
) -> SFTDataset:
    """Tokenises rows with ``text``, ``messages``, ``prompt`` and ``completion``, or any preference format (its chosen).

    Raises:
        UserError: for bad rows, unknown columns, and when nothing is left.
    """
    if isinstance(data, SFTDataset):
        return data
    rows = list(data)
    if not rows:
        raise UserError(f"{name}: no rows in it")
    if not isinstance(rows[0], SourceRow):
        rows = from_memory(rows, name)
    turns, report = _turns(rows, on_bad_row)
    prompts = tokeniser.prompts_of_text([prompt for prompt, _, _ in turns])
    responses = tokeniser.responses([(prompt, response) for prompt, response, _ in turns])
    examples = []
    for prompt, response, (_, _, row) in zip(prompts, responses, turns, strict=True):
        fitted = tokeniser.fit(prompt, (response,), row, report)
        if fitted is not None:
            prompt_ids, (response_ids,) = fitted
            if not prompt_ids:
                prompt_ids, response_ids = response_ids[:1], response_ids[1:]
            examples.append(SFTExample(prompt_ids, response_ids, row.row))
    report.kept = len(examples)
    return SFTDataset(examples, report)


def check_lengths(dataset: SFTDataset, positions: int | None) -> None:
    """Refuses examples longer than the model's positions.

    Raises:
        UserError: naming the row.
    """
    for example, length in zip(dataset.examples, dataset.lengths(), strict=True):
        if positions is not None and length > positions:
            raise UserError(
                f"{dataset.report.source}, row {example.row}: {length} tokens, but the model has {positions} "
                f"positions; set --max_length to at most {positions}"
            )


Turn = tuple[Text, Text, SourceRow]


def _turns(rows: list[SourceRow], on_bad_row: OnBadRow) -> tuple[list[Turn], DataReport]:
    readable = next((row for row in rows if not row.error), rows[0])
    for columns, function in SFT_FORMATS.items():
        if set(columns) <= readable.fields.keys():
            report = DataReport(rows[0].source, "+".join(columns))
            return convert(rows, function, report, on_bad_row), report
    try:
        detect_format(readable)
    except UserError as error:
        known = ", ".join(" and ".join(columns) for columns in SFT_FORMATS)
        raise UserError(f"{error}; for supervised training also: {known}") from None
    records, report = to_records(rows, "auto", on_bad_row)
    by_row = {row.row: row for row in rows}
    return [(record.prompt, record.chosen, by_row[record.row]) for record in records], report


def _text_turn(row: SourceRow) -> Turn:
    return _checked("", text_of(row, "text"), row, "text")


def _completion_turn(row: SourceRow) -> Turn:
    prompt, completion = text_of(row, "prompt"), text_of(row, "completion")
    if type(prompt) is not type(completion):
        raise RowError("one of 'prompt' and 'completion' is a text, the other chat messages")
    return _checked(prompt, completion, row, "completion")


def _messages_turn(row: SourceRow) -> Turn:
    messages = text_of(row, "messages")
    if isinstance(messages, str) or messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise RowError("field 'messages' must be a list of chat messages that ends with the assistant's")
    return _checked(messages[:-1], messages[-1:], row, "messages")


def _checked(prompt: Text, response: Text, row: SourceRow, name: str) -> Turn:
    if is_empty(response):
        raise RowError(f"field {name!r} is empty")
    return prompt, response, row


SFT_FORMATS = {
    ("prompt", "completion"): _completion_turn,
    ("messages",): _messages_turn,
    ("text",): _text_turn,
}
