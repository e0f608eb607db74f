"""PPO and RLOO: exact policy gradients, the closed-form optimum of a bandit, and runs that repeat and resume."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tdpo import UserError
from tdpo.evaluate.divergence import response_stats
from tdpo.evaluate.generate import Sampling, sample_ids
from tdpo.rl import common
from tdpo.rl.ppo import (
    PPOOptions,
    ValueModel,
    generalised_advantages,
    minibatch_loss,
    policy_loss,
    score_rollout,
    train_ppo,
    value_loss,
)
from tdpo.rl.rloo import RLOOOptions, train_rloo
from tdpo.types import Head, Hidden, PackedBatch

WORDS = ["<end>", "<unknown>", "go", "a", "b", "c"]
END, PROMPT = 0, [2, 3]
VALUE_OF = {"": 0.2, "<unknown>": 0.1, "go": 0.0, "a": 1.0, "b": 0.6, "c": -0.4}
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}go{% endif %}"


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are six words."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=TEMPLATE)


def word_model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.3, bos_token_id=None, eos_token_id=END,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def frozen(model: Any) -> Any:
    return copy.deepcopy(model).requires_grad_(False)


def word_reward(rows: Any) -> list[float]:
    """The mean value of the words of a response."""
    words = [row["response"].split() or [""] for row in rows]
    return [sum(VALUE_OF[word] for word in found) / len(found) for found in words]


def equal_weights(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)


# The two-token world: every response, so expectations are sums.

RESPONSES = [[END], *([first, second] for first, second in itertools.product(range(1, 6), range(6)))]


def token_logps(model: nn.Module, response: list[int], temperature: float) -> Tensor:
    """Log-probabilities ``[T, V]`` of the distributions along a response, by the model's own forward."""
    ids = torch.tensor([PROMPT + response[:-1]])
    return (model(input_ids=ids).logits[0, len(PROMPT) - 1 :] / temperature).log_softmax(-1)


def response_logprob(model: nn.Module, response: list[int], temperature: float) -> Tensor:
    logps = token_logps(model, response, temperature)
    return logps[torch.arange(len(response)), torch.tensor(response)]


def rewards_of(responses: list[list[int]]) -> list[float]:
    return [sum((i + 1) * (token - 2.5) ** 2 for i, token in enumerate(ids)) / 9 for ids in responses]


class ExactValues(nn.Module):
    """The expected reward to come, less beta times the KL to come, before each token: by enumeration."""

    def __init__(self, policy: nn.Module, reference: nn.Module, options: PPOOptions) -> None:
        super().__init__()
        self.table: dict[tuple[int, ...], float] = {}
        with torch.no_grad():
            logps = [response_logprob(policy, ids, options.temperature) for ids in RESPONSES]
            ratios = [
                logp - response_logprob(reference, ids, options.temperature)
                for ids, logp in zip(RESPONSES, logps, strict=True)
            ]
        for prefix in {tuple(ids[:t]) for ids in RESPONSES for t in range(len(ids))}:
            self.table[prefix] = 0.0
            for ids, logp, ratio, reward in zip(RESPONSES, logps, ratios, rewards_of(RESPONSES), strict=True):
                if tuple(ids[: len(prefix)]) == prefix:
                    chance, to_come = logp[len(prefix) :].sum().exp(), ratio[len(prefix) :].sum()
                    self.table[prefix] += float(chance * (reward - options.beta * to_come))

    def forward(self, batch: PackedBatch) -> Tensor:
        rows = [labels.tolist() for labels in batch.labels.split([length for length in batch.lengths if length])]
        return torch.tensor([self.table[tuple(ids[:t])] for ids in rows for t in range(len(ids))], dtype=torch.float64)


def gradients(value: Tensor, model: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])


def expected_ppo_gradient(policy: Any, reference: Any, values: nn.Module, options: PPOOptions) -> Tensor:
    """The gradient of the first update's loss, summed over tokens, in expectation over the policy's responses."""
    total = torch.zeros(sum(p.numel() for p in policy.parameters()), dtype=torch.float64)
    for response, reward in zip(RESPONSES, rewards_of(RESPONSES), strict=True):
        chance = response_logprob(policy, response, options.temperature).sum().exp().item()
        rollout = score_rollout(policy, reference, values, [PROMPT], [response], [reward], options)
        loss, metrics = minibatch_loss(policy, values, rollout, [0], options)
        assert metrics["clip_fraction"] == 0
        total += chance * len(response) * gradients(loss, policy)
    return total


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """Policy and reference that differ, in float64 throughout (a Llama computes its norms in float32)."""
    config = GPT2Config(
        vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=16, initializer_range=0.3, bos_token_id=END,
        eos_token_id=END,
    )  # fmt: skip
    torch.manual_seed(0)
    policy, reference = (GPT2LMHeadModel(config).double().eval() for _ in range(2))
    return policy, reference.requires_grad_(False)


@pytest.mark.parametrize(
    ("exact_values", "lam", "temperature"), [(False, 1.0, 1.0), (True, 0.3, 1.0), (False, 1.0, 0.7)]
)
def test_the_first_update_follows_the_exact_gradient(
    pair: Any, exact_values: bool, lam: float, temperature: float
) -> None:
    policy, reference = pair
    options = PPOOptions(beta=0.4, lam=lam, temperature=temperature, whiten_advantages=False, value_coef=0.0)
    values: Any = ExactValues(policy, reference, options) if exact_values else ValueModel(reference)
    if not exact_values:
        nn.init.normal_(values.head.weight)  # any values of the states: a baseline
    objective: Any = 0.0
    for ids, reward in zip(RESPONSES, rewards_of(RESPONSES), strict=True):
        logp = response_logprob(policy, ids, temperature).sum()
        ref_logp = response_logprob(reference, ids, temperature).sum()
        objective = objective + logp.exp() * (reward - options.beta * (logp - ref_logp))
    wanted = -gradients(objective, policy)
    found = expected_ppo_gradient(policy, reference, values, options)
    assert wanted.norm() > 0.1
    assert (found - wanted).norm() < 1e-10 * wanted.norm()


def test_a_penalty_in_the_loss_has_the_gradient_of_the_kl_at_every_token(pair: Any) -> None:
    policy, reference = pair
    options = PPOOptions(beta=0.4, lam=1.0, kl_in="loss", whiten_advantages=False, value_coef=0.0)
    objective: Any = 0.0
    for ids, reward in zip(RESPONSES, rewards_of(RESPONSES), strict=True):
        objective = objective + response_logprob(policy, ids, 1.0).sum().exp() * reward
    for prefix in [[], *([first] for first in range(1, 6))]:
        chance = 1.0 if not prefix else response_logprob(policy, prefix, 1.0).sum().exp().item()
        logp, ref_logp = (token_logps(model, [*prefix, END], 1.0)[-1] for model in (policy, reference))
        objective = objective - options.beta * chance * (logp.exp() * (logp - ref_logp)).sum()
    wanted = -gradients(objective, policy)
    found = expected_ppo_gradient(policy, reference, ValueModel(reference), options)
    assert (found - wanted).norm() < 1e-10 * wanted.norm()


# Parts, by hand.


def test_gae_is_the_discounted_sum_of_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths, gamma, lam = [4, 1, 3], 0.9, 0.7
    rewards, values = (torch.randn(3, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    for row, length in enumerate(lengths):
        rewards[row, length:] = values[row, length:] = 0
    found = generalised_advantages(rewards, values, gamma, lam)
    for row, length in enumerate(lengths):
        after = [*values[row, 1:length].tolist(), 0.0]
        deltas = [rewards[row, t].item() + gamma * after[t] - values[row, t].item() for t in range(length)]
        for t in range(length):
            wanted = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length))
            assert found[row, t].item() == pytest.approx(wanted, abs=1e-12)
        assert found[row, length:].tolist() == [0.0] * (4 - length)


def test_clipping_by_hand() -> None:
    logp = torch.tensor([1.5, 0.5, 1.5, 0.5]).log().requires_grad_()
    loss = policy_loss(logp, torch.zeros(4), torch.tensor([2.0, 2.0, -2.0, -2.0]), 0.2)
    assert loss.tolist() == pytest.approx([-2.4, -1.0, 3.0, 1.6])
    loss.sum().backward()
    assert logp.grad is not None and logp.grad.tolist() == pytest.approx([0.0, -1.0, 3.0, 0.0])
    values, old_values, returns = torch.tensor([1.5, 1.5, -0.5]), torch.full((3,), 0.5), torch.tensor([2.5, 0.5, 0.5])
    assert value_loss(values, old_values, returns, 0.25).tolist() == [1.53125, 0.5, 0.5]
    assert value_loss(values, old_values, returns, None).tolist() == [0.5, 0.5, 0.5]


def test_whitening_keeps_the_meaning_of_beta(pair: Any) -> None:
    policy, reference = pair
    options = PPOOptions(kl_in="loss", beta=0.4)
    made = [[PROMPT] * len(RESPONSES), RESPONSES, rewards_of(RESPONSES)]
    plain, white = (
        score_rollout(policy, reference, ValueModel(reference), *made, replace(options, whiten_advantages=on))
        for on in (False, True)
    )
    raw, advantages = plain.advantages[plain.mask], white.advantages[white.mask]
    spread = raw.std(correction=0)
    assert advantages.mean().abs() < 1e-12 and advantages.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert torch.allclose(advantages, (raw - raw.mean()) / spread, rtol=1e-6)
    assert white.kl_weight.item() == pytest.approx(0.4 / spread.item(), rel=1e-6)
    assert plain.kl_weight == 0.4 and torch.equal(white.returns, plain.returns)


def test_metrics_of_a_rollout(pair: Any) -> None:
    policy, reference = pair
    rollout = score_rollout(
        policy, reference, ValueModel(reference), [PROMPT] * 31, RESPONSES, rewards_of(RESPONSES), PPOOptions()
    )
    stats = response_stats(policy, reference, [PROMPT] * 31, RESPONSES)
    assert rollout.metrics["kl"].item() == pytest.approx(stats.kl_policy_reference.mean().item(), rel=1e-12)
    assert rollout.metrics["entropy"].item() == pytest.approx(
        (stats.entropy.sum() / stats.length.sum()).item(), rel=1e-12
    )
    logratio = (rollout.logp - rollout.ref_logp).sum(1)
    assert torch.allclose(logratio, stats.logratio, rtol=1e-12)
    assert rollout.metrics["length"].item() == pytest.approx(61 / 31)


def test_a_tempered_head_divides_the_logits_behind_a_soft_cap_too() -> None:
    from tdpo.ops.numerics import head_logits
    from tdpo.rl.ppo import tempered

    torch.manual_seed(0)
    hidden = Hidden(torch.randn(4, 3).double(), Head(torch.randn(5, 3).double(), torch.randn(5).double(), 1.7, 2.0))
    found = tempered(hidden, 0.5)
    assert torch.allclose(head_logits(found.states, found.head), head_logits(hidden.states, hidden.head) / 0.5)


# Runs.

# One update on each iteration's responses: further ones leave noise around the optimum (0.003 to 0.04).
PPO_BANDIT = PPOOptions(
    beta=0.5, temperature=0.7, learning_rate=2e-3, steps=100, batch_size=128, minibatch_size=128, epochs=1,
    max_new_tokens=1, eval_every=100, whiten_advantages=False, value_coef=1.0, value_clip=None,
)  # fmt: skip
RLOO_BANDIT = RLOOOptions(
    beta=0.5, temperature=0.7, learning_rate=5e-3, steps=60, batch_size=4, num_samples=32, max_new_tokens=1,
    eval_every=60,
)  # fmt: skip
PPO = PPOOptions(learning_rate=1e-3, steps=5, batch_size=6, minibatch_size=4, max_new_tokens=4, eval_every=2)
RLOO = RLOOOptions(
    learning_rate=1e-3, steps=5, batch_size=3, num_samples=2, micro_batch_size=3, max_new_tokens=4, eval_every=2
)
BOTH = pytest.mark.parametrize("options", [PPO, RLOO], ids=["ppo", "rloo"])
PROMPTS: list[Any] = ["go a", "go b", "go c", "a b", "b"]
CHATS: list[Any] = [[{"role": "user", "content": text}] for text in PROMPTS]


def train(options: Any, policy: Any, reference: Any, **changes: Any) -> None:
    """Runs the baseline that the options are of."""
    if isinstance(options, RLOOOptions):
        pytest.importorskip("trl", reason="needs trl: pip install 'tdpo[experiments]'")
    made = {"prompts": PROMPTS, "reward": word_reward, "on_measure": lambda step, model: None, **changes}
    run: Any = train_ppo if isinstance(options, PPOOptions) else train_rloo
    run(policy, reference, word_tokenizer(), options=options, **made)


@pytest.mark.parametrize(("options", "tolerance"), [(PPO_BANDIT, 0.005), (RLOO_BANDIT, 0.01)], ids=["ppo", "rloo"])
def test_a_bandit_ends_at_its_closed_form_optimum(options: Any, tolerance: float) -> None:
    policy = word_model()
    reference = frozen(policy)
    train(options, policy, reference, prompts=["go a"])
    with torch.no_grad():
        before, after = (token_logps(model, [END], options.temperature)[0].exp() for model in (reference, policy))
    rewards = torch.tensor([VALUE_OF[word if i else ""] for i, word in enumerate(WORDS)])
    optimum = before * (rewards / options.beta).exp()
    optimum = optimum / optimum.sum()
    assert 0.5 * (before - optimum).abs().sum() > 0.5
    assert 0.5 * (after - optimum).abs().sum() < tolerance


@BOTH
def test_a_seed_repeats_bit_for_bit_and_measuring_changes_nothing(options: Any) -> None:
    def result(made: Any, on_measure: Any = lambda step, model: torch.rand(1)) -> Any:
        policy, reference = word_model(), frozen(word_model())
        torch.manual_seed(1)
        train(made, policy, reference, on_measure=on_measure)
        return policy

    seen: list[int] = []
    first = result(options, lambda step, model: seen.append(step))
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))  # the caller's random numbers are those without the run
    assert seen == [2, 4, 5]
    assert equal_weights(first, result(replace(options, eval_every=1)))
    assert not equal_weights(first, result(replace(options, seed=1)))
    assert not equal_weights(first, word_model())


@BOTH
def test_a_large_gradient_is_scaled_down_to_its_largest_norm(options: Any) -> None:
    policy, norms = word_model(), []

    def record(optimizer: Any, args: Any, kwargs: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(nn.utils.get_total_norm(grads).item())

    handle = register_optimizer_step_pre_hook(record)
    try:
        train(replace(options, steps=1, max_grad_norm=1e-3), policy, frozen(word_model(3)))
    finally:
        handle.remove()
    assert norms == pytest.approx([1e-3] * len(norms), rel=1e-2)
    assert len(norms) == (8 if isinstance(options, PPOOptions) else 1)


class Interrupted(Exception):
    pass


@BOTH
@pytest.mark.parametrize("when", ["sampling", "measuring"])
def test_an_interrupted_run_continues_bit_for_bit(options: Any, when: str, tmp_path: Path) -> None:
    whole, policy, reference = word_model(), word_model(), frozen(word_model())
    train(options, whole, reference)
    calls, measured = [0], []

    def reward(rows: Any) -> list[float]:
        calls[0] += 1
        if when == "sampling" and calls[0] == 4:
            raise Interrupted
        return word_reward(rows)

    def on_measure(step: int, model: Any) -> None:
        measured.append(step)
        if when == "measuring" and measured == [2, 4]:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(options, policy, reference, reward=reward, on_measure=on_measure, folder=tmp_path)
    calls[0], resumed = 10, word_model()
    train(options, resumed, reference, reward=reward, on_measure=on_measure, folder=tmp_path)
    assert calls[0] == 13  # iterations 3, 4 and 5
    assert measured == ([2, 4, 5] if when == "sampling" else [2, 4, 4, 5])
    assert equal_weights(resumed, whole)
    # A finished run is loaded, and can be made longer.
    finished, longer, other = word_model(), word_model(), word_model()
    train(options, finished, reference, folder=tmp_path)
    assert equal_weights(finished, whole)
    train(replace(options, steps=7), longer, reference, folder=tmp_path)
    train(replace(options, steps=7), other, reference)
    assert equal_weights(longer, other)


@BOTH
def test_a_folder_belongs_to_one_run(options: Any, tmp_path: Path) -> None:
    reference = frozen(word_model())
    train(options, word_model(), reference, folder=tmp_path)
    for changed, policy, prompts in (
        (replace(options, beta=0.7), word_model(), PROMPTS),
        (options, word_model(1), PROMPTS),
        (options, word_model(), PROMPTS[:-1]),
    ):
        with pytest.raises(UserError, match="holds a run with other options, prompts or models"):
            train(changed, policy, reference, prompts=prompts, folder=tmp_path)
    with pytest.raises(UserError, match=r"is of iteration 5, after --steps 3"):
        train(replace(options, steps=3), word_model(), reference, folder=tmp_path)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Prompt ids, response ids and rewards of every iteration of a run to come."""
    found: list[Any] = []
    score = common.ScoredPrompts.score

    def recorded(self: Any, indices: Any, responses: Any) -> list[float]:
        found.append(([self.ids[i] for i in indices], responses, score(self, indices, responses)))
        return found[-1][2]

    monkeypatch.setattr(common.ScoredPrompts, "score", recorded)
    return found


@BOTH
def test_responses_are_sampled_at_the_temperature(options: Any, sampled: list[Any]) -> None:
    train(replace(options, steps=1, temperature=1e-4), word_model(), frozen(word_model()))
    ((prompts, responses, _),) = sampled
    likeliest = sample_ids(word_model(), prompts, Sampling(4, temperature=0.0), END)
    assert responses == [found[0] for found in likeliest]


@BOTH
def test_metrics_are_of_the_samples_and_the_reference_is_the_one_given(options: Any, sampled: list[Any]) -> None:
    policy, reference, logs = word_model(0), frozen(word_model(3)), {}
    before = frozen(policy)
    one = replace(options, steps=1, **({} if isinstance(options, PPOOptions) else {"micro_batch_size": None}))
    train(one, policy, reference, on_log=lambda step, metrics: logs.update({step: metrics}))
    ((prompts, responses, rewards),) = sampled
    stats = response_stats(before, reference, prompts, responses)
    kl = stats.kl_policy_reference if isinstance(options, PPOOptions) else stats.logratio
    assert logs[1]["kl"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert logs[1]["reward"] == pytest.approx(sum(rewards) / len(rewards), rel=1e-5)
    assert logs[1]["length"] == pytest.approx(stats.length.double().mean().item())
    assert logs[1]["entropy"] == pytest.approx((stats.entropy.sum() / stats.length.sum()).item(), rel=1e-4)
    assert kl.mean() > 0.1 and equal_weights(reference, word_model(3))


@BOTH
def test_both_have_the_same_prompts_in_the_same_order_as_text_or_chat(options: Any) -> None:
    order = common.random_passes(5, 5 * options.batch_size, options.seed)
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5)) and order[:5] != order[5:10]
    for prompts in (PROMPTS, CHATS):
        seen: list[Any] = []

        def reward(rows: Any, seen: list[Any] = seen) -> list[float]:
            seen.extend(row["prompt"] for row in rows)
            assert all(set(row["response"].split()) <= set(WORDS[1:]) for row in rows)
            return word_reward(rows)

        train(options, word_model(), frozen(word_model()), prompts=prompts, reward=reward)
        assert seen == [prompts[i] for i in order for _ in range(getattr(options, "num_samples", 1))]


@BOTH
def test_a_missing_end_costs_its_penalty(options: Any) -> None:
    scored = common.ScoredPrompts(
        word_model(), word_tokenizer(), PROMPTS, word_reward, replace(options, missing_end_penalty=0.5)
    )
    assert scored.score([0, 1, 2], [[3, END], [3, 4, 3, 4], [END]]) == pytest.approx([1.0, 0.8 - 0.5, 0.2])


@BOTH
def test_models_and_tokenizer_stay_as_they_were_but_for_the_weights(options: Any) -> None:
    policy, reference = word_model().train(), word_model()
    kept = [set(vars(model)) for model in (policy, reference)]
    configs = [(m.config.to_dict(), m.generation_config.to_dict(), m.config.name_or_path) for m in (policy, reference)]
    train(options, policy, reference)
    assert kept == [set(vars(model)) for model in (policy, reference)]
    assert configs == [
        (m.config.to_dict(), m.generation_config.to_dict(), m.config.name_or_path) for m in (policy, reference)
    ]
    assert policy.training and not reference.training
    assert all(parameter.requires_grad for parameter in reference.parameters())
    assert equal_weights(reference, word_model())


@BOTH
def test_mistakes_are_reported(options: Any) -> None:
    policy, reference = word_model(), frozen(word_model())
    with pytest.raises(UserError, match="there are no prompts"):
        train(options, policy, reference, prompts=[])
    with pytest.raises(UserError, match=r"longest prompt has 30 tokens; with --max_new_tokens 4 that exceeds the 32"):
        train(options, policy, reference, prompts=["go a", "a " * 30])
    with pytest.raises(UserError, match="returned 1 numbers for 6 responses"):
        train(options, policy, reference, reward=lambda rows: [0.0])
    with pytest.raises(UserError, match="is nan, not a finite number"):
        train(options, policy, reference, reward=lambda rows: [float("nan")] * len(rows))
    assert equal_weights(policy, word_model())
    for changes, message in (
        ({"temperature": 0.0}, "--temperature must be positive"),
        ({"beta": -0.1}, "--beta must be at least 0"),
        ({"steps": 0}, "--steps must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            replace(options, **changes)


def test_mistakes_of_one_baseline() -> None:
    with pytest.raises(UserError, match="--num_samples must be at least 2"):
        RLOOOptions(num_samples=1)
    with pytest.raises(UserError, match="--micro_batch_size 4 does not divide the 6 responses"):
        replace(RLOO, micro_batch_size=4)
    with pytest.raises(UserError, match="--lam must be at most 1"):
        PPOOptions(lam=1.5)
    with pytest.raises(UserError, match="--kl_in penalty: there are reward, loss"):
        PPOOptions(kl_in="penalty")
    with pytest.raises(UserError, match="prompts of one kind"):
        train(RLOO, word_model(), frozen(word_model()), prompts=[PROMPTS[0], CHATS[1]])
    with pytest.raises(UserError, match="no parameter of the policy is trained"):
        train(PPO, frozen(word_model()), word_model())
