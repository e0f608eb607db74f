"""A run that stops before its end leaves what it resumes from, and resumes only with what fits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, preference_rows
from peft import LoraConfig
from runs import history, weights
from tiny_training import tiny_config, tiny_trainer, train_tiny
from transformers import EarlyStoppingCallback

from tdpo import SFTConfig, SFTTrainer, TDPOConfig, TDPOTrainer, UserError
from tdpo.errors import Stopped
from tdpo.train import checkpointing
from tdpo.train.base import place

EVALUATED = {"eval_rows": preference_rows(8), "eval_strategy": "steps", "eval_steps": 1}
WORST = {"metric_for_best_model": "loss", "greater_is_better": True}
"""The loss falls, so that the first step is the best one."""


def stop(trainer: TDPOTrainer, step: int) -> str:
    """Trains until a signal comes before a step's end; returns the message of the stop."""
    poll = trainer.stop_request.poll

    def poll_and_stop() -> int:
        if trainer.state.global_step >= step - 1:
            trainer.stop_request.code = 143
        return poll()

    trainer.stop_request.poll = poll_and_stop  # type: ignore[method-assign]
    trainer.train()
    with pytest.raises(Stopped) as stopped:
        trainer.stop_request.raise_if_stopped(trainer.state)
    return str(stopped.value)


def complete(folder: Path) -> list[str]:
    return [path.name for path in checkpointing.checkpoints(folder) if not checkpointing.find_defect(path)]


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, **WORST, **EVALUATED}, [1, 4]),
        ({"save_strategy": "best", **WORST, **EVALUATED}, [1, 4]),
        ({"save_strategy": "steps", "save_steps": 3, "save_only_model": True}, [3, 4]),
        ({"save_strategy": "no"}, [4]),
    ],
    ids=["a limit of one", "the best alone", "models alone", "none"],
)
def test_what_a_stop_saved_is_there_and_resumes(
    options: dict[str, Any], left: list[int], tokenizer: Any, tmp_path: Path
) -> None:
    trainer = tiny_trainer(tmp_path, tokenizer, max_steps=6, **options)
    assert "saved checkpoint-4" in stop(trainer, 4)
    assert complete(tmp_path) == [f"checkpoint-{step}" for step in left]
    newest, passed = checkpointing.latest_complete(tmp_path)
    assert newest == tmp_path / "checkpoint-4" and not passed
    assert trainer.args.save_only_model == bool(options.get("save_only_model"))
    resumed = tiny_trainer(tmp_path, tokenizer, max_steps=6, **options)
    resumed.train(True)
    assert resumed.state.global_step == 6


@pytest.mark.parametrize("step", [2, 6])
def test_a_stop_in_an_epoch_or_at_its_end_changes_no_evaluation(step: int, tokenizer: Any, tmp_path: Path) -> None:
    def trainer(folder: Path) -> TDPOTrainer:
        return tiny_trainer(
            folder, tokenizer, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=4,
            eval_rows=preference_rows(8), eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
            callbacks=[EarlyStoppingCallback(5)], **WORST,
        )  # fmt: skip

    whole, parts = trainer(tmp_path / "whole"), trainer(tmp_path / "parts")
    whole.train()
    stop(parts, step)
    assert complete(tmp_path / "parts") == [f"checkpoint-{step}"]
    assert parts.state.best_global_step == (None if step == 2 else 6)
    parts = trainer(tmp_path / "parts")
    parts.train(True)
    for one in (whole, parts):
        one.save_state()
        one.save_model()
    assert history(tmp_path / "parts") == history(tmp_path / "whole")
    both = [weights(tmp_path / name) for name in ("parts", "whole")]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[1])


LORA = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({"r": 4}, {"r": 8}, "written with r of the adapter 4, now it is 8"),
        (
            {"r": 4},
            {"r": 4, "target_modules": ["q_proj"]},
            r"target_modules of .* \['q_proj', 'v_proj'\], now",
        ),
        ({"r": 4}, {"r": 4, "use_dora": True}, "use_dora of the adapter False, now it is True"),
        ({"r": 4}, {"r": 4, "lora_alpha": 64}, "lora_alpha of the adapter 8, now it is 64"),
        (None, {"r": 4}, "written with adapters none, now it is default"),
        ({"r": 4}, None, "written with adapters default, now it is none"),
    ],
)
def test_another_adapter_is_refused(before: Any, after: Any, message: str, tokenizer: Any, tmp_path: Path) -> None:
    configs = [None if given is None else LoraConfig(**{**LORA, **given}) for given in (before, after)]
    train_tiny(tmp_path, tokenizer, max_steps=1, save_strategy="steps", save_steps=1, peft_config=configs[0])
    with pytest.raises(UserError, match=message):
        tiny_trainer(tmp_path, tokenizer, max_steps=2, peft_config=configs[1]).train(True)


def test_another_optimizer_is_refused_and_another_rate_reported(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_tiny(tmp_path, tokenizer, max_steps=1, save_strategy="steps", save_steps=1, learning_rate=1e-2)
    with pytest.raises(UserError, match="written with --optim adamw_torch, now it is rmsprop"):
        tiny_trainer(tmp_path, tokenizer, max_steps=2, optim="rmsprop").train(True)
    for optim in ("adamw_torch", "adamw_torch_fused"):  # they share their states
        tiny_trainer(tmp_path, tokenizer, max_steps=2, optim=optim).train(True)
    trainer = tiny_trainer(tmp_path, tokenizer, max_steps=2, learning_rate=1e-4)
    with caplog.at_level(logging.WARNING, "tdpo"):
        trainer.train(True)
    assert "continues its schedule with a learning rate of 0.01; --learning_rate 0.0001 has no effect" in caplog.text
    assert [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log] == [1e-2, 1e-2]


def test_the_newest_checkpoint_is_the_one_written_last(tokenizer: Any, tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 2}
    train_tiny(tmp_path, tokenizer, max_steps=4, **saved)
    second = str(tmp_path / "checkpoint-2")
    again = tiny_trainer(tmp_path, tokenizer, max_steps=6, resume_from_checkpoint=second, **saved)
    stop(again, 3)
    assert checkpointing.latest_complete(tmp_path)[0] == tmp_path / "checkpoint-3"  # 4 is of the abandoned run
    both = tiny_config(tmp_path, resume=True, resume_from_checkpoint=second)
    with pytest.raises(UserError, match="--resume and --resume_from_checkpoint contradict each other"):
        checkpointing.find_checkpoint(both, None)


@pytest.mark.parametrize("best", [False, True])
def test_the_card_has_the_results_of_the_model_that_is_saved(best: bool, tokenizer: Any, tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": best}
    trainer = train_tiny(tmp_path, tokenizer, max_steps=4, **saved, **WORST, **EVALUATED)
    trainer.save_model()
    loss = trainer.evaluate()["eval_loss"]
    text = (tmp_path / "README.md").read_text()
    assert f"## Held-out data, step {1 if best else 4}" in text and f"| {loss:.4g} |" in text


@pytest.mark.parametrize("kept", ["hf_device_map", "quantization_method", "ACCELERATE_USE_FSDP", ""])
def test_a_model_is_on_its_device_before_it_is_probed(
    kept: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, model = tiny_config(tmp_path), make_model(len(tokenizer))
    monkeypatch.setattr(type(args), "device", torch.device("meta"))
    if kept.isupper():
        monkeypatch.setenv(kept, "true")
    else:
        setattr(model, kept or "unused", {})
    place(model, args)
    assert {weight.device.type for weight in model.parameters()} == {"cpu" if kept else "meta"}


@pytest.mark.parametrize("kind", ["sft", "references"])
def test_a_trainer_moves_a_model_before_it_proves_its_head(
    kind: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Proven(Exception):
        pass

    def prove(model: Any) -> None:
        raise Proven({weight.device.type for weight in model.parameters()})

    monkeypatch.setattr(f"tdpo.train.{kind}.prove_head", prove)
    model, args = make_model(len(tokenizer)), tiny_config(tmp_path, SFTConfig if kind == "sft" else TDPOConfig)
    monkeypatch.setattr(type(args), "device", torch.device("meta"))
    with pytest.raises(Proven, match="meta"):
        if kind == "sft":
            SFTTrainer(model, args, [{"prompt": "a", "completion": " b"}], processing_class=tokenizer)
        else:
            TDPOTrainer(model, None, args, preference_rows(), processing_class=tokenizer)
