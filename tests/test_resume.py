"""Resumed runs end where uninterrupted ones do, bit for bit: weights, logs, best checkpoint, whatever stopped them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, preference_rows
from runs import completed, history, start, train_words, weights
from tiny_training import tiny_trainer
from transformers import EarlyStoppingCallback

from tdpo import TDPOTrainer, UserError
from tdpo.cli import main
from tdpo.train import checkpointing

DROPOUT = ["--disable_dropout", "false"]
"""Without dropout nothing would draw a random number, and a lost random state would not show."""


@pytest.fixture(scope="module")
def dropout_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("dropout") / "model"
    model = make_model(len(tokenizer))
    model.config.attention_dropout = 0.2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def assert_same_end(ours: Path, theirs: Path) -> None:
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    assert history(ours) == history(theirs)


@pytest.mark.parametrize("cut", [3, 9, 12])
def test_weights_logs_and_best_checkpoint_are_those_of_the_uninterrupted_run(
    tmp_path: Path, dropout_folder: Path, pairs_file: Path, cut: int
) -> None:
    """Logs every 5 steps, so these cuts fall between two; an epoch is 6 steps, so 12 ends one."""
    options = [
        "--save_steps", 3, "--logging_steps", 5, "--eval_strategy", "steps", "--eval_steps", 3, "--seed", 3,
        "--eval_dataset_name", pairs_file, "--load_best_model_at_end", "--metric_for_best_model", "kl/chosen",
        "--greater_is_better", "false", "--per_device_train_batch_size", 4, "--max_steps", 15, *DROPOUT,
    ]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(train_words(dropout_folder, pairs_file, whole, *options)) == 0
    shutil.copytree(whole, parts)
    for path in [*parts.iterdir()]:
        if path.is_file():
            path.unlink()
        elif checkpointing.step_of(path) > cut:
            shutil.rmtree(path)
    state = parts / f"checkpoint-{cut}" / "trainer_state.json"
    state.write_text(state.read_text().replace(str(whole), str(parts)))
    checkpointing.seal(state.parent)
    assert main(train_words(dropout_folder, pairs_file, parts, *options, "--resume")) == 0
    assert_same_end(parts, whole)
    ours, theirs = (json.loads((folder / "trainer_state.json").read_text()) for folder in (parts, whole))
    assert ours["best_metric"] == theirs["best_metric"] and ours["best_global_step"] == theirs["best_global_step"]
    assert ours["best_model_checkpoint"] == str(parts / f"checkpoint-{ours['best_global_step']}")


def test_resuming_a_finished_run_trains_no_further_step(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    """The last checkpoint is in the middle of an epoch; resuming from it must not take another step."""
    words = train_words(model_folder, pairs_file, tmp_path / "out", "--max_steps", 4)
    assert main(words) == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    (tmp_path / "out" / "model.safetensors").unlink()
    assert main([*words, "--resume"]) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def killed_at_random(words: list[str], out: Path, kills: int, processes: int, seed: int) -> list[str]:
    """Kills a run at random moments after its first new checkpoint; returns the folders each kill left incomplete.

    Every process gets SIGKILL, which none can handle.
    """
    generator, left = random.Random(seed), []
    for _ in range(kills):
        before = checkpointing.latest_complete(out)[0]
        run = start([*words, "--resume"], processes)
        while checkpointing.latest_complete(out)[0] == before and run.poll() is None:
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.15))
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(run.pid)], capture_output=True, text=True).stdout
        for process in [run.pid, *map(int, children.split())]:
            os.kill(process, signal.SIGKILL)
        run.communicate()
        left += sorted(path.name for path in out.glob("*.partial"))
    return left


@pytest.mark.parametrize(
    ("kills", "processes"),
    [(2, 1), pytest.param(20, 1, marks=pytest.mark.slow), pytest.param(5, 2, marks=pytest.mark.slow)],
)
def test_killed_at_random_moments_it_ends_with_the_same_bits(
    tmp_path: Path, dropout_folder: Path, pairs_file: Path, kills: int, processes: int
) -> None:
    steps = 12 * kills * (1 if processes == 1 else 2)
    options = ["--max_steps", steps, "--save_steps", 1, "--save_total_limit", 2, "--logging_steps", 5, *DROPOUT]
    options += ["--per_device_train_batch_size", 4 // processes]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    completed(train_words(dropout_folder, pairs_file, whole, *options), processes, timeout=300)
    words = train_words(dropout_folder, pairs_file, parts, *options)
    left = killed_at_random(words, parts, kills, processes, seed=kills)
    newest, _ = checkpointing.latest_complete(parts)
    reached = checkpointing.step_of(newest) if newest else 0
    completed([*words, "--resume"], processes, timeout=300)
    print(
        f"{kills} kills, {processes} processes, up to step {reached} of {steps}; half-written: {left}", file=sys.stderr
    )
    assert 0 < reached < steps, "a run that had ended before the last kill proves nothing"
    assert_same_end(parts, whole)


def trainer(folder: Path, tokenizer: Any, rows: int = 12, **fields: Any) -> TDPOTrainer:
    """Makes a trainer of four steps that saves after every second one."""
    fields = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", **fields}
    held_out = preference_rows(4) if "eval_strategy" in fields else None
    return tiny_trainer(folder, tokenizer, rows=preference_rows(rows), eval_rows=held_out, **fields)


def test_other_data_or_another_batch_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    trainer(tmp_path, tokenizer).train()
    with pytest.raises(UserError, match="was written with 12 pairs of training data, now there are 11"):
        trainer(tmp_path, tokenizer, rows=11).train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match="was written with 8 pairs per optimizer step, now there are 4"):
        trainer(tmp_path, tokenizer, per_device_train_batch_size=4).train(resume_from_checkpoint=True)
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 5}
    trainer(tmp_path, tokenizer, **split).train(resume_from_checkpoint=True)


def test_resuming_without_a_checkpoint_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="no complete checkpoint to resume from"):
        trainer(tmp_path, tokenizer).train(resume_from_checkpoint=True)


def test_a_resumed_callback_keeps_its_patience(tmp_path: Path, tokenizer: Any) -> None:
    """Two evaluations without improvement before the cut and one after it are three."""

    def run(steps: int, resume: bool) -> int:
        options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "metric_for_best_model": "kl/chosen"}
        made = trainer(
            tmp_path, tokenizer, max_steps=steps, learning_rate=0.0, greater_is_better=True,
            load_best_model_at_end=True, **options,
        )  # fmt: skip
        made.add_callback(EarlyStoppingCallback(early_stopping_patience=3))
        made.train(resume_from_checkpoint=resume)
        return made.state.global_step

    assert run(3, resume=False) == 3
    assert run(50, resume=True) == 4


def test_weights_of_a_checkpoint_are_those_that_are_saved(tmp_path: Path, tokenizer: Any) -> None:
    made = trainer(tmp_path, tokenizer)
    made.train()
    made.save_model()
    assert all(torch.equal(a, weights(tmp_path)[n]) for n, a in weights(tmp_path / "checkpoint-4").items())
