"""Examples of supervised fine-tuning: sequences of ids and labels, from rows of every supervised format."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from tdpo.config.row_spec import RowSpec
from tdpo.data.dataset import check_limits
from tdpo.data.formats import AUTO, DataReport, OnBadRow, iter_records, name_of
from tdpo.data.pack import pack_sequences
from tdpo.data.sources import Source, SourceRow, from_memory
from tdpo.data.supervised import SFT_FORMATS, Exchange
from tdpo.data.tokenise import Ids, Tokeniser, Turns
from tdpo.errors import UserError
from tdpo.types import Layout, PackedBatch

TrainOn = Literal["every_turn", "last_turn"]
MASKED = -100
"""Label of a token that is read but not learnt, as in transformers."""
CHUNK = 512
"""Conversations that are tokenised together; each turn is encoded with all turns before it."""
SEPARATE = "several sequences, because earlier turns have other tokens once others follow, as without their thoughts"
PLAIN = "the prompt is a plain text and used as it stands, without the chat template"


@dataclass(frozen=True)
class SFTExample:
    """One sequence to learn: the loss is on the responses, their end tokens included.

    Attributes:
        prompt_ids: Ids before the first response; of plain text its first token, which nothing predicts.
        response_ids: Ids that follow: a response, or the responses of a conversation with the turns between them.
        row: Row number in the source.
        labels: What is to be predicted in place of each of ``response_ids``, :data:`MASKED` for nothing. None is the
            ids themselves. Only where a response's end token is not of the chat template is a label another token.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    row: int = 0
    labels: list[int] | None = None


@dataclass
class SFTReport(DataReport):
    """The report of supervised rows.

    Attributes:
        train_on: Which turns of a conversation are learnt.
        conversations: Conversations with several turns to learn.
        turns: Turns to learn in them.
    """

    item = "sequences"
    train_on: TrainOn = "every_turn"
    conversations: int = 0
    turns: int = 0

    def lines(self) -> list[str]:
        """Describes the rows as any report does, and which turns of conversations are learnt."""
        lines = super().lines()
        if self.conversations:
            several = f"conversations with several assistant turns: {self.conversations}"
            every = f"all {self.turns} turns are learnt (--train_on last_turn learns the last alone)"
            last = f"of {self.turns} turns only the last of each is learnt (--train_on every_turn learns all)"
            lines.append(f"{several}; {every if self.train_on == 'every_turn' else last}")
        return lines


class SFTDataset(Dataset[SFTExample]):
    """Supervised examples with the report on their rows."""

    def __init__(self, examples: Sequence[SFTExample], report: DataReport) -> None:
        if not examples:
            raise UserError(f"{report.source}: no example is left. " + "; ".join(report.lines()))
        self.examples, self.report = examples, report

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> SFTExample:
        return self.examples[index]

    def lengths(self) -> list[int]:
        """Returns the tokens of each example."""
        return [len(example.prompt_ids) + len(example.response_ids) for example in self.examples]


def pack_examples(examples: Sequence[SFTExample], trees: bool = False, every_token: bool = False) -> PackedBatch:
    """Packs examples into rows, with the labels that are to be learnt.

    Args:
        examples: The examples.
        trees: Lets several examples share a row, none of which sees another.
        every_token: Puts the last token of each, which predicts nothing, in those rows too.
    """
    prompts, responses = [e.prompt_ids for e in examples], [e.response_ids for e in examples]
    layout: Layout = "tree" if trees else "padded"
    batch = pack_sequences(prompts, responses, [e.row for e in examples], layout, every_token=every_token)
    if all(example.labels is None for example in examples):
        return batch
    labels = [e.response_ids if e.labels is None else e.labels for e in examples]
    labels_N = torch.tensor([label for sequence in labels for label in sequence])
    kept_N = labels_N != MASKED
    counts = [sum(label != MASKED for label in sequence) for sequence in labels]
    return replace(
        batch,
        source_index=batch.source_index[kept_N],
        labels=labels_N[kept_N],
        sequence_ids=batch.sequence_ids[kept_N],
        lengths=tuple(count for kept in counts for count in (kept, 0)),
    )


def prepare_sft(
    data: Iterable[Any],
    tokeniser: Tokeniser,
    spec: str | RowSpec = AUTO,
    on_bad_row: OnBadRow = "error",
    name: str = "dataset",
    train_on: TrainOn = "every_turn",
) -> SFTDataset:
    """Tokenises rows of a supervised format (:data:`tdpo.data.supervised.SFT_FORMATS`), or of pairs (their chosen).

    Args:
        data: An ``SFTDataset``, or an iterable of :class:`~tdpo.data.sources.SourceRow` or dictionaries of columns.
        tokeniser: Tokenizer and truncation.
        spec: How rows are read that do not say so themselves.
        on_bad_row: ``"error"`` or ``"drop"``.
        name: What messages call rows that come from memory.
        train_on: Which assistant turns of a conversation are learnt.

    Raises:
        UserError: for bad rows, unknown columns, and when nothing is left.
    """
    if isinstance(data, SFTDataset):
        return data
    rows: Source | list[Any] = data if isinstance(data, Source) else list(data)
    if isinstance(rows, list) and not (rows and isinstance(rows[0], SourceRow)):
        rows = from_memory(rows, name)
    report = SFTReport(name_of(rows), train_on=train_on)
    exchanges: list[Any] = list(iter_records(rows, spec, on_bad_row, report, SFT_FORMATS))
    if tokeniser.rendering.special_tokens is None:
        exchanges = list(tokeniser.special.refuse_rendered(exchanges))
    examples: list[SFTExample] = []
    for start in range(0, len(exchanges), CHUNK):
        turns = [turn for exchange in exchanges[start : start + CHUNK] for turn in _turns(exchange, train_on)]
        sequences = _conversations(tokeniser.encode_turns(turns, report, on_bad_row), report)
        examples += map(_example, tokeniser.truncate(sequences, report))
    if tokeniser.tokenizer.chat_template:
        for exchange in exchanges:
            if exchange.prompt and isinstance(exchange.prompt, str):
                report.notice(exchange, PLAIN)
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
        ids = (*example.prompt_ids, *example.response_ids)
        check_limits(f"{dataset.report.source}, row {example.row}", ids, length, vocab_size, positions, tokens)


def _turns(exchange: Exchange, train_on: TrainOn) -> list[Turns]:
    """Returns the turns to learn of a conversation, each with all messages before it as its prompt."""
    messages: Any = exchange.prompt
    earlier = exchange.earlier if train_on == "every_turn" else ()
    last = Turns(exchange, exchange.prompt, (exchange.chosen,))
    return [*(Turns(exchange, messages[:index], ([messages[index]],)) for index in earlier), last]


def _conversations(encoded: Iterable[Ids], report: SFTReport) -> Iterator[Ids]:
    """Yields the sequences of each conversation, and counts them in the report."""
    for _, group in itertools.groupby(encoded, lambda ids: id(ids.record)):
        turns = list(group)
        exchange: Exchange = turns[0].record  # type: ignore[assignment]
        count = len(_turns(exchange, report.train_on))
        # A weight repeats a conversation; of one that was refused at a later turn there are too few.
        for start in range(0, len(turns) - count + 1, count):
            sequences = list(_sequences(turns[start : start + count]))
            for note in exchange.notes + ((SEPARATE,) if len(sequences) > 1 else ()):
                report.notice(exchange, note)
            if exchange.earlier:
                report.conversations += 1
                report.turns += 1 + len(exchange.earlier)
            yield from sequences


def _sequences(turns: Sequence[Ids]) -> Iterator[Ids]:
    """Joins a conversation's turns into one sequence for as long as each prompt continues the turn before.

    So every response is learnt behind exactly the ids it will be asked with. Another sequence begins where a template
    renders a turn differently once others follow, or a tokenizer merges across its end.

    Yields:
        Prompt, what follows it, and beside that its labels.
    """
    record, prompt, (response,) = turns[0][:3]
    ids, labels = list(response), list(response)
    for _, asked, (response,), *_ in turns[1:]:
        known = prompt + ids
        if asked[: len(known)] == known:
            gap = asked[len(known) :]
            masked = len(gap)
        elif len(asked) >= len(known) and asked[: len(known) - 1] == known[:-1]:
            # The end token is not of the template: it is learnt, and the conversation continues without it.
            gap = asked[len(known) - 1 :]
            ids.pop()
            masked = len(gap) - 1
        else:
            yield Ids(record, prompt, [ids], [labels])
            prompt, ids, labels = asked, list(response), list(response)
            continue
        ids += gap + response
        labels += [MASKED] * masked + response
    yield Ids(record, prompt, [ids], [labels])


def _example(ids: Ids) -> SFTExample:
    """Makes the example of a sequence that is within the limits."""
    prompt, (response,), (labels,) = ids.prompt, ids.responses, ids.per_token
    while labels[-1] == MASKED:  # a turn of the user's that truncation left last
        labels = labels[:-1]
    response = response[: len(labels)]
    if not prompt:
        prompt, response, labels = response[:1], response[1:], labels[1:]
    return SFTExample(prompt, response, ids.record.row, None if labels == response else labels)
