"""``tdpo weights``: computes token weights from two models and writes tokenised pairs that carry them, as Parquet."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from tdpo.commands.common import console, load_scoring_models, quieten, read_dataset
from tdpo.commands.options import parse
from tdpo.config import EvalDataConfig, LayoutOptions, ModelConfig, PairOptions
from tdpo.config.checks import check_values, option
from tdpo.data.options import check_format, make_tokeniser, open_training
from tdpo.data.table import SIDES
from tdpo.errors import UserError
from tdpo.evaluate.weights import guidance_weights, importance_weights, response_logps
from tdpo.files import atomic_write, check_writable
from tdpo.models.fingerprint import weights_hash
from tdpo.models.load import load_tokenizer
from tdpo.score import packer
from tdpo.types import WEIGHTS, TokenisedPair

PAIRS_PER_FILE = 1000
FINGERPRINT = b"tdpo.weights"
"""Key of the Parquet files' metadata that says what they were made from."""


@dataclass
class WeightOptions(PairOptions, LayoutOptions):
    """Options of the weights and the output folder."""

    output_dir: str = option("", "Folder for the tokenised pairs with their weights; --dataset_name of tdpo train.")
    positive_model: str | None = option(None, "Model trained towards chosen responses (TIS-DPO).")
    negative_model: str | None = option(None, "Model trained towards rejected responses (TIS-DPO).")
    weights_clamp: float = option(1.5, "Log-ratios of the two models beyond this, in nats, are equal (TIS-DPO).")
    weights_low: float = option(0.7, "Weight of the token ranked lowest in a response (TIS-DPO).")
    weights_high: float = option(1.3, "Weight of the token ranked highest in a response (TIS-DPO).")
    guide_model: str | None = option(None, "Model that guides, such as a DPO policy (TGDPO).")
    weights_strength: float = option(0.5, "a in the weights 1 + a b log(guide / reference) (TGDPO).")
    weights_beta: float = option(0.1, "b in the weights 1 + a b log(guide / reference): beta of the training (TGDPO).")
    per_device_eval_batch_size: int = option(8, "Pairs run at a time.")
    logits_budget: int | None = option(None, "Bytes for logits at a time.")

    def __post_init__(self) -> None:
        check_values(self, per_device_eval_batch_size=1, logits_budget=1, weights_clamp=0, weights_strength=0)
        check_format(self)
        self.lengths()
        if not 0 <= self.weights_low <= self.weights_high or not self.weights_high:
            raise UserError(
                f"--weights_low {self.weights_low:g} --weights_high {self.weights_high:g}: expected 0 <= low <= high, "
                "and high above 0"
            )
        if not self.output_dir:
            raise UserError("--output_dir is missing: the folder for the pairs with their weights")
        both = bool(self.positive_model) + bool(self.negative_model)
        if both == 1 or bool(both) == bool(self.guide_model):
            raise UserError("give either --positive_model and --negative_model (TIS-DPO) or --guide_model (TGDPO)")

    def models(self, reference: str) -> tuple[str, str]:
        """Returns the models of the log-ratio: numerator and denominator."""
        return (self.guide_model, reference) if self.guide_model else (self.positive_model, self.negative_model)  # type: ignore[return-value]

    def weigh(self) -> partial[Tensor]:
        """Returns the function from log-ratios of a response to its weights."""
        if self.guide_model:
            return partial(guidance_weights, strength=self.weights_strength, beta=self.weights_beta)
        return partial(importance_weights, clamp=self.weights_clamp, low=self.weights_low, high=self.weights_high)


def run(argv: Sequence[str]) -> None:
    """Runs the command; run again after an interruption, it computes the files that are missing."""
    model_config, data, options = parse("weights", (ModelConfig, EvalDataConfig, WeightOptions), argv)
    quieten()
    if data.eval_dataset_name:
        raise UserError("--eval_dataset_name: weights are of one dataset; run the command once for each")
    folder = Path(options.output_dir).expanduser()
    check_writable(folder)
    tokenizer = load_tokenizer(model_config)
    spec = options.row_spec()
    dataset = read_dataset(open_training(data, spec), options, make_tokeniser(options, tokenizer))
    if taken := {"chosen_weights", "rejected_weights"} & set(dataset.weights):
        raise UserError(f"{dataset.report.source} has {min(taken)!r} already; leave it out with --ignore_columns")
    names = options.models(model_config.model_name_or_path)
    models = load_scoring_models(model_config, names, dataset, dataset.report.source, tokenizer)
    pack, weigh = packer(options.layout, models), options.weigh()
    kept = [(pair.key, pair.chosen_kl_weights, pair.rejected_kl_weights) for pair in dataset]
    about = {"models": [weights_hash(model) for model in models], "weigh": str(weigh.keywords), "pairs": kept}
    fingerprint = hashlib.sha256(json.dumps(about).encode()).hexdigest().encode()
    starts = range(0, len(dataset), PAIRS_PER_FILE)
    paths = [folder / f"train-{number:05d}-of-{len(starts):05d}.parquet" for number in range(len(starts))]
    for path in sorted(folder.glob("*.parquet")):
        if path not in paths or (pq.read_schema(path).metadata or {}).get(FINGERPRINT) != fingerprint:
            raise UserError(f"{path} is of other models, options or pairs; remove it or give another --output_dir")
    missing = [(path, start) for path, start in zip(paths, starts, strict=True) if not path.exists()]
    for path, start in missing:
        pairs = [dataset[index] for index in range(start, min(start + PAIRS_PER_FILE, len(dataset)))]
        passes = (
            response_logps(model, pairs, pack, options.per_device_eval_batch_size, options.logits_budget)
            for model in models
        )
        weighted = []
        for pair, numerators, denominators in zip(pairs, *passes, strict=True):
            chosen, rejected = (a - b for a, b in zip(numerators, denominators, strict=True))
            weights = weigh(chosen).tolist(), weigh(rejected, rejected=True).tolist()
            if not all(map(any, weights)):
                raise UserError(
                    f"{dataset.report.source}, row {pair.row}: every weight of a response is 0; lower "
                    "--weights_strength or --weights_beta, or raise --weights_low"
                )
            weighted.append(replace(pair, chosen_weights=weights[0], rejected_weights=weights[1]))
        atomic_write(path, _parquet(weighted, fingerprint))
    console().print(
        f"{len(dataset)} pairs with weights in {folder}: {len(missing)} of {len(paths)} files computed now; train with "
        f"--dataset_name {folder}",
        soft_wrap=True,
    )


def _parquet(pairs: Sequence[TokenisedPair], fingerprint: bytes) -> bytes:
    table = pa.table({name: [getattr(pair, name) for pair in pairs] for name in (*SIDES, *WEIGHTS)})
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({FINGERPRINT: fingerprint}), buffer)
    return buffer.getvalue()
