"""Estimates, diversity and the evaluator: by hand, against scipy, and against every sequence of a small model."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_model, preference_rows, write_jsonl
from scipy import stats as scipy_stats
from test_divergence import every_sequence, sequence_logps, small

from tdpo import UserError
from tdpo.cli import main
from tdpo.evaluate import divergence
from tdpo.evaluate.diversity import compression_ratio, distinct_n, measure_diversity, self_bleu
from tdpo.evaluate.estimates import Estimate, bootstrap_interval
from tdpo.evaluate.generate import decode_response
from tdpo.evaluate.measure import Evaluator, MeasureOptions, Prompt

LETTERS = "abcde"


class Letters:
    """A tokenizer whose tokens are letters; token 0 ends a response."""

    eos_token_id = 0

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(LETTERS[i] for i in ids if i or not skip_special_tokens)


def count_b(rows):
    return [float(row["response"].count("b")) for row in rows]


def evaluator(reward=count_b, **options) -> Evaluator:
    options = {"max_new_tokens": 4, "num_samples": 1000, "batch_size": 1000, "entropy_samples": 0, **options}
    prompts = [Prompt("c d", [2, 3]), Prompt("b", [1])]
    return Evaluator(small(1), Letters(), prompts, reward, MeasureOptions(**options))


def test_estimate_of_units_and_of_several_samples_a_unit():
    found = Estimate.of([[1.0, 3.0], [5.0, 7.0], [0.0, 2.0]])  # 2, 6, 1
    assert (found.mean, found.count) == (3.0, 3)
    assert found.standard_error == pytest.approx(math.sqrt(7 / 3))
    assert (found.low, found.high) == (1.0, 6.0)
    one = Estimate.of([2.0])
    assert (one.mean, one.count) == (2.0, 1)
    assert math.isnan(one.standard_error) and math.isnan(one.low) and math.isnan(one.high)
    assert found.columns("r") == {"r": 3.0, "r_se": found.standard_error, "r_low": 1.0, "r_high": 6.0}
    assert one.columns("r") == {"r": 2.0}


def test_interval_agrees_with_scipys_bootstrap_and_with_the_normal_one():
    values = np.random.default_rng(3).gamma(2.0, size=200)
    found, error = bootstrap_interval(values), values.std(ddof=1) / math.sqrt(200)
    theirs = scipy_stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1)
    assert found == pytest.approx(tuple(theirs.confidence_interval), abs=0.2 * error)
    assert found == pytest.approx(scipy_stats.norm.interval(0.95, values.mean(), error), abs=0.3 * error)
    assert bootstrap_interval(values) == found


def test_distinct_self_bleu_and_compression_by_hand():
    assert distinct_n([[1, 2, 1], [1, 2]], 1) == 2 / 5
    assert distinct_n([[1, 2, 1], [1, 2]], 2) == 2 / 3
    assert math.isnan(distinct_n([[1]], 2))
    # Precisions 4/5, 3/4, 2/3, 1/2 and no brevity penalty, in both directions.
    assert self_bleu(["a b c d e", "a b c d f"]) == pytest.approx(0.2**0.25)
    texts = ["the plot was dull"] * 30
    raw = ("the plot was dull\n" * 30)[:-1].encode()
    assert compression_ratio(texts) == len(raw) / len(zlib.compress(raw, 9)) > 10


def test_diversity_is_of_equally_many_responses_of_one_length():
    first = [[1, 2, 3, 4], [1, 2], [1, 1, 2, 2, 3], [4, 4, 4, 4], [3, 3, 3, 3]]
    found = measure_diversity([first], Letters(), length=3, responses=2)
    assert found.distinct_1.mean == 3 / 6  # 1 2 3 and 1 1 2
    assert found.distinct_2.mean == 3 / 4  # 12 23, 11 12
    assert math.isnan(found.distinct_1.low)  # one set
    assert measure_diversity([first], Letters(), length=3, responses=5) is None
    both = measure_diversity([first, [[1, 1, 1], [1, 1, 1]], [[1]]], Letters(), length=3, responses=2)
    assert both.distinct_1.mean == pytest.approx((1 / 2 + 1 / 6) / 2)
    assert both.distinct_1.count == 2


def test_figures_estimate_what_enumeration_gives():
    policy, reference = small(0), small(1)
    measurer = evaluator()
    mine, theirs = measurer.measure(policy), measurer.measure(reference, measurer.reference_samples)
    responses = every_sequence(5, 4)
    expected = torch.zeros(8, dtype=torch.float64)
    rewards = torch.tensor([ids.count(1) for ids in responses], dtype=torch.float64)
    lengths = torch.tensor([len(ids) for ids in responses], dtype=torch.float64)
    ends = torch.tensor([ids[-1] == 0 for ids in responses], dtype=torch.float64)
    for prompt in ([2, 3], [1]):
        logp, ref = (sequence_logps(model, prompt, responses) for model in (policy, reference))
        p, q = logp.exp(), ref.exp()
        expected += (
            torch.stack(
                (p @ (logp - ref), q @ (ref - logp), p @ rewards, q @ rewards, p @ lengths, p @ ends, q @ ends, p.sum())
            )
            / 2
        )
    found = [
        (mine.kl_policy_reference, expected[0]), (mine.kl_reference_policy, expected[1]), (mine.reward, expected[2]),
        (theirs.reward, expected[3]), (mine.length, expected[4]),
    ]  # fmt: skip
    for estimate, value in found:
        assert estimate.count == 2
        assert estimate.mean == pytest.approx(value.item(), rel=0.06)
    assert theirs.kl_policy_reference.mean == theirs.kl_reference_policy.mean == 0.0
    assert mine.finished == pytest.approx(expected[5].item(), abs=0.04)
    assert theirs.finished == pytest.approx(expected[6].item(), abs=0.04)


def test_samples_above_the_threshold_are_measured_apart():
    def length(rows):
        return [float(len(row["response"].split())) for row in rows]

    assert evaluator(length, num_samples=200).threshold == 4.0  # most samples run to the longest length
    measurer = evaluator(length, num_samples=200, matched_length=2, reward_threshold=3.0)
    found = measurer.measure(measurer.reference, measurer.reference_samples)
    flat = [ids for drawn in measurer.reference_samples.ids for ids in drawn]
    chosen = [ids for ids in flat if sum(map(bool, ids)) >= 3]
    assert found.good_share == len(chosen) / len(flat) < 1
    assert found.good_diversity.distinct_2 == measure_diversity([chosen], Letters(), 2, 100).distinct_2
    strict = evaluator(num_samples=200, reward_threshold=100.0).measure(small(0))
    assert (strict.good_share, strict.good_diversity) == (0.0, None)


def test_predictive_entropy_of_a_uniform_model_and_diversity_within_prompts():
    policy = small(0)
    with torch.no_grad():
        policy.lm_head.weight.zero_()
    found = evaluator(num_samples=8, entropy_samples=25, entropy_top_p=0.95, matched_length=1).measure(policy)
    assert found.predictive_entropy.mean == pytest.approx(math.log(5))
    assert found.entropy.mean == pytest.approx(math.log(5))
    assert found.prompt_diversity.distinct_1.count == 2
    assert found.columns()["prompt_distinct_1"] == found.prompt_diversity.distinct_1.mean


def test_without_a_reward_everything_else_is_measured():
    with_reward, without = (evaluator(r, num_samples=50, matched_length=2) for r in (count_b, None))
    full, rest = with_reward.measure(small(0)), without.measure(small(0))
    assert replace(full, reward=None, good_share=None, good_diversity=None) == rest
    assert "reward" not in rest.columns()


def test_a_response_is_decoded_as_what_follows_its_prompt():
    assert decode_response(Letters(), [2, 3], [1, 4, 0]) == " b e"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"entropy_top_p": 0.0}, "--entropy_top_p must be in"), ({"matched_length": 0}, "--matched_length must be at")],
)
def test_refuses_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        MeasureOptions(**options)


def test_eval_writes_what_the_evaluator_measures(model_folder, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "letters.py").write_text("def e(texts):\n    return [text.count('e') for text in texts]\n")
    policy = make_model(len(tokenizer), seed=1)
    policy.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    write_jsonl(tmp_path / "pairs.jsonl", preference_rows(6))
    words = ["eval", "--model_name_or_path", "policy", "--ref_model_name_or_path", str(model_folder)]
    words += ["--dataset_name", "pairs.jsonl", "--json", "out.json", "--objective", "dpo"]
    generate = ["--generate", "--reward", "letters:e", "--num_prompts", "4", "--max_new_tokens", "8"]
    assert main([*words, *generate, "--entropy_samples", "4", "--num_samples", "2"]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    reference = make_model(len(tokenizer))
    texts = [row["prompt"] for row in preference_rows(4)]
    prompts = [Prompt(text, tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]

    def letters(rows):
        return [float((row["prompt"] + row["response"]).count("e")) for row in rows]

    options = MeasureOptions(max_new_tokens=8, entropy_samples=4, num_samples=2)
    measurer = Evaluator(reference, tokenizer, prompts, letters, options)
    for side, measured in {
        "policy": measurer.measure(policy),
        "reference": measurer.measure(reference, measurer.reference_samples),
    }.items():
        for name, value in measured.columns().items():
            assert found[f"samples/{side}/{name}"] == pytest.approx(value, rel=1e-5, nan_ok=True), name
    # KL(reference || policy) on the pairs is the sequential KL that training logs.
    assert found["dataset/chosen/kl_reference_policy"] == pytest.approx(found["kl/chosen"], rel=1e-4)
    assert found["dataset/rejected/kl_reference_policy"] == pytest.approx(found["kl/rejected"], rel=1e-4)
    assert found["dataset/chosen/kl_policy_reference"] != pytest.approx(found["kl/chosen"], rel=1e-3)
    assert "KL(policy || reference), nats per response" in capsys.readouterr().out
    assert main([*words, "--num_samples", "2"]) == 2
    assert "--num_samples has no effect without --generate" in capsys.readouterr().err
    assert main([*words, *generate, "--reward", "column:score"]) == 2
    assert "responses that are sampled have no columns" in capsys.readouterr().err


def test_statistics_take_no_more_sequences_at_a_time_than_sampling(monkeypatch):
    sizes = []
    real = divergence.pack_sequences
    monkeypatch.setattr(divergence, "pack_sequences", lambda p, r: sizes.append(len(p)) or real(p, r))
    evaluator(num_samples=4, batch_size=3).measure(small(2))
    assert sorted(set(sizes)) == [2, 3]
