"""``tdpo generate``: samples from a policy and its reference side by side."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text as Styled

from tdpo.commands.common import console, quieten, write_text
from tdpo.commands.options import parse
from tdpo.config import FormatOptions, ModelConfig, ReferenceConfig, SplitOptions
from tdpo.config.checks import check_values, documented, option
from tdpo.config.data import DATASET_HELP, UNLIMITED
from tdpo.config.row_spec import RowSpec
from tdpo.data.dataset import check_fits
from tdpo.data.formats import AUTO, FORMATS, DataReport, RowError, chat_options, iter_records, renamed
from tdpo.data.formats.convert import LOOKED_AT
from tdpo.data.formats.prompts import PROMPTS, prompt_of, with_system
from tdpo.data.formats.registry import recognise
from tdpo.data.sources import SourceRow, open_source
from tdpo.data.tokenise import Tokeniser, Turns
from tdpo.errors import UserError
from tdpo.evaluate.generate import Sampling, sample_ids
from tdpo.files import check_writable
from tdpo.models.load import load_model, load_tokenizer
from tdpo.models.policy import head_of, position_limit
from tdpo.types import PreferenceRecord, TokenisedPair

logger = logging.getLogger("tdpo")


@documented
@dataclass
class GenerateOptions(Sampling, FormatOptions, SplitOptions):
    """What is asked of the models, how they answer, and where it goes.

    Attributes:
        prompt: One or more prompts, as plain text.
        dataset_config: Configuration of a hub dataset.
        dataset_test_split: Split to take prompts from, as in the other commands.
        num_prompts: Prompts taken from the dataset, from its beginning.
        max_prompt_length: Longer prompts keep their last N tokens. Default: all that the model's positions allow.
        json: File to write to, one object a line with prompt, policy and reference.
    """

    prompt: list[str] = option(list)
    dataset_name: str | None = option(
        None, f"{DATASET_HELP} Its prompts are taken as training has them; rows may lack responses."
    )
    dataset_config: str | None = None
    dataset_test_split: str = "test"
    num_prompts: int = 8
    max_prompt_length: int | None = None
    json: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_values(self, num_prompts=1, max_prompt_length=1)
        if bool(self.prompt) == bool(self.dataset_name):
            raise UserError("give either --prompt or --dataset_name")


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    model_config, ref, options = parse("generate", (ModelConfig, ReferenceConfig, GenerateOptions), argv)
    quieten()
    if options.json:
        check_writable(Path(options.json).absolute().parent)
    tokenizer = load_tokenizer(model_config)
    tokeniser = Tokeniser(tokenizer, rendering=options.rendering())
    given = [PreferenceRecord(text, "", "", "--prompt", number) for number, text in enumerate(options.prompt, 1)]
    asked = [Turns(record, record.prompt) for record in given] or _prompts_of_dataset(options, tokeniser)
    names = {"policy": model_config.model_name_or_path, "reference": ref.ref_model_name_or_path}
    answers: dict[str, list[list[str]]] = {}
    for side, name in names.items():
        if name:
            model = load_model(model_config, name).to("cuda" if torch.cuda.is_available() else "cpu")
            ids = _prompt_ids(tokeniser, asked, options, model)
            sampled = sample_ids(model, ids, options, _end_tokens(model, tokenizer))
            answers[side] = [[tokenizer.decode(s, skip_special_tokens=True) for s in samples] for samples in sampled]
    lines: list[dict[str, Any]] = [
        {"prompt": turns.prompt, **{side: answers[side][i] for side in answers}} for i, turns in enumerate(asked)
    ]
    for line in lines:
        _show(**line)
    if options.json:
        write_text(options.json, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        console().print(f"written to {options.json}", soft_wrap=True)


def _prompts_of_dataset(options: GenerateOptions, tokeniser: Tokeniser) -> list[Turns]:
    """Returns the first prompts of the dataset, encoded as in training where they come from preference rows.

    Raises:
        UserError: if there are none.
    """
    report = DataReport(str(options.dataset_name))
    records = _records(options, report)
    if options.special_tokens is None:
        records = tokeniser.special.refuse_rendered(records)

    def question(record: PreferenceRecord) -> tuple[Any, ...]:
        # Several pairs of one prompt ask it once; rows without responses are asked one by one.
        return record.prompt, record.tools, record.chat_template_kwargs, None if record.chosen else record.row

    first = (next(group) for _, group in itertools.groupby(records, question))
    asked = [
        Turns(record, record.prompt, [response for response in (record.chosen, record.rejected) if response])
        for record in itertools.islice(first, options.num_prompts)
    ]
    if report.dropped:
        logger.warning("; ".join(report.lines()))
    if not asked:
        raise UserError(f"{options.dataset_name}: no prompt in it. " + "; ".join(report.lines()))
    return asked


def _records(options: GenerateOptions, report: DataReport) -> Iterator[PreferenceRecord]:
    """Yields records of the dataset; rows that hold prompts alone give records without responses."""
    spec = replace(options.row_spec(), side=options.side(test=True))
    source = open_source(str(options.dataset_name), options.dataset_test_split, options.dataset_config)
    head = [_renamed(row, spec).fields for row in itertools.islice(source, LOOKED_AT)]
    # Scored completions, one a row, are asked row by row.
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
            row = renamed(row, spec.columns)
            (prompt,) = with_system(row, prompt_of(row))
            record = PreferenceRecord(prompt, "", "", row.source, row.row, **chat_options(row, prompt))
        except RowError as error:
            raise UserError(f"{row.location}: {error}") from error
        if spec.side is None or spec.side.holds(prompt):
            yield record


def _renamed(row: SourceRow, spec: RowSpec) -> SourceRow:
    try:
        return renamed(row, spec.columns)
    except RowError:
        return row


def _prompt_ids(tokeniser: Tokeniser, asked: list[Turns], options: GenerateOptions, model: Any) -> list[list[int]]:
    """Returns the ids of the prompts, cut to the room that the model's positions leave.

    Raises:
        UserError: if they leave none, or the model has no row for a token.
    """
    positions = position_limit(model)
    room = min(options.max_prompt_length or UNLIMITED, (positions or UNLIMITED) - options.max_new_tokens)
    if room < 1:
        raise UserError(
            f"--max_new_tokens {options.max_new_tokens} and --max_prompt_length {options.max_prompt_length} leave no "
            f"room for a prompt in the {positions} positions of the model"
        )
    whole = tokeniser.prompts(asked)
    ids = [tokeniser.cut_prompt(ids, room) for ids in whole]
    cut = sum(len(kept) < len(found) for kept, found in zip(ids, whole, strict=True))
    if cut:
        logger.warning("%d of %d prompts are cut to their last %d tokens", cut, len(ids), room)
    rows = [TokenisedPair(p, p[:1], p[:1], turns.record.row) for turns, p in zip(asked, ids, strict=True)]
    name = options.dataset_name or "--prompt"
    check_fits(rows, head_of(model).vocab_size, None, name, len(tokeniser.tokenizer))
    return ids


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Returns every token that ends a response: the tokenizer's, and those the checkpoint names (end of turn)."""
    named = model.generation_config.eos_token_id
    tokens = [tokenizer.eos_token_id, *(named if isinstance(named, list | tuple) else [named])]
    return list(dict.fromkeys(token for token in tokens if token is not None))


def _show(prompt: Any, **answers: list[str]) -> None:
    """Prints a table with the samples of each model."""
    text = prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
    title = Styled(text.strip()[-400:], style="bold")
    table = Table(title=title, title_justify="left", show_lines=True, expand=True)
    for side in answers:
        table.add_column(side, ratio=1)
    for samples in zip(*answers.values(), strict=True):
        table.add_row(*(Styled(sample.strip()) for sample in samples))
    console().print(table)
