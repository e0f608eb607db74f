"""``tdpo generate``: samples from a policy and its reference side by side."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text as Styled

from tdpo.cli import COMMANDS
from tdpo.commands.common import check_writable, console, quieten, write_text
from tdpo.commands.options import parse
from tdpo.config import DATASET_HELP, FormatOptions, ModelConfig, ReferenceConfig, SplitOptions
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
from tdpo.models.load import load_model, load_tokenizer
from tdpo.models.policy import head_of, position_limit
from tdpo.types import PreferenceRecord, Text, TokenisedPair

logger = logging.getLogger("tdpo")


@dataclass
class GenerateOptions(FormatOptions, SplitOptions):
    """What is asked of the models, how they answer, and where it goes."""

    prompt: list[str] = field(default_factory=list, metadata={"help": "One or more prompts, as plain text."})
    dataset_name: str | None = field(
        default=None,
        metadata={"help": f"{DATASET_HELP} Its prompts are taken as training has them; rows may lack responses."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_test_split: str = field(
        default="test",
        metadata={"help": "Split to take prompts from, as in the other commands."},
    )
    num_prompts: int = field(default=8, metadata={"help": "Prompts taken from the dataset, from its beginning."})
    num_samples: int = field(default=1, metadata={"help": "Responses per prompt and model."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest response in tokens."})
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Longer prompts keep their last N tokens. Default: all that the model's positions allow."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits; 0 takes the likeliest token."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling; 1 is off."})
    top_k: int = field(default=0, metadata={"help": "Samples among the k likeliest tokens; 0 is off."})
    batch_size: int = field(default=32, metadata={"help": "Sequences generated at a time."})
    seed: int = field(default=0, metadata={"help": "Seed of the draws, the same for both models."})
    json: str | None = field(
        default=None, metadata={"help": "File to write to, one object a line with prompt, policy and reference."}
    )

    def sampling(self) -> Sampling:
        """Returns how responses are drawn under these options."""
        return Sampling(
            self.max_new_tokens, self.temperature, self.top_p, self.top_k, self.num_samples, self.batch_size, self.seed
        )


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    model_config, ref, options = parse(
        "generate", COMMANDS["generate"], (ModelConfig, ReferenceConfig, GenerateOptions), argv
    )
    quieten()
    sampling = options.sampling()
    if options.json:
        check_writable(Path(options.json).absolute().parent)
    tokenizer = load_tokenizer(model_config)
    tokeniser = Tokeniser(tokenizer, rendering=options.rendering())
    asked = _asked(options, tokeniser)
    prompts = [turns.prompt for turns in asked]
    names = {"policy": model_config.model_name_or_path}
    if ref.ref_model_name_or_path:
        names["reference"] = ref.ref_model_name_or_path
    answers = {}
    for side, name in names.items():
        model = load_model(model_config, name).to("cuda" if torch.cuda.is_available() else "cpu")
        ids = _prompt_ids(tokeniser, asked, options, model)
        sampled = sample_ids(model, ids, sampling, _ends(model, tokenizer), _padding(model, tokenizer))
        answers[side] = [[tokenizer.decode(s, skip_special_tokens=True) for s in samples] for samples in sampled]
    _show(prompts, answers)
    if options.json:
        lines = [{"prompt": prompt, **{side: answers[side][i] for side in answers}} for i, prompt in enumerate(prompts)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(options.json, text)
        console().print(f"written to {options.json}", soft_wrap=True)


def _asked(options: GenerateOptions, tokeniser: Tokeniser) -> list[Turns]:
    """Returns the requested prompts, encoded as in training where they come from preference rows.

    Raises:
        UserError: if there are none, or both kinds are given.
    """
    if bool(options.prompt) == bool(options.dataset_name):
        raise UserError("give either --prompt or --dataset_name")
    if options.prompt:
        return [Turns(PreferenceRecord(p, "", "", "--prompt", number), p) for number, p in enumerate(options.prompt, 1)]
    if options.num_prompts < 1:
        raise UserError(f"--num_prompts must be at least 1, got {options.num_prompts}")
    report = DataReport(str(options.dataset_name))
    records = _records(options, report)
    if options.special_tokens is None:
        records = tokeniser.special.refuse_rendered(records)
    # Several pairs of one prompt ask it once; rows without responses are asked one by one.
    groups = itertools.groupby(records, _question)
    first = (next(group) for _, group in groups)
    asked = [
        Turns(record, record.prompt, [response for response in (record.chosen, record.rejected) if response])
        for record in itertools.islice(first, options.num_prompts)
    ]
    if report.dropped:
        logger.warning("; ".join(report.lines()))
    if not asked:
        raise UserError(f"{options.dataset_name}: no prompt in it. " + "; ".join(report.lines()))
    return asked


def _question(record: PreferenceRecord) -> tuple[Any, ...]:
    """Returns the key by which rows ask the same; rows without responses each have their own."""
    return record.prompt, record.tools, record.chat_template_kwargs, None if record.chosen else record.row


def _records(options: GenerateOptions, report: DataReport) -> Iterator[PreferenceRecord]:
    """Yields records of the dataset; rows that hold prompts alone give records without responses."""
    spec = replace(options.row_spec(), side=options.side(test=True))
    source = open_source(str(options.dataset_name), options.dataset_test_split, options.dataset_config)
    head = list(itertools.islice(source, LOOKED_AT))
    if spec.format != AUTO or any(_holds_a_pair(row, spec) for row in head):
        yield from iter_records(source, spec, "drop", report)
        return
    if not any({"instruction", *PROMPTS} & _renamed(row, spec).fields.keys() for row in head):
        yield from iter_records(source, spec, "error", report)  # which raises, naming the columns
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


def _holds_a_pair(row: SourceRow, spec: RowSpec) -> bool:
    """Returns whether the row alone makes records; scored completions, one a row, are asked row by row."""
    name = recognise(_renamed(row, spec).fields, FORMATS)
    return name is not None and FORMATS[name].join is None


def _prompt_ids(tokeniser: Tokeniser, asked: list[Turns], options: GenerateOptions, model: Any) -> list[list[int]]:
    positions = position_limit(model)
    limit = 2**31 if options.max_prompt_length is None else options.max_prompt_length
    room = min(limit, (positions or 2**32) - options.max_new_tokens)
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
    check_fits(
        [TokenisedPair(prompt, prompt[:1], prompt[:1], turns.record.row)
         for turns, prompt in zip(asked, ids, strict=True)],
        head_of(model).vocab_size, None, options.dataset_name or "--prompt", len(tokeniser.tokenizer),
    )  # fmt: skip
    return ids


def _padding(model: Any, tokenizer: Any) -> int | None:
    """Returns the token that fills short prompts; attention never sees it, but the model must have a row for it."""
    padding = tokenizer.pad_token_id
    return padding if padding is not None and padding < head_of(model).vocab_size else None


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Returns every token that ends a response: the tokenizer's, and those the checkpoint names (end of turn)."""
    named = model.generation_config.eos_token_id
    named = [named] if isinstance(named, int) else list(named or [])
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*own, *named]))


def _show(prompts: list[Text], answers: dict[str, list[list[str]]]) -> None:
    out = console()
    for number, prompt in enumerate(prompts):
        text = prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
        table = Table(
            title=Styled(text.strip()[-400:], style="bold"), title_justify="left", show_lines=True, expand=True
        )
        for side in answers:
            table.add_column(side, ratio=1)
        for samples in zip(*(answers[side][number] for side in answers), strict=True):
            table.add_row(*(Styled(sample.strip()) for sample in samples))
        out.print(table)
