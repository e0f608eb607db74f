"""PPO and RLOO raise the reward of the demo's reviews within three minutes on one CPU thread."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest

from tdpo import SFTConfig, SFTTrainer
from tdpo.demo import grammar, world
from tdpo.evaluate.divergence import response_stats
from tdpo.evaluate.generate import Sampling, decode_response, sample_ids
from tdpo.rl.ppo import PPOOptions, train_ppo
from tdpo.rl.rloo import RLOOOptions, train_rloo


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The demo's tokenizer, its SFT model, prompts to train on and held-out prompts."""
    texts, prompts, held_out = world.make_texts(5000, 600, 256, seed=0)
    tokenizer = world.build_tokenizer(texts)
    model = world.build_model(tokenizer, seed=0)
    args = SFTConfig(
        output_dir=str(tmp_path_factory.mktemp("sft")), max_steps=300, learning_rate=3e-3, warmup_steps=15,
        per_device_train_batch_size=64, max_grad_norm=10.0, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    SFTTrainer(model, args, [{"text": text} for text in texts], processing_class=tokenizer).train()
    return tokenizer, model.eval(), prompts, held_out


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        PPOOptions(learning_rate=1e-4, steps=20, max_new_tokens=48, eval_every=20),
        RLOOOptions(learning_rate=3e-4, steps=60, batch_size=16, max_new_tokens=48, eval_every=60),
    ],
    ids=["ppo", "rloo"],
)
def test_the_reward_of_reviews_rises(options: Any, reviews: Any) -> None:
    """From about -0.015 of the SFT model, with the default beta of 0.05."""
    tokenizer, sft, prompts, held_out = reviews
    sampling = Sampling(48, batch_size=256, seed=2)
    policy, ids = copy.deepcopy(sft), tokenizer(held_out, add_special_tokens=False)["input_ids"]

    def reward(rows: Any) -> list[float]:
        return [grammar.reward(row["prompt"] + row["response"]) for row in rows]

    def measure(model: Any) -> tuple[float, float]:
        drawn = [found[0] for found in sample_ids(model, ids, sampling, tokenizer.eos_token_id)]
        texts = [decode_response(tokenizer, prompt, response) for prompt, response in zip(ids, drawn, strict=True)]
        kl = response_stats(model, sft, ids, drawn).kl_policy_reference.mean().item()
        rewards = reward([{"prompt": p, "response": text} for p, text in zip(held_out, texts, strict=True)])
        return sum(rewards) / len(rewards), kl

    before, _ = measure(sft)
    started = time.perf_counter()
    if isinstance(options, RLOOOptions):
        pytest.importorskip("trl", reason="needs trl: pip install 'tdpo[experiments]'")
    run: Any = train_ppo if isinstance(options, PPOOptions) else train_rloo
    run(policy, sft, tokenizer, prompts, reward, options, lambda step, model: None)
    seconds = time.perf_counter() - started
    after, kl = measure(policy)
    print(f"reward {before:.3f} -> {after:.3f}, KL(policy || reference) {kl:.2f} nats, {seconds:.0f} s")
    assert after > before + 0.15
    assert 0 < kl < 10
    assert seconds < 180
