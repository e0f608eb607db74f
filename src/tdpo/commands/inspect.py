"""``tdpo inspect``: shows preference pairs token by token."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from tdpo.commands.common import console, quieten, read_dataset, saved_objective, write_text
from tdpo.commands.options import parse
from tdpo.config import ModelConfig, ObjectiveOptions, PairOptions, SplitOptions
from tdpo.config.checks import check_values, documented, option
from tdpo.config.data import DATASET_HELP
from tdpo.data.dataset import check_fits
from tdpo.data.formats import DataReport
from tdpo.data.options import check_format, make_tokeniser
from tdpo.data.sources import open_source
from tdpo.data.tokenise import Tokeniser
from tdpo.errors import UserError
from tdpo.files import check_writable
from tdpo.models.load import load_model, load_tokenizer
from tdpo.models.policy import head_of, position_limit
from tdpo.report.inspect import LARGEST_PAGE, inspect
from tdpo.types import PreferenceRecord, TokenisedPair

logger = logging.getLogger("tdpo")


@documented
@dataclass
class InspectOptions(ObjectiveOptions, PairOptions, SplitOptions):
    """Options of the pairs and the output.

    Attributes:
        ref_model_name_or_path: Reference model: a hub name or a folder.
        objective: Objective that defines loss and rewards; default: the one that the policy was trained with.
        prompt: Prompt of a pair given on the command line instead of a dataset, as plain text.
        chosen: Its preferred response.
        rejected: Its other response.
        dataset_config: Configuration of a hub dataset.
        dataset_test_split: Split to take pairs from: of a hub dataset, or the beginning of file names.
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
    dataset_config: str | None = None
    dataset_test_split: str = "test"
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
        if self.output:
            check_writable(Path(self.output).absolute().parent)


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    model_config, options = parse("inspect", (ModelConfig, InspectOptions), argv)
    quieten()
    objective = saved_objective(model_config, options)
    tokenizer = load_tokenizer(model_config)
    tokeniser = make_tokeniser(options, tokenizer)
    pairs, source = _typed(options, tokeniser) if options.prompt is not None else _from_dataset(options, tokeniser)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = model_config.model_name_or_path, str(options.ref_model_name_or_path)
    policy, reference = (load_model(model_config, name).to(device).eval() for name in names)
    check_fits(pairs, head_of(policy).vocab_size, position_limit(policy, reference), source, len(tokenizer))
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
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in inspection.lines())
        write_text(options.output, "".join(lines))
    console().print(f"{len(pairs):,} pairs written to {options.output}", soft_wrap=True)


def _typed(options: InspectOptions, tokeniser: Tokeniser) -> tuple[list[TokenisedPair], str]:
    record = PreferenceRecord(str(options.prompt), str(options.chosen), str(options.rejected), "--prompt", 1)
    report = DataReport("--prompt")
    pairs = tokeniser.pairs([record], report)
    if not pairs:
        raise UserError("--chosen and --rejected are the same tokens; give two different responses")
    return pairs, "a pair from the command line"


def _from_dataset(options: InspectOptions, tokeniser: Tokeniser) -> tuple[Sequence[TokenisedPair], str]:
    spec = replace(options.row_spec(), side=options.side(test=True))
    source = open_source(str(options.dataset_name), options.dataset_test_split, options.dataset_config, spec)
    dataset = read_dataset(source, options, tokeniser)
    return [dataset[i] for i in range(min(options.max_pairs, len(dataset)))], dataset.report.source
