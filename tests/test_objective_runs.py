"""Objectives through the command line: one of a user's own, one without a reference, and what a model remembers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import preference_rows, write_jsonl
from test_cli import mistake
from test_trl_oracle import BETA, Oracle, tolerance

import tdpo
from tdpo import TDPOConfig, TDPOTrainer, UserError, objectives
from tdpo.cli import main
from tdpo.objectives import weighted
from tdpo.score import batch_loss, packer

OBJECTIVE = """
from dataclasses import dataclass
from tdpo.objectives import SumObjective, parameter, preference_loss
from tdpo.types import PairLoss, PairStats


@dataclass(frozen=True)
class Tempered(SumObjective):
    beta: float = parameter(0.1, "Strength.", above=0)
    limit: float = parameter(5.0, "Largest margin in nats.", above=0)

    def __call__(self, stats: PairStats) -> PairLoss:
        margin = self.limit * ((stats.chosen_logratio - stats.rejected_logratio) / self.limit).tanh()
        rewards = self.beta * stats.chosen_logratio.detach(), self.beta * stats.rejected_logratio.detach()
        return PairLoss(preference_loss(self.beta * margin), *rewards)
"""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_jsonl(tmp_path / "pairs.jsonl", preference_rows())
    (tmp_path / "own_objective.py").write_text(OBJECTIVE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def train(model: Path, out: str, *more: object) -> list[str]:
    words = ["train", "--model_name_or_path", model, "--dataset_name", "pairs.jsonl", "--output_dir", out, "--use_cpu"]
    words += ["--per_device_train_batch_size", 8, "--learning_rate", 1e-2, "--report_to", "none", "--logging_steps", 1]
    return [str(word) for word in (*words, *more)]


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [log["loss"] for log in history if "loss" in log]


def test_an_objective_of_ones_own_trains_resumes_and_is_remembered(desk: Path, model_folder: Path, capsys) -> None:
    own = ["--objective", "own_objective:Tempered", "--beta", 0.3, "--objective_args", '{"limit": 2.0}']
    assert main(train(model_folder, "whole", *own, "--max_steps", 6, "--save_steps", 3)) == 0
    assert "objective own_objective:Tempered(beta=0.3, limit=2)" in capsys.readouterr().out
    resumed = ["--resume_from_checkpoint", "whole/checkpoint-3", "--max_steps", 6, "--save_steps", 3]
    assert main(train(model_folder, "resumed", *own, *resumed)) == 0
    assert losses(desk / "resumed") == losses(desk / "whole")
    assert losses(desk / "whole")[0] == pytest.approx(math.log(2), abs=1e-6)
    saved = json.loads((desk / "whole" / "objective.json").read_text())
    assert saved == {
        "objective": "own_objective:Tempered", "parameters": {"beta": 0.3, "limit": 2.0}, "token_weights": None,
    }  # fmt: skip
    evaluate = ["eval", "--model_name_or_path", "whole", "--ref_model_name_or_path", str(model_folder)]
    evaluate += ["--dataset_name", "pairs.jsonl", "--json", "figures.json"]
    capsys.readouterr()
    assert main(evaluate) == 0
    assert "own_objective:Tempered(beta=0.3, limit=2), 24 pairs" in " ".join(capsys.readouterr().out.split())
    assert main([*evaluate, "--limit", "3"]) == 2  # a parameter of ones own is not an option
    assert main([*evaluate, "--beta", "0.5"]) == 0
    assert "own_objective:Tempered(beta=0.5, limit=2)" in " ".join(capsys.readouterr().out.split())
    assert main([*evaluate, "--objective", "dpo"]) == 0
    assert "dpo(beta=0.1)" in capsys.readouterr().out
    message = mistake(capsys, *train(model_folder, "other", *own[:-1], '{"limit": -1}'))
    assert "own_objective:Tempered: limit must be a positive number, got -1" in message
    assert "--beta and --objective_args both give beta" in mistake(
        capsys, *train(model_folder, "other", *own[:-1], '{"beta": 0.2}')
    )
    assert "--objective_args must map names to values" in mistake(
        capsys, *train(model_folder, "other", *own[:-1], "[1]")
    )
    for content, words in (
        ('{"objective": "dpo", "parameters": {"gamma": 3}}', "dpo has no gamma"),
        ('{"objective": "dpo", "parameters": {}, "token_weights": 5}', "token_weights 5"),
    ):
        (desk / "whole" / "objective.json").write_text(content)
        message = mistake(capsys, *evaluate)
        assert "objective.json" in message and words in message and "--objective" in message


def test_resuming_with_another_objective_warns(desk: Path, model_folder: Path, capsys) -> None:
    assert main(train(model_folder, "run", "--objective", "dpo", "--max_steps", 2, "--save_steps", 1)) == 0
    capsys.readouterr()
    assert main(train(model_folder, "run", "--objective", "ipo", "--max_steps", 3, "--save_steps", 1, "--resume")) == 0
    output = " ".join(capsys.readouterr().err.split())
    assert "was trained with {'objective': 'dpo'" in output and "continues with {'objective': 'ipo'" in output


def test_simpo_trains_without_a_reference(desk: Path, model_folder: Path, capsys) -> None:
    words = train(model_folder, "run", "--objective", "simpo", "--max_steps", 2)
    assert main([*words, "--eval_dataset_name", "pairs.jsonl", "--eval_strategy", "steps", "--eval_steps", "1"]) == 0
    assert "reference: none (simpo compares without one)" in capsys.readouterr().out
    history = json.loads((desk / "run" / "trainer_state.json").read_text())["log_history"]
    for log in history[:-1]:
        assert not any("kl" in name or "implicit" in name for name in log)
        assert all(math.isfinite(value) for value in log.values())
    assert main(["eval", "--model_name_or_path", "run", "--dataset_name", "pairs.jsonl", "--json", "a.json"]) == 0
    figures = json.loads(Path("a.json").read_text())
    assert "loss" in figures and "kl/chosen" not in figures
    capsys.readouterr()
    message = mistake(capsys, *words, "--overwrite_output_dir", "--ref_model_name_or_path", model_folder)
    assert "contradicts --objective simpo, which has no reference" in message
    message = mistake(capsys, *words, "--overwrite_output_dir", "--reference", "frozen")
    assert "--reference frozen contradicts --objective simpo" in message
    message = mistake(capsys, "eval", "--model_name_or_path", model_folder, "--dataset_name", "pairs.jsonl")
    assert "--ref_model_name_or_path is missing: tdpo2 compares with a reference" in message


def test_simpo_keeps_no_second_model(tokenizer: Any, model_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    args = TDPOConfig(output_dir=str(tmp_path), objective="simpo", use_cpu=True, report_to="none")
    trainer = TDPOTrainer(model, args=args, train_dataset=preference_rows(), processing_class=tokenizer)
    assert trainer.reference.models() == []
    copies = [thing for thing in vars(trainer).values() if isinstance(thing, torch.nn.Module) and thing is not model]
    assert not [copy for copy in copies if copy is not trainer.model_wrapped]
    with pytest.raises(UserError, match=r"a reference model .* contradicts --objective simpo"):
        TDPOTrainer(
            model, AutoModelForCausalLM.from_pretrained(model_folder), args, train_dataset=preference_rows(),
            processing_class=tokenizer,
        )  # fmt: skip


def test_a_compared_objective_without_a_reference_is_refused() -> None:
    from numeric_worlds import random_pairs, tiny_llama

    with pytest.raises(UserError, match=r"dpo\(beta=0\.1\) compares with a reference; pass a model"):
        tdpo.score_pairs(tiny_llama(), None, random_pairs(), objectives.dpo())
    scores = tdpo.score_pairs(tiny_llama(), None, random_pairs(), objectives.simpo())
    assert scores.loss.isfinite().all() and scores.stats.chosen_kl.isnan().all()


def test_weights_by_position_are_trls_ld_alpha(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = Oracle(torch.float64, tmp_path)
    plain = oracle.loss().item()
    monkeypatch.setattr(oracle.trainer, "ld_alpha", 0.3)
    theirs = oracle.loss()
    assert abs(theirs.item() - plain) > 1e-4
    batch = weighted(packer("padded", [oracle.policy]), "ld:0.3")(oracle.pairs)
    total, _ = batch_loss(oracle.policy, oracle.reference, batch, objectives.dpo(BETA))
    ours = total / len(oracle.pairs)
    assert ours.item() == pytest.approx(theirs.item(), rel=tolerance(oracle))


def test_weights_by_position_train_and_are_remembered(desk: Path, model_folder: Path, capsys) -> None:
    assert main(train(model_folder, "plain", "--max_steps", 3)) == 0
    assert main(train(model_folder, "ld", "--max_steps", 3, "--token_weights", "decay:0.5")) == 0
    assert losses(desk / "plain")[0] == losses(desk / "ld")[0]
    assert abs(losses(desk / "plain")[2] - losses(desk / "ld")[2]) > 1e-5
    evaluate = ["eval", "--model_name_or_path", "ld", "--ref_model_name_or_path", str(model_folder)]
    evaluate += ["--dataset_name", "pairs.jsonl", "--json"]
    assert main([*evaluate, "remembered.json"]) == main([*evaluate, "asked.json", "--token_weights", "decay:0.5"]) == 0
    assert main([*evaluate, "plain.json", "--objective", "tdpo2"]) == 0
    remembered, asked, plain = (json.loads(Path(f"{n}.json").read_text()) for n in ("remembered", "asked", "plain"))
    assert remembered == asked and abs(plain["loss"] - remembered["loss"]) > 1e-6
    capsys.readouterr()
    assert "--token_weights ld: expected" in mistake(capsys, *train(model_folder, "x", "--token_weights", "ld"))
