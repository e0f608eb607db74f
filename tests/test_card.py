"""The model card: written on save, from what the run recorded; a card of other origin stays."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import make_model, preference_rows
from hub_server import hub
from huggingface_hub import ModelCard
from peft import LoraConfig
from test_report import train
from transformers import PreTrainedTokenizerFast

from tdpo import TDPOConfig, TDPOTrainer
from tdpo.cli import main
from tdpo.data.dataset import PairDataset
from tdpo.data.formats import DataReport
from tdpo.data.table import record_batch
from tdpo.train.card import FILE, MARK
from tdpo.types import TokenisedPair


def test_a_card_has_objective_results_data_settings_and_versions(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trainer = train(tokenizer, tmp_path, eval_strategy="steps", eval_steps=2)
    trainer.save_model()
    card = ModelCard.load(tmp_path / FILE)
    assert card.data.tags == ["tdpo", "tdpo2"] and card.data.library_name == "transformers"
    assert "`tdpo2(beta=0.2, alpha=0.5)`" in card.text and "| learning_rate | 0.001 |" in card.text
    last = [log for log in trainer.state.log_history if "eval_loss" in log][-1]
    assert "## Held-out data, step 4" in card.text and f"| loss | {last['eval_loss']:.4g} |" in card.text
    assert f"rejected, nats per response | {last['eval_kl/rejected']:.4g} |" in card.text
    fingerprints = trainer.train_dataset.fingerprint(), trainer.eval_dataset.fingerprint()
    assert f"| 24 | {fingerprints[0]} |" in card.text and f"| 4 | {fingerprints[1]} |" in card.text


def test_a_card_has_the_results_of_the_best_step_if_its_model_was_loaded(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"metric_for_best_model": "loss", "greater_is_better": True}
    trainer = train(tokenizer, tmp_path, load_best_model_at_end=True, **options)
    best = trainer.state.best_global_step
    logs = {log["step"]: log for log in trainer.state.log_history if "eval_loss" in log}
    assert best == max(logs, key=lambda step: logs[step]["eval_loss"]) != max(logs)
    trainer.save_model()
    text = ModelCard.load(tmp_path / FILE).text
    assert f"## Held-out data, step {best}" in text and f"| loss | {logs[best]['eval_loss']:.4g} |" in text


def test_arguments_of_transformers_go_into_the_header(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trainer = train(tokenizer, tmp_path, max_steps=1)
    trainer.create_model_card("en", "mit", tags="extra", model_name="my name", dataset="org/pairs")
    card = ModelCard.load(tmp_path / FILE)
    assert (card.data.language, card.data.license, card.data.datasets) == ("en", "mit", "org/pairs")
    assert card.data.tags == ["tdpo", "tdpo2", "extra"] and "# my name" in card.text
    assert "No held-out data was evaluated." in card.text


def test_a_card_of_other_origin_stays(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE).write_text("# mine\n")
    with caplog.at_level(logging.WARNING):
        train(tokenizer, tmp_path, max_steps=1).save_model()
    assert (tmp_path / FILE).read_text() == "# mine\n" and "is not a model card of tdpo" in caplog.text


def test_a_card_of_an_adapter_is_written_too_and_one_of_other_origin_stays(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=2)
    for folder, text in (("new", ""), ("other", "# mine\n")):
        path = tmp_path / folder
        args = TDPOConfig(output_dir=str(path), max_steps=1, report_to="none", disable_tqdm=True)
        trainer = TDPOTrainer(
            make_model(len(tokenizer)), args=args, train_dataset=preference_rows(), processing_class=tokenizer,
            peft_config=config,
        )  # fmt: skip
        trainer.train()
        if text:
            (path / FILE).write_text(text)
        trainer.save_model()
        written = (path / FILE).read_text(encoding="utf-8")
        assert (written == text) if text else (MARK in written and "library_name: peft" in written)


def test_the_command_writes_the_card_with_its_last_evaluation(
    model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    words = ["--model_name_or_path", model_folder, "--dataset_name", pairs_file, "--eval_dataset_name", pairs_file]
    words += ["--dataset_test_split", "train", "--output_dir", tmp_path / "run", "--max_steps", "1"]
    assert main(["train", *map(str, words), "--report_to", "none"]) == 0
    text = (tmp_path / "run" / FILE).read_text(encoding="utf-8")
    assert MARK in text and "## Held-out data, step 1" in text and f"Trained from `{model_folder}`" in text


def test_a_fingerprint_is_of_ids_and_order_alone() -> None:
    pairs = [TokenisedPair([1], [2, 3], [4]), TokenisedPair([5, 6], [7], [8])]

    def fingerprint(*batches: list[TokenisedPair]) -> str:
        table = pa.Table.from_batches([record_batch(batch) for batch in batches])
        return PairDataset(table, DataReport("pairs")).fingerprint()

    one = fingerprint(pairs)
    assert one == fingerprint(pairs[:1], pairs[1:]) and len(one) == 16
    weighted = TokenisedPair([1], [2, 3], [4], chosen_weights=[1.0, 0.5])
    moved = TokenisedPair([1, 2], [3], [4])
    others = {fingerprint(pairs[::-1]), fingerprint([weighted, pairs[1]]), fingerprint([moved, pairs[1]])}
    assert len(others | {one}) == 4


@pytest.mark.parametrize("adapter", [False, True])
def test_a_run_is_pushed_with_its_model_and_the_results_of_the_held_out_pairs(
    adapter: bool, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    words = ["train", "--model_name_or_path", model_folder, "--dataset_name", pairs_file, "--test_fraction", 0.3]
    words += ["--output_dir", tmp_path / "run", "--max_steps", 2, *(["--use_peft"] if adapter else [])]
    words += ["--save_strategy", "steps", "--save_steps", 1, "--reference", "cached"]
    words += ["--push_to_hub", "--hub_model_id", "me/aligned", "--hub_token", "hf_secret"]
    with hub() as server:
        environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "tdpo", *map(str, words)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    files = server.files["me/aligned"]
    weights = "adapter_model.safetensors" if adapter else "model.safetensors"
    for name in (weights, "objective.json", "tokenizer.json", FILE):
        assert files[name] == (tmp_path / "run" / name).read_bytes(), name
    assert "## Held-out data, step 2" in files[FILE].decode()
    assert [name for name, _ in server.uploaded].count("training_args.bin") >= 2  # at the checkpoints and at the end
    assert not any(b"hf_secret" in content for _, content in server.uploaded)
    assert server.tokens == {"Bearer hf_secret"}
    assert (tmp_path / "run" / "_reference-cache").is_dir() and not [
        name for name in files if "reference-cache" in name
    ]
