"""Real models and real dialogues through the command line: it learns what held-out pairs confirm."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import write_jsonl
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tdpo.cli import main

LENGTHS = ["--max_length", "128", "--max_prompt_length", "48"]
SHORT = ["--max_length", "96", "--max_prompt_length", "32"]


def write_dialogues(shared: Path, folder: Path, train: int, test: int) -> Path:
    """HH dialogues, the first and the last of the file, in a folder with a train and a test file."""
    with gzip.open(shared / "data/hh/harmless-base_test.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", rows[:train])
    write_jsonl(folder / "test.jsonl", rows[-test:])
    return folder


pytestmark = pytest.mark.usefixtures("all_threads")


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def check_alignment(model: Path, dialogues: Path, out: Path, lengths: list[str], *options: object) -> None:
    """Trains, and holds the saved folder's evaluation against the start and against the trainer's own."""
    run(
        "train", "--model_name_or_path", model, "--dataset_name", dialogues, "--eval_dataset_name", dialogues,
        "--output_dir", out, "--objective", "tdpo2", "--num_train_epochs", 1, "--per_device_train_batch_size", 16,
        "--per_device_eval_batch_size", 16, "--save_strategy", "no", "--disable_tqdm", *lengths, *options,
    )  # fmt: skip
    figures = out / "figures.json"
    run(
        "eval", "--model_name_or_path", out, "--ref_model_name_or_path", model, "--dataset_name", dialogues,
        "--json", figures, "--per_device_eval_batch_size", 16, *lengths,
    )  # fmt: skip
    metrics = json.loads(figures.read_text())
    trained = json.loads((out / "eval_results.json").read_text())
    for name in ("loss", "rewards/margins", "implicit_rewards/accuracies", "kl/chosen", "kl/rejected"):
        assert metrics[name] == pytest.approx(trained[f"eval_{name}"], rel=1e-4, abs=1e-5)
    # At the start policy and reference are one: loss log 2, every pair a tie, so accuracy one half.
    assert metrics["loss"] < math.log(2) - 0.005
    error = metrics["implicit_rewards/accuracies_stderr"]
    assert metrics["implicit_rewards/accuracies"] > 0.5 + 2 * error
    assert 0.01 < metrics["kl/chosen"] < 50


def test_a_pretrained_llama_learns_from_hh_dialogues(shared: Path, tmp_path: Path) -> None:
    dialogues = write_dialogues(shared, tmp_path / "hh", 1200, 600)
    model = shared / "data/models/stories260k"
    check_alignment(model, dialogues, tmp_path / "out", LENGTHS, "--learning_rate", "1e-4", "--optim", "rmsprop")


def test_a_gpt2_with_its_own_tokenizer_is_fine_tuned_and_learns(shared: Path, tmp_path: Path) -> None:
    dialogues = write_dialogues(shared, tmp_path / "hh", 480, 300)
    tokenizer = AutoTokenizer.from_pretrained(shared / "data/tokenizers/gpt2")
    torch.manual_seed(0)
    start = GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=64, n_layer=2, n_head=2)
    GPT2LMHeadModel(start).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    run(
        "sft", "--model_name_or_path", tmp_path / "start",
        "--dataset_name", dialogues, "--eval_dataset_name", dialogues,
        "--output_dir", tmp_path / "sft", "--num_train_epochs", 1, "--per_device_train_batch_size", 16,
        "--learning_rate", "3e-3", "--max_length", 96, "--save_strategy", "no", "--disable_tqdm",
    )  # fmt: skip
    loss = json.loads((tmp_path / "sft" / "eval_results.json").read_text())["eval_loss"]
    assert loss < math.log(len(tokenizer)) - 3
    check_alignment(tmp_path / "sft", dialogues, tmp_path / "out", SHORT, "--learning_rate", "1e-3")
