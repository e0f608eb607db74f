"""Divergence and entropy along responses, against brute force over full logits and over every sequence."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tdpo.data.pack import pack_sequences
from tdpo.evaluate.divergence import response_stats, token_divergence
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
    names = ("kl_policy_reference", "kl_reference_policy", "logratio", "entropy", "ref_entropy")
    sums: dict[str, list[float]] = {name: [] for name in names}
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids = torch.tensor([prompt + response])
        at = slice(len(prompt) - 1, ids.shape[1] - 1)
        with torch.no_grad():
            logp, ref = (model(input_ids=ids).logits[0, at].log_softmax(-1) for model in (policy, reference))
        index = torch.tensor(response)[:, None]
        sums["kl_policy_reference"].append((logp.exp() * (logp - ref)).sum().item())
        sums["kl_reference_policy"].append((ref.exp() * (ref - logp)).sum().item())
        sums["logratio"].append((logp - ref).gather(1, index).sum().item())
        sums["entropy"].append(-(logp.exp() * logp).sum().item())
        sums["ref_entropy"].append(-(ref.exp() * ref).sum().item())
    return sums


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_sums_equal_brute_force(batch_size):
    policy, reference = llama(0), llama(1)
    stats, expected = response_stats(policy, reference, PROMPTS, RESPONSES, batch_size), by_hand(policy, reference)
    for name, values in expected.items():
        torch.testing.assert_close(getattr(stats, name), torch.tensor(values, dtype=torch.float64), rtol=0, atol=1e-9)
    assert stats.length.tolist() == [3, 6, 1, 2]
    assert min(expected["kl_policy_reference"]) > 0.05  # the two models do differ
    assert abs(expected["kl_policy_reference"][0] - expected["kl_reference_policy"][0]) > 1e-3


def every_sequence(vocab: int, longest: int) -> list[list[int]]:
    """Every response of a model that ends at token 0 or at the longest length."""
    return [
        list(ids)
        for length in range(1, longest + 1)
        for ids in itertools.product(range(vocab), repeat=length)
        if 0 not in ids[:-1] and (ids[-1] == 0 or length == longest)
    ]


def small(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=5, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, initializer_range=0.5, bos_token_id=None, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def sequence_logps(model: LlamaForCausalLM, prompt: list[int], responses: list[list[int]]) -> torch.Tensor:
    logps = []
    for response in responses:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logps.append(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum())
    return torch.stack(logps)


def test_expected_sums_are_the_divergences_and_the_entropy_of_whole_responses():
    policy, reference, prompt = small(0), small(1), [2, 3]
    responses = every_sequence(5, 4)
    logp, ref = (sequence_logps(model, prompt, responses) for model in (policy, reference))
    p, q = logp.exp(), ref.exp()
    assert (p.sum().item(), q.sum().item()) == (pytest.approx(1), pytest.approx(1))
    stats = response_stats(policy, reference, [prompt] * len(responses), responses)
    assert (p @ stats.kl_policy_reference).item() == pytest.approx((p @ (logp - ref)).item(), rel=1e-10)
    assert (q @ stats.kl_reference_policy).item() == pytest.approx((q @ (ref - logp)).item(), rel=1e-10)
    assert (p @ stats.entropy).item() == pytest.approx(-(p @ logp).item(), rel=1e-10)
    assert (q @ stats.ref_entropy).item() == pytest.approx(-(q @ ref).item(), rel=1e-10)
    assert (p @ (logp - ref)).item() > 0.3


def test_float32_agrees_to_1e_6_per_token():
    policy, reference = llama(0), llama(1)
    expected = response_stats(policy, reference, PROMPTS, RESPONSES)
    found = response_stats(policy.float(), reference.float(), PROMPTS, RESPONSES)
    for name in ("kl_policy_reference", "kl_reference_policy", "entropy", "ref_entropy"):
        assert ((getattr(found, name) - getattr(expected, name)).abs() / expected.length).max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_models_have_kl_exactly_zero(dtype):
    policy = llama(0, dtype)
    for reference in (policy, copy.deepcopy(policy), FrozenCopy.of(policy)):
        stats = response_stats(policy, reference, PROMPTS, RESPONSES)
        assert stats.kl_policy_reference.tolist() == stats.kl_reference_policy.tolist() == [0.0] * 4
        assert stats.logratio.tolist() == [0.0] * 4


def test_a_uniform_policy_has_entropy_log_v():
    policy = llama(0, torch.float32)
    with torch.no_grad():
        policy.lm_head.weight.zero_()
    stats = response_stats(policy, llama(1, torch.float32), PROMPTS, RESPONSES)
    torch.testing.assert_close(stats.entropy, stats.length * math.log(VOCAB), rtol=1e-6, atol=0)


def test_chunks_equal_all_at_once_and_absent_entries_add_nothing():
    torch.manual_seed(0)
    weight, ref_weight = torch.randn(2, 50, 8, dtype=torch.float64)
    bias = torch.zeros(50, dtype=torch.float64)
    bias[40:] = -torch.inf
    states, ref_states = torch.randn(2, 33, 8, dtype=torch.float64)
    policy, reference = Hidden(states, Head(weight, bias)), Hidden(ref_states, Head(ref_weight, bias))
    labels = torch.randint(0, 40, (33,))
    whole, chunked = (token_divergence(policy, reference, labels, budget) for budget in (None, 1))
    p, q = (states @ weight[:40].T).softmax(-1), (ref_states @ ref_weight[:40].T).softmax(-1)
    expected = [(p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)]
    torch.testing.assert_close(whole[:2], torch.stack(expected))
    torch.testing.assert_close(whole[3], -(p * p.log()).sum(-1))
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-13)


def test_mean_of_the_log_ratio_over_samples_estimates_the_same_kl():
    policy, reference = llama(0, torch.float32), llama(1, torch.float32)
    with torch.no_grad():
        for one, other in zip(policy.parameters(), reference.parameters(), strict=True):
            one.copy_(0.7 * other + 0.3 * one)
    prompts = [[1, 2]] * 1500
    drawn = sample_ids(policy, prompts, Sampling(max_new_tokens=4, batch_size=1500), eos_token_id=0)
    stats = response_stats(policy, reference, prompts, [samples[0] for samples in drawn], batch_size=500)
    exact, sampled = Estimate.of(stats.kl_policy_reference), Estimate.of(stats.logratio)
    difference = Estimate.of(stats.kl_policy_reference - stats.logratio)
    assert abs(difference.mean) < 4 * difference.standard_error
    assert exact.mean > 0.1
    assert exact.standard_error < sampled.standard_error  # what the full distribution at each step buys


def test_training_mode_and_gradients_are_left_as_they_were():
    policy, reference = llama(0).train(), llama(1)
    stats = response_stats(policy, reference, PROMPTS, RESPONSES)
    assert policy.training
    assert not reference.training
    assert not stats.kl_policy_reference.requires_grad
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
        ([[1], []], [[2], [3]], "response 2: its prompt has no tokens"),
        ([[1]], [[]], "response 1: it has no tokens"),
    ],
)
def test_refuses_what_cannot_be_scored(prompts, responses, message):
    policy = llama(0)
    with pytest.raises(ValueError, match=message):
        response_stats(policy, policy, prompts, responses)
