"""RLOO by TRL: its gradient against the formula, and what TRL does in another way."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import test_rl
import torch
from test_rl import END, RLOO, frozen, gradients, train, word_model, word_reward
from torch import Tensor

from tdpo import UserError
from tdpo.rl.rloo import train_rloo

sampled = test_rl.sampled  # the fixture


def test_rloo_follows_the_gradient_of_its_formula(sampled: list[Any]) -> None:
    """Several tokens, two end tokens, a temperature and a penalty, against the docstring's equation."""
    policy, reference, found = word_model(), frozen(word_model(3)), {}
    policy.generation_config.eos_token_id = [END, 5]
    before = copy.deepcopy(policy)
    for name, parameter in policy.named_parameters():  # called after the backward pass, before clipping
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: found.update({name: p.grad.clone()}))
    options = replace(RLOO, beta=0.4, temperature=0.7, steps=1, num_samples=4, micro_batch_size=None)
    train(options, policy, reference)
    ((prompts, responses, rewards),) = sampled
    assert len({len(response) for response in responses}) > 1
    logps, ratios = [], []
    for prompt, response in zip(prompts, responses, strict=True):
        ids, t = torch.tensor([prompt + response]), torch.arange(len(response))
        both = [m(input_ids=ids).logits[0, len(prompt) - 1 : -1] / 0.7 for m in (before, reference)]
        logp, ref_logp = (logits.log_softmax(-1)[t, torch.tensor(response)].sum() for logits in both)
        logps.append(logp)
        ratios.append((logp - ref_logp).item())
    penalised = torch.tensor(rewards) - 0.4 * torch.tensor(ratios)
    groups = penalised.view(3, 4)
    baselines = (groups.sum(1, keepdim=True) - groups) / 3
    wanted = gradients(-(torch.stack(logps) * (groups - baselines).flatten()).mean(), before)
    gradient = torch.cat([found[name].flatten() for name, _ in before.named_parameters()])
    assert wanted.norm() > 0.1
    assert (gradient - wanted).norm() < 1e-5 * wanted.norm()


def test_micro_batches_have_the_same_gradient() -> None:
    def gradient(micro_batch_size: int | None) -> Tensor:
        policy, found = word_model(), {}
        for name, parameter in policy.named_parameters():  # called after each backward pass, before clipping
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: found.update({name: p.grad.clone()}))
        train(replace(RLOO, steps=1, micro_batch_size=micro_batch_size), policy, frozen(word_model(1)))
        return torch.cat([grad.flatten() for grad in found.values()])

    full, parts = gradient(None), gradient(2)
    assert full.norm() > 0.1
    assert (full - parts).norm() < 1e-5 * full.norm()


def test_rloo_reports_no_kl_where_trl_computes_none() -> None:
    logs: list[Any] = []
    train(
        replace(RLOO, beta=0.0), word_model(), frozen(word_model(3)), on_log=lambda step, metrics: logs.append(metrics)
    )
    assert [set(metrics) for metrics in logs] == [{"reward", "entropy", "length"}] * 5


def test_rloo_refuses_a_prompt_that_trl_encodes_in_another_way(tokenizer: Any, model: Any) -> None:
    pytest.importorskip("trl", reason="needs trl: pip install 'tdpo[experiments]'")
    prompts = ["The river", f"The {tokenizer.eos_token} river"]  # text for tdpo, an end token for TRL
    with pytest.raises(UserError, match="prompt 2: TRL's trainer encodes it differently"):
        train_rloo(model, frozen(model), tokenizer, prompts, word_reward, RLOO, lambda step, model: None)
