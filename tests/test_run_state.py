"""Tests the state that a checkpoint keeps beside the Trainer's own, part by part."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_model, preference_rows
from peft import LoraConfig
from transformers import MixtralConfig, MixtralForCausalLM

from tdpo import SFTConfig, SFTTrainer, TDPOConfig, TDPOTrainer
from tdpo.train.base import RunCallback
from tdpo.train.metrics import Sums

ALONE: Any = SimpleNamespace(device=torch.device("cpu"), gather=lambda tensor: tensor)
OPTIONS: dict[str, Any] = {
    "use_cpu": True, "disable_tqdm": True, "max_length": 96, "per_device_train_batch_size": 4, "max_steps": 4,
    "logging_steps": 2, "logging_first_step": False, "save_steps": 1, "report_to": "none",
}  # fmt: skip


def test_the_mean_loss_of_a_log_is_over_the_steps_since_the_last() -> None:
    """The losses 2 and 4 of steps 1 and 2 were not logged before the run was cut; the next log is at step 3."""
    cut: Any = SimpleNamespace(_tr_loss=torch.tensor(6.0), _globalstep_last_logged=0)
    resumed: Any = SimpleNamespace(
        _tr_loss=torch.tensor(0.0), _globalstep_last_logged=2, _total_loss_scalar=0.0,
        is_fsdp_enabled=False, is_deepspeed_enabled=False,
    )  # fmt: skip
    before, after = RunCallback(cut), RunCallback(resumed)
    before._loaded = None  # training has begun
    after.load(json.loads(json.dumps(before.state())))
    assert after.state() == {"sum": 6.0, "step": 0}
    after.on_train_begin(None, None, None, make_model(8))
    resumed._tr_loss += 3.0
    assert resumed._tr_loss / (3 - resumed._globalstep_last_logged) == 3.0
    assert resumed._total_loss_scalar + resumed._tr_loss == 3.0, "train_loss is over the one step of this run"


def test_router_losses_are_averaged_over_batches_that_count() -> None:
    def columns(loss: float) -> dict[str, torch.Tensor]:
        return {"aux_loss": torch.tensor(loss), "batches": torch.ones(())}

    before, after = Sums(), Sums()
    before.add(columns(1.0))
    before.add(columns(float("nan")), 0.0)
    after.load(json.loads(json.dumps(before.state())))
    after.add(columns(4.0))
    assert SFTTrainer.metric_means(after.take(ALONE)) == {"aux_loss": 2.5}
    assert after.take(ALONE) == {}


def test_a_checkpoint_holds_every_part(tmp_path: Path, tokenizer: Any) -> None:
    args = TDPOConfig(output_dir=str(tmp_path), **OPTIONS)
    trainer = TDPOTrainer(make_model(len(tokenizer)), None, args, None, preference_rows(), None, tokenizer)
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-1" / "run_state_0.json").read_text())
    assert set(state["parts"]) == set(trainer.run_parts) == {"loss", "metrics", "logits_budget"}
    assert state["parts"]["metrics"]["pairs"] == 4 and state["parts"]["loss"]["step"] == 0
    assert state["pairs_per_step"] == 4 and state["processes"] == 1


def test_the_router_loss_of_a_resumed_log_is_that_of_an_uninterrupted_run(tmp_path: Path, tokenizer: Any) -> None:
    def trainer(folder: Path) -> SFTTrainer:
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
            output_router_logits=True, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        args = SFTConfig(output_dir=str(folder), **OPTIONS)
        return SFTTrainer(MixtralForCausalLM(config), args, preference_rows(), None, tokenizer, peft_config=lora)

    def router_losses(trainer: Any) -> list[float]:
        return [log["aux_loss"] for log in trainer.state.log_history if "aux_loss" in log]

    uninterrupted, resumed = trainer(tmp_path), trainer(tmp_path)
    uninterrupted.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert (
        router_losses(resumed) == pytest.approx(router_losses(uninterrupted), rel=1e-6)
        and len(router_losses(uninterrupted)) == 2
    )
