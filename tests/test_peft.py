"""Adapters on tied weights, trained tokens and merging: every value is compared with peft's own forward."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, preference_rows
from numeric_worlds import (
    BACKENDS,
    assert_same_gradients,
    gradients,
    plain_pair_loss,
    plain_pair_stats,
    random_pairs,
)
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from tdpo import TDPOConfig, TDPOTrainer, objectives, ops, score_pairs
from tdpo.cli import main
from tdpo.models.adapters import merged

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model .* `tie_word_embeddings=True`", "ignore:Setting `save_embedding"
)

TRAINED_TOKENS = {
    "tied": (True, [5, 6, 7, 30]),
    "head of a tied model": (True, {"lm_head": [5, 6, 7, 30]}),
    "embedding of an untied model": (False, {"embed_tokens": [5, 6, 30]}),
    "head of an untied model": (False, {"lm_head": [5, 6, 30]}),
    "both of an untied model": (False, {"lm_head": [5, 30], "embed_tokens": [5, 6]}),
}


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})


def llama(vocabulary: int, tied: bool = True) -> Any:
    model = make_model(vocabulary)
    if tied:
        return model
    model.config.tie_word_embeddings = False
    torch.manual_seed(0)
    return type(model)(model.config).eval()


def adapted(model: Any, config: LoraConfig, **options: Any) -> Any:
    """The model in an adapter whose every weight has left its start."""
    policy = get_peft_model(model, config, **options).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return policy


def config(folder: Path, **options: Any) -> TDPOConfig:
    defaults = {
        "learning_rate": 1e-2, "per_device_train_batch_size": 4, "max_length": 96, "max_prompt_length": 48,
        "max_steps": 4, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    return TDPOConfig(output_dir=str(folder), **{**defaults, **options})


def curve(trainer: TDPOTrainer) -> list[list[float]]:
    names = ("loss", "grad_norm", "kl/chosen", "rewards/margins")
    return [[log[name] for name in names] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tied", "tokens"), TRAINED_TOKENS.values(), ids=TRAINED_TOKENS)
def test_trained_tokens_have_the_loss_and_gradients_of_pefts_own_logits(
    tied: bool, tokens: Any, backend: ops.Backend
) -> None:
    reference = llama(50, tied).double()
    settings = lora(trainable_token_indices=tokens)
    policy = adapted(copy.deepcopy(reference), settings, autocast_adapter_dtype=False).double()
    pairs = random_pairs()
    theirs = plain_pair_loss("tdpo1", plain_pair_stats(policy, reference, pairs), 0.3).mean()
    expected = gradients(theirs, policy)
    assert any(gradient.abs().max() > 1e-4 for name, gradient in expected.items() if "trainable_tokens" in name)
    for layout in ("padded", "tree"):
        ours = score_pairs(policy, reference, pairs, objectives.tdpo1(0.3), layout, backend).loss.mean()
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
        assert abs(ours.item() - 0.6931) > 1e-3
        assert_same_gradients(gradients(ours, policy), expected, rtol=1e-6)


def test_trained_tokens_give_one_trajectory_with_every_reference(tmp_path: Path, tokenizer: Any) -> None:
    curves = {}
    for reference in ("adapter_off", "frozen", "cached"):
        trainer = TDPOTrainer(
            llama(len(tokenizer)), None, config(tmp_path / reference, reference=reference), None, preference_rows(8),
            None, tokenizer, peft_config=lora(trainable_token_indices=[5, 6, 7, 300]),
        )  # fmt: skip
        trainer.train()
        curves[reference] = curve(trainer)
    assert curves["frozen"][0][0] == pytest.approx(0.693147, abs=1e-6) and curves["frozen"][-1][2] > 1e-4
    for reference in ("adapter_off", "cached"):
        for ours, theirs in zip(curves[reference], curves["frozen"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


MERGED = {
    "embedding": ({"target_modules": ["embed_tokens"]}, False),
    "embedding and attention, rsLoRA": ({"target_modules": ["embed_tokens", "q_proj"], "use_rslora": True}, False),
    "head": ({"target_modules": ["lm_head"]}, False),
    "embedding and head, apart": ({"target_modules": ["embed_tokens", "lm_head"]}, False),
    "embedding and head, as one": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "DoRA on the embedding": ({"target_modules": ["embed_tokens"], "use_dora": True}, False),
    "DoRA on the head": ({"target_modules": ["lm_head"], "use_dora": True}, False),
    "embedding saved whole": ({"modules_to_save": ["embed_tokens"]}, False),
    "head saved whole": ({"modules_to_save": ["lm_head"]}, False),
    "both saved whole": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "tokens of both": ({"trainable_token_indices": [5, 6, 7]}, True),
    "tokens of the head": ({"trainable_token_indices": {"lm_head": [5, 6, 7]}}, False),
    "attention alone": ({}, True),
}


def assert_reloads_as(folder: Path, model: Any, logits: torch.Tensor) -> Any:
    """What the folder holds gives these logits, relative to the largest, as the model in memory does."""
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    for plain in (model, reloaded):
        error = (plain(input_ids=torch.arange(3, 40)[None]).logits - logits).abs().max() / logits.abs().max()
        assert error < 1e-5
    return reloaded


@pytest.mark.parametrize(("options", "tied"), MERGED.values(), ids=MERGED)
def test_a_tied_model_merged_and_reloaded_equals_its_adapter(
    tmp_path: Path, options: dict[str, Any], tied: bool
) -> None:
    """Head and embedding stay one weight only where the adapter changed both alike."""
    policy = adapted(make_model(50), lora(**options))
    logits = policy(input_ids=torch.arange(3, 40)[None]).logits.detach()
    plain = merged(policy)
    plain.save_pretrained(tmp_path)
    reloaded = assert_reloads_as(tmp_path, plain, logits)
    assert (reloaded.lm_head.weight is reloaded.model.embed_tokens.weight) == tied
    assert reloaded.config.tie_word_embeddings == tied


def test_merging_takes_every_active_adapter_and_other_architectures(tmp_path: Path) -> None:
    """Two adapters at once; a scaled embedding with a capped head; an embedding under another name."""
    two = adapted(make_model(50), lora(target_modules=["embed_tokens", "q_proj"]))
    two.add_adapter("second", lora(target_modules=["lm_head", "embed_tokens"], init_lora_weights=False))
    two.base_model.set_adapter(["default", "second"])
    gemma = Gemma2Config(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    gpt2 = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    for name, policy in {
        "two": two.eval(),
        "gemma": adapted(Gemma2ForCausalLM(gemma), lora(target_modules=["embed_tokens", "q_proj"])),
        "gpt2": adapted(GPT2LMHeadModel(gpt2), lora(target_modules=["wte", "c_attn"], fan_in_fan_out=True)),
    }.items():
        logits = policy(input_ids=torch.arange(3, 40)[None]).logits.detach()
        plain = merged(policy)
        plain.save_pretrained(tmp_path / name)
        assert_reloads_as(tmp_path / name, plain, logits)


def test_the_command_merges_an_adapter_on_a_tied_embedding(tmp_path: Path, model_folder: Path) -> None:
    policy = adapted(AutoModelForCausalLM.from_pretrained(model_folder), lora(target_modules=["embed_tokens"]))
    policy.save_pretrained(tmp_path / "adapter")
    logits = policy(input_ids=torch.arange(3, 40)[None]).logits.detach()
    arguments = ["--model_name_or_path", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")]
    assert main(["merge", *arguments]) == 0
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(reloaded(input_ids=torch.arange(3, 40)[None]).logits, logits, rtol=1e-5, atol=1e-5)
