"""Situations of training that users meet where several features work together, each with its numbers."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import make_model, preference_rows
from numeric_worlds import random_pairs
from peft import LoraConfig, get_peft_model
from test_multimodal import build, vision_tokenizer
from test_own_loss import mixtral, qwen3_moe
from tiny_models import tiny_model
from tiny_training import tiny_config
from torch import Tensor, nn
from transformers.integrations.integration_utils import is_tensorboard_available

from tdpo import SFTConfig, SFTTrainer, TDPOConfig, TDPOTrainer, UserError, objectives, score_pairs
from tdpo.models.adapters import with_adapter
from tdpo.models.own_loss import find_router_loss
from tdpo.models.policy import body_of, head_of
from tdpo.train.preflight import check_call

MODELS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: mixtral(400),
    "qwen3_moe": lambda: qwen3_moe(400),
    "qwen2_5_vl": lambda: build("qwen2_5_vl"),
    "tied": lambda: make_model(400),
}


def options(folder: Path, kind: Any = TDPOConfig, **fields: Any) -> Any:
    return tiny_config(folder, kind, **{"max_steps": 4, "per_device_train_batch_size": 4, **fields})


def trainer_of(model: Any, folder: Path, **more: Any) -> TDPOTrainer:
    rows = preference_rows(16)
    held_out = rows[:5] if "eval_strategy" in more else None
    return TDPOTrainer(model, None, options(folder, **more), None, rows, held_out, vision_tokenizer())


def logged(trainer: Any, name: str = "loss") -> list[float]:
    return [log[name] for log in trainer.state.log_history if name in log]


# --- weights come back whatever their names on disk are ---------------------------------------------------------------
@pytest.mark.parametrize("what", MODELS)
def test_a_resumed_run_goes_on_with_the_trained_weights(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trainer_of(MODELS[what](), tmp_path / "whole")
    whole.train()
    half = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(MODELS[what](), tmp_path / "half", max_steps=2, **half).train()
    resumed = trainer_of(MODELS[what](), tmp_path / "half", **half)
    with caplog.at_level(logging.WARNING):
        resumed.train(True)
    assert logged(resumed) == logged(whole)
    assert logged(whole)[0] > logged(whole)[2] + 0.1
    assert all(
        torch.equal(own, other) for own, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
    )
    assert "keys in the checkpoint" not in caplog.text


@pytest.mark.parametrize("what", ["mixtral", "qwen2_5_vl"])
def test_the_best_model_is_loaded_whatever_its_names_on_disk_are(tmp_path: Path, what: str) -> None:
    best = trainer_of(
        MODELS[what](), tmp_path, max_steps=3, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    best.train()
    first, *_, last = logged(best, "eval_loss")
    assert str(best.state.best_model_checkpoint).endswith("checkpoint-1") and first > last + 0.05
    assert best.evaluate()["eval_loss"] == pytest.approx(first, rel=1e-6)


def test_a_checkpoint_that_lacks_weights_is_not_filled_at_random(tmp_path: Path) -> None:
    half = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(MODELS["mixtral"](), tmp_path, max_steps=2, **half).train()
    larger = mixtral(400, num_hidden_layers=3)
    with pytest.raises(UserError, match=r"checkpoint-2 lacks weights of MixtralForCausalLM: model\.layers\.2\."):
        trainer_of(larger, tmp_path, **half).train(True)


# --- whatever a model raises on a probe is one message ----------------------------------------------------------------
class Fails(nn.Module):
    """A normalisation that raises as an assertion of a model would, in one of the modes."""

    def __init__(self, norm: nn.Module, in_training: bool) -> None:
        super().__init__()
        self.norm, self.in_training = norm, in_training

    def forward(self, states: Tensor) -> Tensor:
        assert not (self.training or not self.in_training), "chunks of 16 are needed\nand more lines"
        return self.norm(states)


def failing(in_training: bool) -> Any:
    model = make_model(400)
    model.model.layers[0].input_layernorm = Fails(model.model.layers[0].input_layernorm, in_training)
    return model


@pytest.mark.parametrize("in_training", [True, False])
def test_an_error_within_a_probe_names_the_model_and_its_first_line(
    tmp_path: Path, tokenizer: Any, in_training: bool
) -> None:
    message = r"^LlamaForCausalLM fails on a short probe: AssertionError: chunks of 16 are needed$"
    rows, pairs, objective = preference_rows(8), random_pairs(count=2), objectives.dpo(0.1)
    entrances: list[Callable[[], Any]] = [
        lambda: TDPOTrainer(failing(in_training), None, options(tmp_path), None, rows, None, tokenizer),
        lambda: SFTTrainer(failing(in_training), options(tmp_path, SFTConfig), rows, None, tokenizer),
        lambda: score_pairs(failing(in_training).train(), make_model(400), pairs, objective),
    ]
    if not in_training:
        reference = [
            lambda: TDPOTrainer(make_model(400), failing(False), options(tmp_path), None, rows, None, tokenizer)
        ]
        entrances += [*reference, lambda: score_pairs(make_model(400), failing(False), pairs, objective)]
    for enter in entrances:
        with pytest.raises(UserError, match=message):
            enter()


def test_a_model_that_trains_in_whole_chunks_alone_is_refused_before_training(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"^ReformerModelWithLMHead fails on a short probe: .* chunk_length 16"):
        TDPOTrainer(tiny_model("reformer"), None, options(tmp_path), None, random_pairs(count=4))


def test_a_model_without_weights_is_named(tmp_path: Path, tokenizer: Any) -> None:
    with torch.device("meta"):
        model = make_model(400)
    with pytest.raises(UserError, match=r"^LlamaForCausalLM is on the meta device and has no weights"):
        TDPOTrainer(model, None, options(tmp_path), None, preference_rows(8), None, tokenizer)


# --- bodies and heads -------------------------------------------------------------------------------------------------
def test_a_body_is_what_holds_the_embedding_but_not_the_head() -> None:
    class Named(hf.LlamaForCausalLM):
        base_model_prefix = "language_model"

    plain = make_model(50)
    model = Named(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    assert model.base_model is model and body_of(model) is model.model
    pairs = random_pairs(count=3)
    scores = [
        score_pairs(policy, make_model(50, seed=1), pairs, objectives.tdpo1(0.3)).loss for policy in (model, plain)
    ]
    assert torch.equal(*scores) and scores[0].std() > 0.1


def test_a_hook_that_changes_what_the_head_receives_is_refused() -> None:
    model = make_model(50)
    model.lm_head.register_forward_pre_hook(lambda layer, inputs: (2 * inputs[0],))
    with pytest.raises(UserError, match="LlamaForCausalLM: hidden states times head differ"):
        head_of(model)


# --- messages ---------------------------------------------------------------------------------------------------------
def test_a_coefficient_that_no_forward_uses_is_not_offered(caplog: pytest.LogCaptureFixture) -> None:
    llama4 = tiny_model("llama4_text")
    assert llama4.config.router_aux_loss_coef > 0 and llama4.config.output_router_logits is False
    with caplog.at_level(logging.WARNING):
        assert find_router_loss(llama4) is None
        assert "router" not in caplog.text
        assert find_router_loss(mixtral(50, output_router_logits=False)) is None
    assert "--router_aux_loss_coef 0.001 adds it" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("loss_type", r"Use 'objective': `sigmoid` is `dpo`.*pass args=TDPOConfig\(objective=\.\.\.\)"),
        ("precompute_ref_log_probs", r"Use 'reference_cache'.*args=TDPOConfig\(reference_cache=\.\.\.\)"),
        ("max_target_length", r"Use 'max_length'.*args=TDPOConfig\(max_length=\.\.\.\)"),
        ("label_smoothing", r"Use 'epsilon': with `objective` `robust`"),
        ("is_encoder_decoder", r"It is read from the checkpoint; leave it out\.$"),
        ("force_use_ref_model", r"a ref_model that is passed is always used"),
        ("train_data", r"Did you mean 'train_dataset'\?$"),
    ],
)
def test_old_arguments_of_trls_trainer_name_their_counterpart(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_call(TDPOConfig, None, None, {name: 1}, inspect.signature(TDPOTrainer).parameters)


# --- what a run cannot use is named before it starts ------------------------------------------------------------------
@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("no-such-tracker", r"^--report_to: no-such-tracker is not supported, only "),
        ("tensorboard", "^--report_to: .*installed"),
    ],
)
def test_a_tracker_that_is_not_there_is_one_message(tmp_path: Path, tokenizer: Any, wanted: str, message: str) -> None:
    if wanted == "tensorboard" and is_tensorboard_available():
        pytest.skip("tensorboard is installed")
    for kind, trainer in ((TDPOConfig, TDPOTrainer), (SFTConfig, SFTTrainer)):
        with pytest.raises(UserError, match=message):
            trainer(
                make_model(len(tokenizer)), args=options(tmp_path, kind, report_to=[wanted]),
                train_dataset=preference_rows(4), processing_class=tokenizer,
            )  # fmt: skip


@pytest.mark.parametrize("collator", [hf.default_data_collator, lambda rows: rows[0].nothing])
def test_a_collator_of_another_trainer_is_named(tmp_path: Path, tokenizer: Any, collator: Any) -> None:
    model = make_model(len(tokenizer))
    with pytest.raises(UserError, match=r"^data_collator: .* does not make batches to train on"):
        TDPOTrainer(model, None, options(tmp_path), collator, preference_rows(4), None, tokenizer)


@pytest.mark.parametrize("reference", ["frozen", "cached"])
def test_a_head_whose_weight_is_computed_is_trained(tmp_path: Path, tokenizer: Any, reference: str) -> None:
    def normalised() -> Any:
        model = make_model(len(tokenizer))
        model.lm_head = nn.Linear(32, len(tokenizer), bias=False)
        model.lm_head.weight.data = model.model.embed_tokens.weight.detach().clone()
        nn.utils.parametrizations.weight_norm(model.lm_head)
        return model

    losses = []
    for folder, more in (("fused", {"reference": reference}), ("naive", {"backend": "naive"})):
        args = options(tmp_path / folder, max_steps=2, **more)
        trainer = TDPOTrainer(normalised(), None, args, None, preference_rows(8), None, tokenizer)
        trainer.train()
        losses.append(logged(trainer))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0][0] == pytest.approx(0.693147, abs=1e-6) and losses[0][1] < 0.6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"decay": 1}}, "linear: .*unexpected .*'decay'"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr: .*min_lr"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "warmup_stable_decay: .*'num_decay_steps'"),
    ],
)
def test_a_schedule_that_cannot_be_made_is_named_before_training(
    tmp_path: Path, tokenizer: Any, given: dict[str, Any], message: str
) -> None:
    model, rows = make_model(len(tokenizer)), preference_rows(4)
    with pytest.raises(UserError, match=rf"^--lr_scheduler_type {message}.*--lr_scheduler_kwargs"):
        TDPOTrainer(model, None, options(tmp_path, **given), None, rows, None, tokenizer)
    needed = {"cosine_with_min_lr": {"min_lr": 1e-3}, "warmup_stable_decay": {"num_decay_steps": 2}}
    args = options(tmp_path, **given | {"lr_scheduler_kwargs": needed.get(given["lr_scheduler_type"])})
    TDPOTrainer(model, None, args, None, rows, None, tokenizer).train()


def test_a_negative_amount_of_noise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--neftune_noise_alpha must be at least 0, got -5"):
        options(tmp_path, neftune_noise_alpha=-5)


def test_names_that_an_adapter_passes_over_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="tdpo"):
        with_adapter(make_model(50), LoraConfig(target_modules=["q_proj", "mlp.up_proj"], modules_to_save=["lm_head"]))
        assert caplog.text == ""
        with_adapter(make_model(50), LoraConfig(target_modules=["q_proj", "up_porj"], modules_to_save=["score"]))
    assert [record.getMessage() for record in caplog.records] == [
        "target_modules: LlamaForCausalLM has no module up_porj",
        "modules_to_save: LlamaForCausalLM has no module score",
    ]


def test_an_adapter_that_would_not_be_trained_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    rows = preference_rows(4)
    merged = get_peft_model(make_model(len(tokenizer)), LoraConfig(target_modules=["q_proj"]))
    merged.merge_adapter()
    invoked = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
    cases = [
        (merged, None, r"^the adapter is merged into the base \(merge_adapter\)"),
        (make_model(len(tokenizer)), invoked, r"^peft_config: alora_invocation_tokens is not available"),
    ]
    for model, adapter, message in cases:
        for reference in ("auto", "frozen"):
            args = options(tmp_path, reference=reference)
            with pytest.raises(UserError, match=message):
                TDPOTrainer(model, None, args, None, rows, None, tokenizer, peft_config=adapter)
        with pytest.raises(UserError, match=message):
            SFTTrainer(model, options(tmp_path, SFTConfig), rows, None, tokenizer, peft_config=adapter)
    merged.unmerge_adapter()
    trainer = TDPOTrainer(merged, None, options(tmp_path, max_steps=2), None, rows, None, tokenizer)
    trainer.train()
    assert logged(trainer)[1] < logged(trainer)[0] - 0.01


def test_a_repository_that_cannot_be_made_is_one_message(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no network\nand more lines")

    monkeypatch.setattr(hf.Trainer, "init_hf_repo", offline)
    model, args = make_model(len(tokenizer)), options(tmp_path, push_to_hub=True, hub_model_id="me/mine")
    with pytest.raises(UserError, match=r"^--push_to_hub: no repository can be made: ConnectionError: no network$"):
        TDPOTrainer(model, None, args, None, preference_rows(4), None, tokenizer)


def test_an_interrupted_run_leaves_no_noise_on_the_model(tmp_path: Path, tokenizer: Any) -> None:
    class Interrupt(hf.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    model, rows = make_model(len(tokenizer)), preference_rows(8)
    noisy = options(tmp_path, neftune_noise_alpha=50.0)
    with pytest.raises(KeyboardInterrupt):
        TDPOTrainer(model, None, noisy, None, rows, None, tokenizer, callbacks=[Interrupt()]).train()
    trainer = TDPOTrainer(model, None, options(tmp_path, max_steps=1), None, rows, None, tokenizer)
    trainer.train()
    assert logged(trainer) == pytest.approx([0.693147], abs=1e-6) and logged(trainer, "kl/chosen") == [0.0]
