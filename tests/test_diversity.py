"""KL(policy || reference) and entropy along samples, against brute force over full logits."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tdpo.evaluate.diversity import (
    distinct_n,
    measure_samples,
    pack_sequences,
    predictive_entropy,
    sample_stats,
)
from tdpo.evaluate.estimates import Estimate
from tdpo.evaluate.generate import Sampling, sample_ids
from tdpo.models.reference import FrozenCopy
from tdpo.types import Head, Hidden

VOCAB = 23
PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10, 11]]
RESPONSES = [[12, 13, 0], [14, 15, 16, 17, 18, 0], [0], [19, 20]]


def llama(seed: int, dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.4, bos_token_id=None, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def by_hand(policy: LlamaForCausalLM, reference: LlamaForCausalLM) -> dict[str, list[float]]:
    """Sums over each response, one sequence at a time, straight from the definitions."""
    sums: dict[str, list[float]] = {"kl": [], "logratio": [], "entropy": []}
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids = torch.tensor([prompt + response])
        at = slice(len(prompt) - 1, ids.shape[1] - 1)
        with torch.no_grad():
            logp, ref = (model(input_ids=ids).logits[0, at].log_softmax(-1) for model in (policy, reference))
        index = torch.tensor(response)[:, None]
        sums["kl"].append((logp.exp() * (logp - ref)).sum().item())
        sums["logratio"].append((logp - ref).gather(1, index).sum().item())
        sums["entropy"].append(-(logp.exp() * logp).sum().item())
    return sums


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_sums_equal_brute_force(batch_size):
    policy, reference = llama(0), llama(1)
    stats, expected = sample_stats(policy, reference, PROMPTS, RESPONSES, batch_size), by_hand(policy, reference)
    for name, values in expected.items():
        torch.testing.assert_close(getattr(stats, name), torch.tensor(values, dtype=torch.float64), rtol=0, atol=1e-9)
    assert stats.length.tolist() == [3, 6, 1, 2]
    assert min(expected["kl"]) > 0.05  # the two models do differ


def test_float32_agrees_to_1e_6_per_token():
    policy, reference = llama(0), llama(1)
    expected = sample_stats(policy, reference, PROMPTS, RESPONSES)
    found = sample_stats(policy.float(), reference.float(), PROMPTS, RESPONSES)
    assert ((found.kl - expected.kl).abs() / expected.length).max() < 1e-6
    assert ((found.entropy - expected.entropy).abs() / expected.length).max() < 1e-6


def test_the_direction_is_policy_first():
    policy, reference = llama(0), llama(1)
    forward, backward = (sample_stats(a, b, PROMPTS, RESPONSES) for a, b in ((policy, reference), (reference, policy)))
    assert (forward.kl - backward.kl).abs().min() > 1e-3
    torch.testing.assert_close(backward.kl, torch.tensor(by_hand(reference, policy)["kl"], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_models_have_kl_exactly_zero(dtype):
    policy = llama(0, dtype)
    for reference in (policy, copy.deepcopy(policy), FrozenCopy.of(policy)):
        stats = sample_stats(policy, reference, PROMPTS, RESPONSES)
        assert stats.kl.tolist() == [0.0] * 4
        assert stats.logratio.tolist() == [0.0] * 4


def test_a_uniform_policy_has_entropy_log_v():
    policy = llama(0, torch.float32)
    with torch.no_grad():
        policy.lm_head.weight.zero_()
    measured = measure_samples(policy, llama(1, torch.float32), PROMPTS, RESPONSES)
    assert measured.entropy.mean == pytest.approx(math.log(VOCAB), abs=1e-6)
    assert measured.entropy.standard_error < 1e-6


def test_entropy_in_chunks_equals_entropy_at_once_and_survives_absent_entries():
    torch.manual_seed(0)
    weight = torch.randn(50, 8, dtype=torch.float64)
    bias = torch.zeros(50, dtype=torch.float64)
    bias[40:] = -torch.inf
    hidden = Hidden(torch.randn(33, 8, dtype=torch.float64), Head(weight, bias))
    whole, chunked = predictive_entropy(hidden), predictive_entropy(hidden, logits_budget=1)
    p = (hidden.states @ weight[:40].T).softmax(-1)
    torch.testing.assert_close(whole, -(p * p.log()).sum(-1))
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-14)


def test_mean_of_the_log_ratio_over_samples_estimates_the_same_kl():
    policy, reference = llama(0, torch.float32), llama(1, torch.float32)
    with torch.no_grad():
        for one, other in zip(policy.parameters(), reference.parameters(), strict=True):
            one.copy_(0.7 * other + 0.3 * one)
    prompts = [[1, 2]] * 1500
    drawn = sample_ids(policy, prompts, Sampling(max_new_tokens=4, batch_size=1500), eos_token_id=0)
    stats = sample_stats(policy, reference, prompts, [samples[0] for samples in drawn], batch_size=500)
    exact, sampled = Estimate.of(stats.kl), Estimate.of(stats.logratio)
    difference = Estimate.of(stats.kl - stats.logratio)
    assert abs(difference.mean) < 4 * difference.standard_error
    assert exact.mean > 0.1
    assert exact.standard_error < sampled.standard_error  # what the full distribution at each step buys


def test_summary_averages_over_sequences():
    policy, reference = llama(0), llama(1)
    stats, summary = (
        sample_stats(policy, reference, PROMPTS, RESPONSES),
        measure_samples(policy, reference, PROMPTS, RESPONSES),
    )
    assert summary.kl.mean == pytest.approx(stats.kl.mean().item())
    assert summary.kl.standard_error == pytest.approx(stats.kl.std().item() / 2)
    assert summary.kl_per_token.mean == pytest.approx((stats.kl / stats.length).mean().item())
    assert (summary.length.mean, summary.length.count) == (3.0, 4)
    assert summary.length.standard_error == pytest.approx(math.sqrt(14 / 3) / 2)
    assert summary.distinct_1 == 10 / 12  # twelve tokens, the end token three times
    assert summary.distinct_2 == 1.0


def test_training_mode_and_gradients_are_left_as_they_were():
    policy, reference = llama(0).train(), llama(1)
    stats = sample_stats(policy, reference, PROMPTS, RESPONSES)
    assert policy.training
    assert not reference.training
    assert not stats.kl.requires_grad
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_layout_of_single_sequences():
    batch = pack_sequences(PROMPTS, RESPONSES)
    assert batch.num_pairs == 4
    flat = batch.input_ids.flatten()
    assert flat[batch.source_index + 1].tolist() == batch.labels.tolist() == [t for r in RESPONSES for t in r]
    assert batch.sequence_ids.tolist() == [0] * 3 + [2] * 6 + [4] + [6] * 2
    assert batch.branch_ids[1].tolist() == [0, 1, 1, 1, 1, 1, 1]
    assert batch.branch_ids[2].tolist() == [0, 0, 1, -1, -1, -1, -1]


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        ([[1]], [[2], [3]], "1 prompts and 2 responses"),
        ([], [], "not 0"),
        ([[1], []], [[2], [3]], "sequence 2 of the batch: the prompt is empty"),
        ([[1]], [[]], "the response is empty"),
    ],
)
def test_refuses_what_cannot_be_scored(prompts, responses, message):
    policy = llama(0)
    with pytest.raises(ValueError, match=message):
        sample_stats(policy, policy, prompts, responses)


def test_estimates_and_distinct_n_by_hand():
    one = Estimate.of(torch.tensor([2.0]))
    assert (one.mean, one.count) == (2.0, 1)
    assert math.isnan(one.standard_error)
    assert distinct_n([[1, 2, 1], [1, 2]], 1) == 2 / 5
    assert distinct_n([[1, 2, 1], [1, 2]], 2) == 2 / 3
    assert distinct_n([[1]], 2) == 0.0
