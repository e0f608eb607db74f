"""``tdpo eval``: computes the metrics of training for a saved policy and reference on held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tdpo.commands.common import (
    console,
    load_scoring_models,
    metric_table,
    quieten,
    read_dataset,
    saved_objective,
    write_json,
)
from tdpo.commands.options import parse
from tdpo.config import ModelConfig, ObjectiveOptions, PairOptions, ScoringOptions
from tdpo.config.checks import check_defaults, check_values, documented
from tdpo.config.data import DATASET_HELP, HeldOutOptions
from tdpo.data.options import check_format, make_tokeniser
from tdpo.data.sources import open_source
from tdpo.data.tokenise import Tokeniser
from tdpo.errors import UserError
from tdpo.evaluate.divergence import response_stats
from tdpo.evaluate.estimates import Estimate
from tdpo.evaluate.measure import Evaluator, MeasureOptions
from tdpo.evaluate.preference import evaluate_pairs
from tdpo.evaluate.prompts import encode_prompts, read_prompts
from tdpo.evaluate.rewards import RewardOptions, check_reward, load_reward
from tdpo.files import check_outputs
from tdpo.models.load import load_tokenizer
from tdpo.report.samples import sample_table


@documented
@dataclass
class EvalOptions(ObjectiveOptions, PairOptions, ScoringOptions, HeldOutOptions):
    """Options of the evaluation and its output.

    Attributes:
        ref_model_name_or_path: Reference model: a hub name or a folder; needed unless the objective has no reference.
        objective: Objective that defines loss and rewards; default: the one that the policy was trained with.
        per_device_eval_batch_size: Pairs per batch.
        generate: Also sample responses from both models, and measure reward, KL, entropy and diversity.
        num_prompts: Number of prompts to sample from with --generate, from the beginning of the dataset.
        json: File to write the metrics to, as one flat object.
    """

    ref_model_name_or_path: str | None = None
    objective: str | None = None
    dataset_name: str = field(metadata={"help": DATASET_HELP}, kw_only=True)
    per_device_eval_batch_size: int = 8
    generate: bool = False
    num_prompts: int = 100
    json: str | None = None

    def __post_init__(self) -> None:
        check_values(self, per_device_eval_batch_size=1, logits_budget=1, num_prompts=1)
        check_format(self)


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    model_config, options, *sampling = parse("eval", (ModelConfig, EvalOptions, MeasureOptions, RewardOptions), argv)
    quieten()
    if not options.generate:
        check_defaults("generate", *sampling)
    sampling[1].check_for_samples()
    objective = saved_objective(model_config, options)
    if not options.ref_model_name_or_path and (objective.uses_reference or options.generate):
        what = objective.spelling() if objective.uses_reference else "--generate"
        raise UserError(f"--ref_model_name_or_path is missing: {what} compares with a reference")
    check_outputs(options.json)
    tokenizer = load_tokenizer(model_config)
    tokeniser = make_tokeniser(options, tokenizer)
    where = options.dataset_name, options.dataset_test_split, options.dataset_config, options.held_out_spec()
    dataset = read_dataset(open_source(*where), options, tokeniser)
    names = filter(None, (model_config.model_name_or_path, options.ref_model_name_or_path))
    policy, *others = load_scoring_models(model_config, names, dataset, dataset.report.source, tokenizer)
    reference = others[0] if others else None
    how = options.per_device_eval_batch_size, options.layout, options.backend, options.logits_budget
    used = reference if objective.uses_reference else None
    metrics = evaluate_pairs(policy, used, dataset, objective, *how, True, options.token_weights)
    console().print(metric_table(metrics, f"{objective}, {len(dataset)} pairs"))
    if options.generate:
        metrics |= _measure(policy, reference, dataset, tokeniser, options, *sampling)
    if options.json:
        write_json(options.json, metrics)
        console().print(f"written to {options.json}", soft_wrap=True)


def _measure(
    policy: Any, reference: Any, pairs: Any, tokeniser: Tokeniser, options: EvalOptions, measure: MeasureOptions,
    reward_options: RewardOptions,
) -> dict[str, float]:  # fmt: skip
    """Measures samples of both models, and the responses of the dataset; prints tables and returns flat metrics."""
    reward = load_reward(reward_options, tokeniser.tokenizer) if reward_options.reward else None
    where = options.dataset_name, options.dataset_test_split, options.dataset_config, options.held_out_spec()
    asked = read_prompts(*where, tokeniser, options.num_prompts)
    lengths = measure.max_new_tokens, options.lengths().max_prompt_length, options.dataset_name
    prompts = encode_prompts(tokeniser, asked, [policy, reference], *lengths)
    if reward:
        check_reward(reward, [{"prompt": prompt.content, "response": " a"} for prompt in prompts[:2]])
    evaluator = Evaluator(reference, tokeniser.tokenizer, prompts, reward, measure)
    samples = evaluator.reference_samples
    found = {"policy": evaluator.measure(policy), "reference": evaluator.measure(reference, samples)}
    console().print(sample_table(found, f"samples: {len(prompts)} prompts, {measure.num_samples} each"))
    metrics = {f"samples/{side}/{key}": value for side, m in found.items() for key, value in m.columns().items()}
    for side in ("chosen", "rejected"):
        responses = [getattr(pair, f"{side}_ids") for pair in pairs]
        stats = response_stats(policy, reference, [pair.prompt_ids for pair in pairs], responses, measure.batch_size)
        for name in ("kl_policy_reference", "kl_reference_policy"):
            columns = Estimate.of(getattr(stats, name)).columns(f"dataset/{side}/{name}")
            metrics |= columns
    return metrics
