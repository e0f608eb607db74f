"""``tdpo generate``: samples from a policy and its reference side by side."""

from __future__ import annotations

import itertools
import json
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
from tdpo.data.formats import AUTO, DataReport, RowError, iter_records, renamed, text_of
from tdpo.data.sources import open_source
from tdpo.data.tokenise import Tokeniser
from tdpo.errors import UserError
from tdpo.evaluate.generate import Sampling, sample_ids
from tdpo.models.load import check_vocabulary, load_model, load_tokenizer
from tdpo.models.policy import position_limit
from tdpo.types import Text


@dataclass
class GenerateOptions(FormatOptions, SplitOptions):
    """What is asked of the models, how they answer, and where it goes."""

    prompt: list[str] = field(default_factory=list, metadata={"help": "One or more prompts, as plain text."})
    dataset_name: str | None = field(
        default=None, metadata={"help": f"{DATASET_HELP} Its prompts are taken; other columns are not looked at."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_test_split: str = field(
        default="test",
        metadata={"help": "Split to take prompts from, as in the other commands."},
    )
    num_prompts: int = field(default=8, metadata={"help": "Prompts taken from the dataset, from its beginning."})
    num_samples: int = field(default=1, metadata={"help": "Responses per prompt and model."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest response in tokens."})
    max_prompt_length: int = field(default=256, metadata={"help": "Longer prompts keep their last so many tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits; 0 takes the likeliest token."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling; 1 is off."})
    top_k: int = field(default=0, metadata={"help": "Samples among the k likeliest tokens; 0 is off."})
    batch_size: int = field(default=32, metadata={"help": "Sequences generated at a time."})
    seed: int = field(default=0, metadata={"help": "Seed of the draws, the same for both models."})
    json: str | None = field(
        default=None, metadata={"help": "File to write to, one object a line with prompt, policy and reference."}
    )

    def sampling(self) -> Sampling:
        """How responses are drawn."""
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
    prompts = _prompts(options)
    tokenizer = load_tokenizer(model_config)
    names = {"policy": model_config.model_name_or_path}
    if ref.ref_model_name_or_path:
        names["reference"] = ref.ref_model_name_or_path
    answers = {}
    for side, name in names.items():
        model = load_model(model_config, name).to("cuda" if torch.cuda.is_available() else "cpu")
        check_vocabulary(model, tokenizer)
        ids = _prompt_ids(Tokeniser(tokenizer), prompts, options, model)
        sampled = sample_ids(model, ids, sampling, _ends(model, tokenizer), tokenizer.pad_token_id)
        answers[side] = [[tokenizer.decode(s, skip_special_tokens=True) for s in samples] for samples in sampled]
    _show(prompts, answers)
    if options.json:
        lines = [{"prompt": prompt, **{side: answers[side][i] for side in answers}} for i, prompt in enumerate(prompts)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(options.json, text)
        console().print(f"written to {options.json}", soft_wrap=True)


def _prompts(options: GenerateOptions) -> list[Text]:
    """The prompts asked for.

    Raises:
        UserError: if there are none, or both kinds are given.
    """
    if bool(options.prompt) == bool(options.dataset_name):
        raise UserError("give either --prompt or --dataset_name")
    if options.prompt:
        return list(options.prompt)
    if options.num_prompts < 1:
        raise UserError(f"--num_prompts must be at least 1, got {options.num_prompts}")
    prompts = list(itertools.islice(_dataset_prompts(options), options.num_prompts))
    if not prompts:
        raise UserError(f"{options.dataset_name}: no prompt in it")
    return prompts


def _dataset_prompts(options: GenerateOptions) -> Iterator[Text]:
    """Prompts of the dataset: its column of that name, which needs no responses beside it, or those of its records."""
    reading = replace(options.reading(), side=options.side(test=True))
    source = open_source(str(options.dataset_name), options.dataset_test_split, options.dataset_config)
    first = next(iter(source), None)
    try:
        by_column = first is not None and reading.format == AUTO and "prompt" in renamed(first, reading.columns).fields
    except RowError:
        by_column = False
    if not by_column:
        records = iter_records(source, reading, "drop", DataReport(source.name))
        yield from (prompt for prompt, _ in itertools.groupby(record.prompt for record in records))
        return
    for row in source:
        try:
            if row.error:
                raise RowError(row.error)
            prompt = text_of(renamed(row, reading.columns), "prompt")
        except RowError as error:
            raise UserError(f"{row.place}: {error}") from error
        if reading.side is None or reading.side.holds(prompt):
            yield prompt


def _prompt_ids(tokeniser: Tokeniser, prompts: list[Text], options: GenerateOptions, model: Any) -> list[list[int]]:
    room = min(options.max_prompt_length, (position_limit(model) or 2**31) - options.max_new_tokens)
    if room < 1:
        raise UserError(
            f"--max_new_tokens {options.max_new_tokens} and --max_prompt_length {options.max_prompt_length} leave no "
            f"room for a prompt in the {position_limit(model)} positions of the model"
        )
    return [tokeniser.cut_prompt(ids, room) for ids in tokeniser.prompts(prompts)]


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a response: the tokenizer's, and those the checkpoint names (end of turn)."""
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
