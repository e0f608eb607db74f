"""``tdpo inspect``: shows preference pairs token by token."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tdpo.commands.common import console, load_scoring_models, quieten, read_dataset, saved_objective, write_text
from tdpo.commands.options import parse
from tdpo.config import ModelConfig, ObjectiveOptions, PairOptions
from tdpo.config.checks import check_values, documented, option
from tdpo.config.data import DATASET_HELP, HeldOutOptions
from tdpo.data.formats import DataReport
from tdpo.data.options import check_format, make_tokeniser
from tdpo.data.sources import open_source
from tdpo.data.tokenise import Tokeniser
from tdpo.errors import UserError
from tdpo.files import check_outputs, json_lines
from tdpo.models.load import load_tokenizer
from tdpo.report.inspect import LARGEST_PAGE, inspect
from tdpo.types import PreferenceRecord, TokenisedPair

logger = logging.getLogger("tdpo")


@documented
@dataclass
class InspectOptions(ObjectiveOptions, PairOptions, HeldOutOptions):
    """Options of the pairs and the output.

    Attributes:
        ref_model_name_or_path: Reference model: a hub name or a folder.
        objective: Objective that defines loss and rewards; default: the one that the policy was trained with.
        prompt: Prompt of a pair given on the command line instead of a dataset, as plain text.
        chosen: Its preferred response.
        rejected: Its other response.
        max_pairs: Number of pairs from the beginning of the dataset.
        per_device_eval_batch_size: Pairs per batch.
        output: File to write: a page to open in a browser, or JSON lines.
        format: html is a self-contained page, jsonl has one object per pair, terminal prints the coloured texts.
    """

    ref_model_name_or_path: str | None = None
    objective: str | None = None
    dataset_name: str | None = option(None, f"{DATASET_HELP} (this, or --prompt, --chosen and --rejected)")
    prompt: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    max_pairs: int = 200
    per_device_eval_batch_size: int = 8
    output: str | None = None
    format: Literal["html", "jsonl", "terminal"] = "html"

    def __post_init__(self) -> None:
        check_values(self, max_pairs=1, per_device_eval_batch_size=1)
        check_format(self)
        typed = [name for name in ("prompt", "chosen", "rejected") if getattr(self, name) is not None]
        if bool(typed) == bool(self.dataset_name):
            raise UserError("give either --dataset_name, or --prompt, --chosen and --rejected")
        if 0 < len(typed) < 3:
            raise UserError("a pair needs --prompt, --chosen and --rejected")
        if not self.ref_model_name_or_path:
            raise UserError("--ref_model_name_or_path is missing: log-ratios and KL compare with a reference")
        if (self.output is None) != (self.format == "terminal"):
            raise UserError(
                "--format terminal writes no file; leave out --output"
                if self.output
                else f"--output is missing: the file for --format {self.format}"
            )
        check_outputs(self.output)


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    model_config, options = parse("inspect", (ModelConfig, InspectOptions), argv)
    quieten()
    objective = saved_objective(model_config, options)
    tokenizer = load_tokenizer(model_config)
    tokeniser = make_tokeniser(options, tokenizer)
    pairs, source = _typed(options, tokeniser) if options.prompt is not None else _from_dataset(options, tokeniser)
    names = model_config.model_name_or_path, str(options.ref_model_name_or_path)
    policy, reference = load_scoring_models(model_config, names, pairs, source, tokenizer)
    inspection = inspect(
        policy, reference, pairs, objective, tokenizer, options.per_device_eval_batch_size, options.token_weights,
        progress=True, policy_name=names[0], reference_name=names[1], dataset_name=source,
    )  # fmt: skip
    if options.format == "terminal":
        console().print(inspection)
        return
    if options.format == "html":
        page = inspection.html()
        if len(page) > LARGEST_PAGE:
            logger.warning("the page has %d MB and opens slowly; a lower --max_pairs helps", len(page) / 1e6)
        write_text(options.output, page)
    else:
        write_text(options.output, json_lines(inspection.lines()))
    console().print(f"{len(pairs):,} pairs written to {options.output}", soft_wrap=True)


def _typed(options: InspectOptions, tokeniser: Tokeniser) -> tuple[list[TokenisedPair], str]:
    record = PreferenceRecord(str(options.prompt), str(options.chosen), str(options.rejected), "--prompt", 1)
    report = DataReport("--prompt")
    pairs = tokeniser.pairs([record], report)
    if not pairs:
        raise UserError("--chosen and --rejected are the same tokens; give two different responses")
    return pairs, "a pair from the command line"


def _from_dataset(options: InspectOptions, tokeniser: Tokeniser) -> tuple[Sequence[TokenisedPair], str]:
    where = str(options.dataset_name), options.dataset_test_split, options.dataset_config
    source = open_source(*where, options.held_out_spec())
    dataset = read_dataset(source, options, tokeniser)
    return [dataset[i] for i in range(min(options.max_pairs, len(dataset)))], dataset.report.source
