"""A policy that equals its reference costs log 2 with no divergence in training mode, whatever that mode does."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import make_model, preference_rows
from numeric_worlds import random_pairs
from peft import LoraConfig, get_peft_model
from test_architectures import COMMON, LLAMA_LIKE
from tiny_training import tiny_trainer
from torch import Tensor, nn
from transformers.integrations.neftune import neftune_post_forward_hook

from tdpo import SFTConfig, SFTTrainer, UserError, objectives, score_pairs
from tdpo.data.pack import pack_padded
from tdpo.models.fingerprint import config_hash
from tdpo.models.hidden import response_states
from tdpo.models.modes import mode_gap, prepare_reference_mode, same_mode
from tdpo.models.reference import LiveReference

VOCAB = 400
SIZES = {**LLAMA_LIKE, "vocab_size": VOCAB, "max_position_embeddings": 128}


class NoisyNorm(nn.Module):
    """Adds noise in training that no attribute switches off."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, states: Tensor) -> Tensor:
        states = self.norm(states)
        return states + 0.1 * torch.randn_like(states) if self.training else states


class OtherInTraining(NoisyNorm):
    """Computes other states in training, as layers of few bits do, without being random."""

    def forward(self, states: Tensor) -> Tensor:
        states = self.norm(states)
        return (states * 8).round() / 8 if self.training else states


def with_norm(wrapper: Callable[[nn.Module], nn.Module]) -> Any:
    model = make_model(VOCAB)
    model.model.layers[0].input_layernorm = wrapper(model.model.layers[0].input_layernorm)
    return model


def falcon() -> Any:
    sizes = {name: value for name, value in COMMON.items() if name != "max_position_embeddings"} | {"vocab_size": VOCAB}
    return hf.FalconForCausalLM(hf.FalconConfig(**sizes, attention_dropout=0.1, hidden_dropout=0.1))


def dbrx() -> Any:
    attention = {"attn_pdrop": 0.1, "kv_n_heads": 1, "clip_qkv": 8, "rope_theta": 1e4}
    experts = {"ffn_hidden_size": 24, "moe_num_experts": 3, "moe_top_k": 2, "moe_jitter_eps": 0.1}
    return hf.DbrxForCausalLM(
        hf.DbrxConfig(
            d_model=16, n_heads=2, n_layers=2, max_seq_len=128, vocab_size=VOCAB, attn_config=attention,
            ffn_config=experts, resid_pdrop=0.1, initializer_range=0.3, **{k: None for k in COMMON if "_id" in k},
        )
    )  # fmt: skip


def with_dropout(model: Any) -> Any:
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "dropout read from the config": falcon,
    "jitter of a router": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2, router_jitter_noise=0.2)
    ),
    "jitter and experts drawn at random": lambda: hf.PhimoeForCausalLM(
        hf.PhimoeConfig(**SIZES, num_local_experts=3, input_jitter_noise=0.1, router_jitter_noise=0.01)
    ),
    "jitter and dropout in nested configs": dbrx,
    "noise without a setting": lambda: with_norm(NoisyNorm),
    "another arithmetic": lambda: with_norm(OtherInTraining),
    "another arithmetic and dropout": lambda: with_dropout(with_norm(OtherInTraining)),
}


def build(what: str) -> Any:
    torch.manual_seed(0)
    return MODELS[what]()


def trainer(model: Any, folder: Path, tokenizer: Any, **fields: Any) -> Any:
    fields = {"reference": "frozen", "max_steps": 1, "learning_rate": 0.0, **fields}
    return tiny_trainer(folder, tokenizer, model, rows=preference_rows(8), **fields)


def first_log(model: Any, folder: Path, tokenizer: Any, **options: Any) -> dict[str, float]:
    made = trainer(model, folder, tokenizer, **options)
    made.train()
    return next(log for log in made.state.log_history if "loss" in log)


@pytest.mark.parametrize("reference", ["frozen", "cached"])
@pytest.mark.parametrize("what", MODELS)
def test_a_first_step_costs_log_two_without_divergence(
    tmp_path: Path, tokenizer: Any, what: str, reference: str
) -> None:
    model = build(what)
    gap = mode_gap(model)
    assert max(gap.noise, gap.arithmetic) > 1e-3, "the model tests nothing"
    log = first_log(model, tmp_path, tokenizer, reference=reference)
    assert log["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (log["kl/chosen"], log["kl/rejected"]) == (pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6))
    assert log["grad_norm"] > 1e-3


def test_dropout_that_was_asked_for_stays_and_is_reported(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="tdpo"):
        log = first_log(build("dropout read from the config"), tmp_path, tokenizer, disable_dropout=False)
    assert abs(log["loss"] - math.log(2)) > 1e-4 and log["kl/chosen"] > 1e-3
    assert sum("--disable_dropout false: the policy's hidden states differ" in line for line in caplog.messages) == 1


def test_what_is_switched_off_and_what_is_not_is_reported(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    lines = {}
    for what in ("dropout read from the config", "jitter and experts drawn at random", "another arithmetic"):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="tdpo"):
            model = build(what)
            trainer(model, tmp_path, tokenizer)
        lines[what] = [line for line in caplog.messages if "set to 0" in line or "evaluation mode" in line]
        if what.startswith("dropout"):
            assert (model.config.attention_dropout, model.config.hidden_dropout) == (0.0, 0.0)
        if what.startswith("jitter"):
            router = model.model.layers[0].mlp.router
            assert (router.input_jitter_noise, router.router_jitter_noise) == (0.0, 0.01), "evaluation uses the second"
    assert lines["dropout read from the config"] == [
        "--disable_dropout: set to 0 in the loaded model: config.hidden_dropout, config.attention_dropout"
    ]
    assert [line.split(" (")[0] for line in lines["jitter and experts drawn at random"]] == [
        "--disable_dropout: set to 0 in the loaded model: input_jitter_noise",
        "PhimoeForCausalLM computes other hidden states in training mode",
    ]
    assert lines["another arithmetic"] == []


def test_a_reference_cache_does_not_depend_on_dropout(tmp_path: Path, tokenizer: Any) -> None:
    """`tdpo cache-reference` reads the config as saved; a trainer that reads the cache has set its dropout to 0."""
    model = build("dropout read from the config")
    before = config_hash(model)
    trainer(model, tmp_path, tokenizer)
    assert model.config.hidden_dropout == 0.0 and config_hash(model) == before
    model.config.layer_norm_epsilon = 0.1
    assert config_hash(model) != before


def test_a_plain_models_config_keeps_its_dropout(tmp_path: Path, tokenizer: Any) -> None:
    """It is read once, when the modules are made, so there is no need to change what is saved."""
    model = make_model(VOCAB)
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    assert first_log(model, tmp_path, tokenizer)["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert model.config.attention_dropout == 0.1


def test_fine_tuning_switches_the_same_noise_off(tmp_path: Path, tokenizer: Any) -> None:
    for what in ("dropout read from the config", "jitter of a router"):
        model = build(what)
        args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, max_length=96)
        SFTTrainer(model, args, preference_rows(4), processing_class=tokenizer)
        gap = mode_gap(model)
        assert (gap.noise, gap.arithmetic) == (0.0, 0.0)


class FewBits(nn.Linear):
    """Repacks its weights as bitsandbytes' 4-bit layers do: gradients through them are zero afterwards."""

    support_avx512bf16_for_cpu = True
    packed = False

    def forward(self, states: Tensor) -> Tensor:
        if self.support_avx512bf16_for_cpu and not self.training and not states.requires_grad:
            self.packed = True
        output = super().forward(states)
        return output.detach() if self.packed else output


def few_bits() -> Any:
    model = make_model(VOCAB)
    for layer in model.model.layers:
        own = layer.mlp.down_proj
        layer.mlp.down_proj = FewBits(own.in_features, own.out_features, bias=False)
        layer.mlp.down_proj.weight = own.weight
    return model


def test_layers_of_few_bits_keep_their_gradients_whoever_loaded_them(tmp_path: Path, tokenizer: Any) -> None:
    plain = first_log(make_model(VOCAB), tmp_path, tokenizer)["grad_norm"]
    assert plain > 1e-2
    assert first_log(few_bits(), tmp_path, tokenizer)["grad_norm"] == pytest.approx(plain, rel=1e-5)
    policy = few_bits()
    score_pairs(policy, make_model(VOCAB, seed=1), random_pairs(vocab=VOCAB), objectives.dpo(0.3)).loss.sum().backward()
    assert policy.model.layers[0].mlp.down_proj.weight.grad.abs().max() > 1e-4


def test_weights_that_are_repacked_already_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    model = few_bits()
    model.model.layers[0].mlp.down_proj.weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)
    with pytest.raises(UserError, match="no gradient flows through them now: load the model again"):
        trainer(model, tmp_path, tokenizer)


@pytest.mark.parametrize("what", ["noise without a setting", "another arithmetic", "jitter of a router"])
def test_noise_on_the_embedding_stays_the_policys_alone(tmp_path: Path, tokenizer: Any, what: str) -> None:
    """NEFTune in every mode a policy may be trained in, against a reference that shares the policy's modules."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    logs = []
    for alpha in (None, 20.0):
        args = {"reference": "adapter_off", "neftune_noise_alpha": alpha}
        logs.append(first_log(get_peft_model(build(what), lora), tmp_path, tokenizer, **args))
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and logs[0]["kl/chosen"] < 1e-6
    assert abs(logs[1]["loss"] - math.log(2)) > 1e-4 and logs[1]["kl/chosen"] > 1e-3
    model = build(what)
    model.get_input_embeddings().neftune_noise_alpha = 20.0
    model.get_input_embeddings().register_forward_hook(neftune_post_forward_hook)
    prepare_reference_mode(model, [model], cached=False, disable=True)
    model.train()
    batch, reference = pack_padded(random_pairs(vocab=VOCAB)), LiveReference(model)
    with same_mode(model, reference):
        assert torch.equal(reference.states(batch), reference.states(batch))
    assert not torch.equal(response_states(model, batch), response_states(model, batch))
    assert model.get_input_embeddings().training


def test_scoring_keeps_the_mode_and_runs_the_reference_in_it() -> None:
    pairs, objective = random_pairs(vocab=VOCAB), objectives.tdpo1(0.3)
    model = build("another arithmetic").train()
    copied = copy.deepcopy(model).eval()
    scores = score_pairs(model, copied, pairs, objective)
    assert (scores.tokens.kl == 0).all() and model.training and not copied.training
    assert (score_pairs(model, model, pairs, objective).tokens.kl == 0).all()
    quiet = score_pairs(copied, copy.deepcopy(copied), pairs, objective)
    assert (quiet.tokens.kl == 0).all()
    assert (quiet.chosen_logp - scores.chosen_logp).abs().max() > 1e-3, "the modes differ"


def test_measuring_leaves_random_numbers_and_modes_alone() -> None:
    model = build("dropout read from the config").train()
    model.transformer.h[0].eval()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert mode_gap(model).noise > 1e-3
    assert torch.equal(torch.rand(3), expected)
    assert model.training and not model.transformer.h[0].training and model.transformer.h[1].training
    assert all(parameter.grad is None for parameter in model.parameters())
