"""Restarted and repeated runs start from the beginning, with no state of the earlier one."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from tiny_training import tiny_config, tiny_trainer, weights
from transformers import TrainerCallback

from tdpo import TDPOTrainer, UserError
from tdpo.train.trainer import TDPOTrainer as Trainer

TIMINGS = ("runtime", "per_second", "flos")
OPTIONS = {"max_steps": 4, "logging_steps": 3, "gradient_accumulation_steps": 2}


def history(trainer: TDPOTrainer) -> list[dict[str, float]]:
    return [
        {k: v for k, v in log.items() if not any(timing in k for timing in TIMINGS)}
        for log in trainer.state.log_history
    ]


def make_trainer(folder: Path, tokenizer: Any, **fields: Any) -> TDPOTrainer:
    model = make_model(len(tokenizer))
    model.model.layers[0].self_attn.attention_dropout = 0.0 if fields.get("disable_dropout", True) else 0.5
    return tiny_trainer(folder, tokenizer, model, ref_model=make_model(len(tokenizer), seed=1), **{**OPTIONS, **fields})


class OutOfMemoryOnce:
    """Raises in the second micro-batch of the third step, after the metrics of the first have been added up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.raised, original = 0, False, Trainer.loss_sum

        def loss_sum(trainer: Any, model: Any, inputs: Any) -> Any:
            self.calls += 1
            if self.calls == 6 and not self.raised:
                self.raised = True
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return original(trainer, model, inputs)

        monkeypatch.setattr(Trainer, "loss_sum", loss_sum)


@pytest.mark.parametrize("own_optimizer", [False, True])
def test_after_running_out_of_memory_a_run_equals_one_that_starts_with_the_smaller_batch(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    own_optimizer: bool,
) -> None:  # fmt: skip
    class Counts(TrainerCallback):
        steps = 0

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.steps += 1

    def run(folder: Path, **options: Any) -> tuple[TDPOTrainer, Counts]:
        trainer, counts = (
            make_trainer(folder, tokenizer, save_strategy="steps", save_steps=2, disable_dropout=False, **options),
            Counts(),
        )
        trainer.add_callback(counts)
        if own_optimizer:
            trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-2)
        trainer.train()
        return trainer, counts

    expected, _ = run(tmp_path / "a", per_device_train_batch_size=3)
    failing = OutOfMemoryOnce(monkeypatch)
    with caplog.at_level(logging.WARNING, logger="tdpo"):
        found, counts = run(tmp_path / "b", per_device_train_batch_size=4, auto_find_batch_size=True)
    assert failing.raised and found._train_batch_size == 3
    assert [r.getMessage()[:80] for r in caplog.records if "out of memory" in r.getMessage()] == [
        "out of memory with 4 rows a batch: training starts again from its beginning with"
    ]
    assert history(found) == history(expected)
    assert torch.equal(weights(found.model), weights(expected.model))
    assert counts.steps == 4


def test_a_run_resumes_with_the_batch_size_that_was_found(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = make_trainer(tmp_path / "a", tokenizer, per_device_train_batch_size=3)
    uninterrupted.train()
    OutOfMemoryOnce(monkeypatch)
    options = {
        "per_device_train_batch_size": 4,
        "auto_find_batch_size": True,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    make_trainer(tmp_path / "b", tokenizer, **options).train()
    resumed = make_trainer(tmp_path / "b", tokenizer, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert torch.equal(weights(resumed.model), weights(uninterrupted.model))


def test_checkpoints_of_an_abandoned_attempt_are_removed(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    OutOfMemoryOnce(monkeypatch)
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        per_device_train_batch_size=4,
        auto_find_batch_size=True,
        save_strategy="steps",
        save_steps=1,
    )
    seen: list[list[str]] = []

    class ListCheckpoints(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            seen.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))

    trainer.add_callback(ListCheckpoints())
    trainer.train()
    assert seen == [[], []]


def test_running_out_of_memory_at_every_batch_size_is_an_error(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss_sum(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Trainer, "loss_sum", loss_sum)
    with pytest.raises(RuntimeError, match="No executable batch size found"):
        make_trainer(tmp_path, tokenizer, per_device_train_batch_size=2, auto_find_batch_size=True).train()


def test_sync_ref_model_with_auto_find_batch_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--sync_ref_model and --auto_find_batch_size contradict each other"):
        tiny_config(tmp_path, auto_find_batch_size=True, sync_ref_model=True)


def test_training_a_second_time_logs_only_its_own_steps(tmp_path: Path, tokenizer: Any) -> None:
    """The first run ends between two logs; the second does not log the steps left over."""
    trainer = make_trainer(tmp_path / "a", tokenizer, max_steps=4, learning_rate=0.0)
    trainer.train()
    first = [log for log in history(trainer) if "loss" in log]
    trainer.train()
    assert [log for log in history(trainer) if "loss" in log] == first


def test_the_options_of_resuming_work_in_python(tmp_path: Path, tokenizer: Any) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    uninterrupted = make_trainer(tmp_path, tokenizer, **options)
    uninterrupted.train()
    for more in ({"resume": True}, {"resume_from_checkpoint": str(tmp_path / "checkpoint-2")}):
        resumed = make_trainer(tmp_path, tokenizer, **options, **more)
        resumed.train()
        assert torch.equal(weights(resumed.model), weights(uninterrupted.model))
    fresh = make_trainer(tmp_path / "empty", tokenizer, resume=True, **options)
    before = copy.deepcopy(weights(fresh.model))
    assert fresh.train().global_step == 4 and not torch.equal(before, weights(fresh.model))


def test_models_are_released_with_their_trainer(tmp_path: Path, tokenizer: Any) -> None:
    """Without waiting for a garbage collection: the next trainer may need the memory."""
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1, auto_find_batch_size=True)
    trainer.train()
    models = [weakref.ref(model) for model in (trainer.model, trainer.reference.model)]
    gc.collect()
    gc.disable()
    try:
        del trainer
        assert [model() for model in models] == [None, None]
    finally:
        gc.enable()
