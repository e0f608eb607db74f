"""``tdpo generate``: samples responses from a policy and its reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text as Styled

from tdpo.commands.common import console, device, quieten, write_text
from tdpo.commands.options import parse
from tdpo.config import ModelConfig, ReferenceConfig
from tdpo.config.checks import check_values, documented, option
from tdpo.config.data import DATASET_HELP, HeldOutOptions
from tdpo.data.tokenise import Tokeniser, Turns
from tdpo.errors import UserError
from tdpo.evaluate.generate import Sampling, decode_response, end_tokens, sample_ids
from tdpo.evaluate.prompts import encode_prompts, read_prompts
from tdpo.files import check_outputs, json_lines
from tdpo.models.load import load_model, load_tokenizer
from tdpo.types import PreferenceRecord


@documented
@dataclass
class GenerateOptions(Sampling, HeldOutOptions):
    """Options of the prompts, the sampling and the output.

    Attributes:
        prompt: One or more prompts, as plain text.
        num_prompts: Number of prompts to use from the beginning of the dataset.
        max_prompt_length: Longer prompts are cut to their last N tokens. Default: all that the model's positions allow.
        json: JSON lines file to write: one object per prompt, with prompt, policy and reference.
    """

    prompt: list[str] = option(list)
    dataset_name: str | None = option(
        None, f"{DATASET_HELP} Its prompts are encoded as in training; rows may lack responses."
    )
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
    check_outputs(options.json)
    tokenizer = load_tokenizer(model_config)
    tokeniser = Tokeniser(tokenizer, rendering=options.rendering())
    given = [PreferenceRecord(text, "", "", "--prompt", number) for number, text in enumerate(options.prompt, 1)]
    asked = [Turns(record, record.prompt) for record in given] or _prompts_of_dataset(options, tokeniser)
    names = {"policy": model_config.model_name_or_path, "reference": ref.ref_model_name_or_path}
    lengths = options.max_new_tokens, options.max_prompt_length, options.dataset_name or "--prompt"
    answers: dict[str, list[list[str]]] = {}
    for side, name in names.items():
        if name:
            model = load_model(model_config, name).to(device())
            ids = [prompt.ids for prompt in encode_prompts(tokeniser, asked, [model], *lengths)]
            sampled = sample_ids(model, ids, options, end_tokens(model, tokenizer))
            answers[side] = [
                [decode_response(tokenizer, prompt, response) for response in samples]
                for prompt, samples in zip(ids, sampled, strict=True)
            ]
    lines: list[dict[str, Any]] = [
        {"prompt": turns.prompt, **{side: answers[side][i] for side in answers}} for i, turns in enumerate(asked)
    ]
    for line in lines:
        _show(**line)
    if options.json:
        write_text(options.json, json_lines(lines))
        console().print(f"written to {options.json}", soft_wrap=True)


def _prompts_of_dataset(options: GenerateOptions, tokeniser: Tokeniser) -> list[Turns]:
    where = str(options.dataset_name), options.dataset_test_split, options.dataset_config
    return read_prompts(*where, options.held_out_spec(), tokeniser, options.num_prompts)


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
