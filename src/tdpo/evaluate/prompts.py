"""Prompts of a dataset, from preference rows or prompt-only rows, encoded as in training."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from tdpo.config.data import UNLIMITED
from tdpo.config.row_spec import RowSpec
from tdpo.data.dataset import check_fits
from tdpo.data.formats import AUTO, FORMATS, DataReport, RowError, chat_options, iter_records, renamed, without
from tdpo.data.formats.convert import LOOKED_AT
from tdpo.data.formats.prompts import PROMPTS, prompt_of, with_system
from tdpo.data.formats.registry import recognise
from tdpo.data.sources import SourceRow, open_source
from tdpo.data.tokenise import Tokeniser, Turns
from tdpo.errors import UserError
from tdpo.models.policy import head_of, position_limit
from tdpo.types import PreferenceRecord, TokenisedPair

logger = logging.getLogger("tdpo")


class Prompt(NamedTuple):
    """A prompt to sample from.

    Attributes:
        content: Text, or chat messages, as passed to the reward.
        ids: Its token ids.
    """

    content: Any
    ids: list[int]


def read_prompts(
    name: str, split: str, config: str | None, spec: RowSpec, tokeniser: Tokeniser, count: int | None = None
) -> list[Turns]:
    """Returns the first prompts of a dataset; consecutive pairs with the same prompt count once.

    Args:
        name: The dataset, as ``--dataset_name``.
        split: Its split.
        config: Configuration of a hub dataset.
        spec: How rows are read; if it has a side of a split, only prompts of this side are returned.
        tokeniser: Its options decide whether texts that are rendered chats are refused.
        count: Maximum number of prompts; None for all.

    Raises:
        UserError: if the dataset has no prompts.
    """
    report = DataReport(name)
    records = _records(name, split, config, spec, report)
    if tokeniser.rendering.special_tokens is None:
        records = tokeniser.special.refuse_rendered(records)

    def question(record: PreferenceRecord) -> tuple[Any, ...]:
        # Consecutive pairs with the same prompt count once; rows without responses count each.
        return record.prompt, record.tools, record.chat_template_kwargs, None if record.chosen else record.row

    first: dict[str, PreferenceRecord] = {}
    for record in records:
        if len(first) == count:
            break
        first.setdefault(repr(question(record)), record)
    asked = [
        Turns(record, record.prompt, [response for response in (record.chosen, record.rejected) if response])
        for record in first.values()
    ]
    if report.dropped:
        logger.warning("; ".join(report.lines()))
    if not asked:
        raise UserError(f"{name}: has no prompts. " + "; ".join(report.lines()))
    return asked


def encode_prompts(
    tokeniser: Tokeniser,
    asked: Sequence[Turns],
    models: Sequence[nn.Module],
    max_new_tokens: int,
    max_prompt_length: int | None,
    name: str,
) -> list[Prompt]:
    """Returns the prompts with their token ids, truncated to fit the models' positions.

    Args:
        tokeniser: Encodes the prompts.
        asked: The prompts.
        models: The models that are sampled from.
        max_new_tokens: Maximum length of a response, as ``--max_new_tokens``.
        max_prompt_length: Maximum length of a prompt, as ``--max_prompt_length``; None for what the positions allow.
        name: The dataset, for messages.

    Raises:
        UserError: if the positions leave no room for a prompt, or a token is not in a model's vocabulary.
    """
    positions = position_limit(*models)
    room = min(max_prompt_length or UNLIMITED, (positions or UNLIMITED) - max_new_tokens)
    if room < 1:
        raise UserError(
            f"--max_new_tokens {max_new_tokens} and --max_prompt_length {max_prompt_length} leave no "
            f"room for a prompt in the {positions} positions of the model"
        )
    whole = tokeniser.prompts(asked)
    ids = [tokeniser.cut_prompt(ids, room) for ids in whole]
    cut = sum(len(kept) < len(found) for kept, found in zip(ids, whole, strict=True))
    if cut:
        logger.warning("%d of %d prompts are cut to their last %d tokens", cut, len(ids), room)
    rows = [TokenisedPair(p, p[:1], p[:1], turns.record.row) for turns, p in zip(asked, ids, strict=True)]
    for model in models:
        check_fits(rows, head_of(model).vocab_size, None, name, len(tokeniser.tokenizer))
    return [Prompt(turns.prompt, prompt) for turns, prompt in zip(asked, ids, strict=True)]


def _records(
    name: str, split: str, config: str | None, spec: RowSpec, report: DataReport
) -> Iterator[PreferenceRecord]:
    """Yields records of the dataset; prompt-only rows become records without responses."""
    source = open_source(name, split, config)
    head = [_renamed(row, spec).fields for row in itertools.islice(source, LOOKED_AT)]
    # Scored completions, one per row, are read as prompt-only rows.
    names = {recognise(fields, FORMATS) for fields in head}
    pairs = spec.format != AUTO or any(name is not None and FORMATS[name].join is None for name in names)
    if pairs or not any({"instruction", *PROMPTS} & fields.keys() for fields in head):
        # Rows that are neither pairs nor prompts end in an error that names their columns.
        yield from iter_records(source, spec, "drop" if pairs else "error", report)
        return
    for row in source:
        try:
            if row.error:
                raise RowError(row.error)
            row = renamed(without(row, spec.ignore_columns), spec.columns)
            (prompt,) = with_system(row, prompt_of(row))
            record = PreferenceRecord(prompt, "", "", row.source, row.row, **chat_options(row, prompt))
        except RowError as error:
            raise UserError(f"{row.location}: {error}") from error
        if spec.side is None or spec.side.holds(prompt):
            yield record


def _renamed(row: SourceRow, spec: RowSpec) -> SourceRow:
    row = without(row, spec.ignore_columns)
    try:
        return renamed(row, spec.columns)
    except RowError:
        return row
