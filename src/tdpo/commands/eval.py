"""``tdpo eval``: computes the metrics of training for a saved policy and reference on held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from tdpo.cli import COMMANDS
from tdpo.commands.common import check_writable, console, metric_table, quieten, read_dataset, write_json
from tdpo.commands.options import parse
from tdpo.config import (
    DATASET_HELP,
    ModelConfig,
    ObjectiveOptions,
    PairOptions,
    ScoringOptions,
    SplitOptions,
    check_at_least,
    check_choices,
    option,
)
from tdpo.data.dataset import check_fits
from tdpo.data.options import check_format, make_tokeniser
from tdpo.data.sources import open_source
from tdpo.evaluate.preference import evaluate_pairs
from tdpo.models.load import load_model, load_tokenizer
from tdpo.models.policy import head_of, position_limit


@dataclass
class EvalOptions(ObjectiveOptions, PairOptions, ScoringOptions, SplitOptions):
    """What is evaluated and where the figures go."""

    ref_model_name_or_path: str = field(metadata={"help": "Reference model: a hub name or a folder."}, kw_only=True)
    dataset_name: str = field(metadata={"help": DATASET_HELP}, kw_only=True)
    dataset_config: str | None = option(None, "Configuration of a hub dataset.")
    dataset_test_split: str = option("test", "Split to evaluate on: of a hub dataset, or the beginning of file names.")
    per_device_eval_batch_size: int = option(8, "Pairs scored at a time.")
    json: str | None = option(None, "File to write the metrics to, as one flat object.")

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, 1, "per_device_eval_batch_size", "logits_budget")
        check_format(self)


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    model_config, options = parse("eval", COMMANDS["eval"], (ModelConfig, EvalOptions), argv)
    quieten()
    objective = options.build_objective()
    spec = replace(options.row_spec(), side=options.side(test=True))
    if options.json:
        check_writable(Path(options.json).absolute().parent)
    tokenizer = load_tokenizer(model_config)
    source = open_source(options.dataset_name, options.dataset_test_split, options.dataset_config, spec)
    dataset = read_dataset(source, options, make_tokeniser(options, tokenizer))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = load_model(model_config).to(device).eval()
    reference = load_model(model_config, options.ref_model_name_or_path).to(device).eval()
    limit = position_limit(policy, reference)
    check_fits(dataset, head_of(policy).vocab_size, limit, dataset.report.source, len(tokenizer))
    metrics = evaluate_pairs(
        policy,
        reference,
        dataset,
        objective,
        batch_size=options.per_device_eval_batch_size,
        layout=options.layout,
        backend=options.backend,
        logits_budget=options.logits_budget,
        progress=True,
    )
    console().print(metric_table(metrics, f"{objective}, {len(dataset)} pairs"))
    if options.json:
        write_json(options.json, metrics)
        console().print(f"written to {options.json}", soft_wrap=True)
