"""Terms of a model's own loss: the router loss, compared with TRL's and transformers', and terms of other kinds."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, preference_rows
from datasets import Dataset
from numeric_worlds import assert_same_gradients, gradients, random_pairs
from peft import LoraConfig
from tiny_training import tiny_config
from torch import Tensor
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tdpo import SFTConfig, SFTTrainer, TDPOConfig, TDPOTrainer, UserError, objectives
from tdpo.data.pack import pack_padded, pack_trees
from tdpo.models.own_loss import find_router_loss, warn_of_other_terms
from tdpo.models.reference import FrozenCopy
from tdpo.score import batch_loss
from tdpo.types import TokenisedPair

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts_per_tok": 2, "max_position_embeddings": 128, "initializer_range": 0.3,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "output_router_logits": True,
}  # fmt: skip


def mixtral(vocabulary: int, **options: Any) -> Any:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(vocab_size=vocabulary, num_local_experts=4, **(SIZES | options))).eval()


def qwen3_moe(vocabulary: int, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"num_experts": 8, "moe_intermediate_size": 16, "head_dim": 8, **SIZES}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=vocabulary, **(sizes | options))).eval()


MODELS = {"mixtral": mixtral, "qwen3_moe": qwen3_moe}


def config(folder: Path, kind: Any = TDPOConfig, **fields: Any) -> Any:
    return tiny_config(folder, kind, **{"per_device_train_batch_size": 4, "report_to": [], **fields})


def logs_of(trainer: Any, *names: str) -> list[list[float]]:
    return [[log[name] for name in names] for log in trainer.state.log_history if "loss" in log]


def assert_same_logs(ours: list[list[float]], theirs: list[list[float]], **tolerance: float) -> None:
    assert len(ours) == len(theirs) > 0
    for own, other in zip(ours, theirs, strict=True):
        assert own == pytest.approx(other, **tolerance)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("coefficient", [None, 0.02])
def test_the_router_loss_and_its_trajectory_are_trls(
    tmp_path: Path, tokenizer: Any, kind: str, coefficient: float | None
) -> None:
    """TRL pads rows and masks the padding, so the layout is padded rows."""
    trl = pytest.importorskip("trl", reason="TRL is not installed, so its router loss cannot be compared")
    model = MODELS[kind](len(tokenizer), router_aux_loss_coef=0.1)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    same = {
        "beta": 0.1, "per_device_train_batch_size": 8, "max_steps": 3, "optim": "sgd", "lr_scheduler_type": "constant",
        "router_aux_loss_coef": coefficient, "max_grad_norm": 0.0,
    }  # fmt: skip
    theirs = trl.DPOTrainer(
        model=copy.deepcopy(model),
        ref_model=copy.deepcopy(model),
        args=config(
            tmp_path / "trl", trl.DPOConfig, bf16=False, gradient_checkpointing=False,
            train_sampling_strategy="sequential", **same,
        ),
        train_dataset=Dataset.from_list(preference_rows(24)),
        processing_class=tokenizer,
    )  # fmt: skip
    rows = list(theirs.train_dataset)
    pairs = [TokenisedPair(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]
    theirs.train()
    ours = TDPOTrainer(
        model, None,
        config(
            tmp_path / "ours", objective="dpo", layout="padded", train_sampling_strategy="sequential",
            max_prompt_length=48, **same,
        ),
        None, pairs,
    )  # fmt: skip
    ours.train()
    names = ("loss", "aux_loss", "rewards/margins")
    assert_same_logs(logs_of(ours, *names), logs_of(theirs, *names), rel=1e-4, abs=1e-5)
    loss, aux, _ = logs_of(ours, *names)[0]
    assert loss == pytest.approx(0.693147 + (coefficient or 0.1) * aux, abs=1e-5) and aux > 1.5


def routed(model: Any, pairs: list[TokenisedPair]) -> Tensor:
    """The definition, each real position once: experts x sum over experts of (share of choices) x (mean probability).

    Prompts and responses run one sequence at a time; the layers' positions are taken together, as transformers does.
    """
    layers: list[list[Tensor]] = [[] for _ in range(model.config.num_hidden_layers)]
    for pair in pairs:
        for start, response in ((0, pair.chosen_ids), (len(pair.prompt_ids), pair.rejected_ids)):
            ids = torch.tensor([[*pair.prompt_ids, *response]])
            for layer, logits in enumerate(model.model(input_ids=ids, use_cache=False).router_logits):
                layers[layer].append(logits[start:])
    logits = torch.cat([part for parts in layers for part in parts]).float()
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(2).indices, 1.0)
    return logits.shape[1] * (chosen.mean(0) * logits.softmax(-1).mean(0)).sum()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_a_tree_counts_every_position_once_with_the_gradient_of_the_definition(kind: str, backend: str) -> None:
    model = MODELS[kind](50)
    pairs, reference = random_pairs(), FrozenCopy.of(model)
    router = find_router_loss(model, 5.0)
    options = objectives.dpo(0.3), backend
    batch = pack_trees(pairs, every_token=True)
    total, scores = batch_loss(model, reference, batch, *options, router=router)
    plain, _ = batch_loss(model, reference, pack_trees(pairs), *options)
    expected = routed(model, pairs)
    assert scores.aux_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert total.item() - plain.item() == pytest.approx(5.0 * len(pairs) * expected.item(), rel=1e-5)
    assert scores.loss.sum().item() == pytest.approx(total.item(), rel=1e-6)
    assert_same_gradients(gradients(total - plain, model), gradients(5.0 * len(pairs) * expected, model), rtol=1e-3)


def test_padding_does_not_count(tokenizer: Any) -> None:
    """Rows of different lengths: as the model's own forward with the attention mask, not without."""
    model, pairs = mixtral(50), random_pairs()
    batch = pack_padded(pairs)
    router = find_router_loss(model)
    assert router is not None and router.coefficient == 0.001
    _, scores = batch_loss(model, FrozenCopy.of(model), batch, objectives.dpo(0.3), router=router)
    mask = (batch.tree_ids >= 0).long()
    masked, unmasked = (model(input_ids=batch.input_ids, attention_mask=m).aux_loss.item() for m in (mask, None))
    assert scores.aux_loss.item() == pytest.approx(masked, rel=1e-5) and abs(masked - unmasked) > 1e-3


def test_steps_add_the_mean_over_their_micro_batches_whatever_the_reference(tmp_path: Path, tokenizer: Any) -> None:
    """The term at learning rate 0: log 2 + coefficient x aux_loss, in training and in evaluation, and in LoRA."""
    rows = preference_rows(24)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    seen = []
    for name, peft_config, options in (
        ("frozen", None, {}), ("accumulated", None, {"gradient_accumulation_steps": 3}),
        ("adapter_off", lora, {}), ("cached", None, {"reference": "cached"}),
        ("checkpointing", None, {"gradient_checkpointing": True}),
    ):  # fmt: skip
        args = config(tmp_path / name, learning_rate=0.0, max_prompt_length=48, max_steps=2, **options)
        model = mixtral(len(tokenizer), router_aux_loss_coef=0.5)
        trainer = TDPOTrainer(model, None, args, None, rows, rows[:5], tokenizer, peft_config=peft_config)
        trainer.train()
        for loss, aux, norm in logs_of(trainer, "loss", "aux_loss", "grad_norm"):
            assert loss == pytest.approx(0.693147 + 0.5 * aux, abs=1e-5) and 1.5 < aux < 4 and norm > 1e-3
        seen.append((name, logs_of(trainer, "aux_loss", "grad_norm")[0]))
        held_out = trainer.evaluate()
        assert held_out["eval_loss"] == pytest.approx(0.693147 + 0.5 * held_out["eval_aux_loss"], abs=1e-5)
    values = dict(seen)
    assert values["cached"] == pytest.approx(values["frozen"], rel=1e-5)
    assert values["checkpointing"] == pytest.approx(values["frozen"], rel=1e-5), "the router's gradient is there"


def test_the_config_asks_for_it_and_the_option_decides(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def trained(model: Any, **options: Any) -> dict[str, float]:
        caplog.clear()
        args = config(tmp_path, learning_rate=0.0, max_steps=1, max_prompt_length=48, **options)
        trainer = TDPOTrainer(model, None, args, None, preference_rows(8), None, tokenizer)
        trainer.train()
        return trainer.state.log_history[0]

    vocabulary = len(tokenizer)
    silent = {"output_router_logits": False, "router_aux_loss_coef": 0.25}
    assert trained(mixtral(vocabulary))["aux_loss"] > 1.5 and not warnings_of(caplog)
    off = trained(mixtral(vocabulary), router_aux_loss_coef=0.0)
    assert "aux_loss" not in off and off["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert "aux_loss" not in trained(mixtral(vocabulary, **silent))
    (said,) = warnings_of(caplog)
    assert "output_router_logits is off in its config; --router_aux_loss_coef 0.25 adds it" in said
    assert "aux_loss" not in trained(mixtral(vocabulary, **silent), router_aux_loss_coef=0.0) and not warnings_of(
        caplog
    )
    on = trained(mixtral(vocabulary, **silent), router_aux_loss_coef=0.5)
    assert on["loss"] == pytest.approx(0.693147 + 0.5 * on["aux_loss"], abs=1e-5) and on["aux_loss"] > 1.5
    plain = make_model(vocabulary)
    plain.config.output_router_logits = True  # a key without effect
    assert "aux_loss" not in trained(plain)
    for model in (plain, make_model(vocabulary)):
        with pytest.raises(UserError, match=r"--router_aux_loss_coef 0\.1: LlamaForCausalLM is not a mixture"):
            trained(model, router_aux_loss_coef=0.1)
    with pytest.raises(UserError, match="--router_aux_loss_coef must be at least 0, got -1"):
        config(tmp_path, router_aux_loss_coef=-1.0)
    with pytest.raises(UserError, match="with use_reentrant the router loss has no gradient"):
        trained(mixtral(vocabulary), gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.levelno == logging.WARNING and "ForCausalLM" in r.message]


def test_fine_tuning_has_the_models_own_loss(tmp_path: Path, tokenizer: Any) -> None:
    """One row a batch, so that the model's forward with labels computes the same."""
    row = {"prompt": "The river and the garden were near", "completion": " the window, the teacher."}
    model = mixtral(len(tokenizer), router_aux_loss_coef=0.1)
    args = config(tmp_path, SFTConfig, learning_rate=0.0, max_steps=1, per_device_train_batch_size=1)
    trainer = SFTTrainer(copy.deepcopy(model), args, [row], None, tokenizer)
    example = trainer.train_dataset[0]
    trainer.train()
    ids = torch.tensor([[*example.prompt_ids, *example.response_ids]])
    labels = ids.clone()
    labels[:, : len(example.prompt_ids)] = -100
    output = model(input_ids=ids, labels=labels)
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    assert log["aux_loss"] == pytest.approx(output.aux_loss.item(), rel=1e-5)


def test_other_terms_of_a_models_own_loss_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Bamba's z-loss; nothing for models whose loss is cross-entropy and router loss."""
    sizes = {
        "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_d_state": 8,
        "attn_layer_indices": [1], **SIZES,
    }  # fmt: skip
    sizes = {
        name: value for name, value in sizes.items() if name not in ("num_experts_per_tok", "output_router_logits")
    }
    for coefficient in (0.0, 0.01):
        caplog.clear()
        torch.manual_seed(0)
        model = BambaForCausalLM(BambaConfig(vocab_size=50, z_loss_coefficient=coefficient, **sizes))
        random, modes = torch.get_rng_state(), [module.training for module in model.modules()]
        warn_of_other_terms(model)
        assert torch.equal(torch.get_rng_state(), random)
        assert [module.training for module in model.modules()] == modes
        assert len(warnings_of(caplog)) == (coefficient > 0)
    assert "its own loss has a term beyond the cross-entropy of its logits (0.219 on" in warnings_of(caplog)[0]
    caplog.clear()
    for model in (mixtral(50), qwen3_moe(50, router_aux_loss_coef=0.5), make_model(50), make_model(50).bfloat16()):
        warn_of_other_terms(model)
    assert not warnings_of(caplog)
