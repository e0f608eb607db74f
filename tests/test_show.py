"""Samples and token view of a run while it trains, in its record, its output and its trackers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import preference_rows
from rich.console import Console
from transformers import TrainerCallback

from tdpo.cli import main
from tdpo.report import show_callback
from tdpo.report.collect import read_run
from tdpo.train.progress import ProgressCallback, without_control
from tdpo.train.trackers import track_page, track_samples

STATE = SimpleNamespace(global_step=4, is_world_process_zero=True)
SAMPLES = [{"prompt": "The <b>", "response": " cat"}, {"prompt": "A", "response": " dog"}]


@pytest.fixture
def words(model_folder: Path, pairs_file: Path, tmp_path: Path) -> list[str]:
    """A command that trains for four steps, and is evaluated after two."""
    words = [
        "train",
        "--model_name_or_path",
        model_folder,
        "--dataset_name",
        pairs_file,
        "--output_dir",
        tmp_path / "run",
    ]
    words += ["--max_steps", 4, "--eval_strategy", "steps", "--eval_steps", 2, "--test_fraction", 0.3]
    words += ["--learning_rate", 1e-2, "--per_device_train_batch_size", 4, "--disable_tqdm", "false"]
    return [str(word) for word in words]


def test_samples_at_every_evaluation_and_token_view_at_the_end(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([*words, "--sample_prompts", "2", "--inspect_pairs", "3"]) == 0
    run = read_run(tmp_path / "run")
    assert [sample["step"] for sample in run.samples] == [0, 0, 2, 2, 4, 4]
    prompts = {row["prompt"] for row in preference_rows()}
    assert {sample["prompt"] for sample in run.samples} <= prompts
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sample at step")]
    last = run.samples[-1]
    response = without_control(" ".join(last["response"].split())[:100])
    assert len(lines) == 3
    assert lines[-1].rstrip() == f"sample at step 4: {last['prompt'].strip()} -> {response}".rstrip()
    page = (tmp_path / "run" / "tokens.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and str(tmp_path / "run") in page
    events = [json.loads(line)["event"] for line in (tmp_path / "run" / "run.jsonl").read_text().splitlines()]
    assert events[:2] == ["start", "samples"] and "end" in events


def losses(folder: Path) -> list[float]:
    return read_run(folder).series("loss")[1]


def test_training_is_the_same_with_and_without(words: list[str], tmp_path: Path) -> None:
    assert main([*words, "--logging_steps", "1"]) == 0
    plain = losses(tmp_path / "run")
    words += ["--logging_steps", "1", "--overwrite_output_dir", "--sample_prompts", "2", "--inspect_pairs", "2"]
    assert main(words) == 0
    assert losses(tmp_path / "run") == plain and len(plain) == 4


@pytest.mark.parametrize("options", [["--reference", "cached"], ["--use_peft"], []])
def test_the_token_view_has_the_held_out_values_of_the_run(
    options: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    inspect = show_callback.inspect
    monkeypatch.setattr(show_callback, "inspect", lambda *a, **b: made.append(inspect(*a, **b)) or made[-1])
    assert main([*words, "--inspect_pairs", "100", *options]) == 0
    pairs = made[0].pairs
    run = read_run(tmp_path / "run")
    assert len(pairs) == run.start["data"]["eval"]["rows"]
    for name, values in {
        "eval_loss": [pair.loss for pair in pairs],
        "eval_kl/rejected": [pair.rejected.kl.sum() for pair in pairs],
    }.items():
        assert sum(values) / len(values) == pytest.approx(run.last(name), rel=1e-5), name


def test_an_error_while_sampling_costs_no_model(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fails(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(show_callback, "sample_ids", fails)
    monkeypatch.setattr(show_callback, "inspect", fails)
    assert main([*words, "--sample_prompts", "2", "--inspect_pairs", "2"]) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()
    warnings = [line.split() for line in capsys.readouterr().err.splitlines() if "cannot be shown" in line]
    assert [" ".join(line) for line in warnings] == [
        f"WARNING step {step} cannot be shown: out of memory" for step in (0, 2, 4, 4)
    ]


class Recorder:
    """A tracker with the interface of W&B that keeps what it is given."""

    def __init__(self) -> None:
        self.logged: list[Any] = []

    def log(self, content: dict[str, Any]) -> None:
        self.logged.append(content)

    log_artifact = log

    class Table:
        def __init__(self, dataframe: Any) -> None:
            self.rows = dataframe.to_dict("records")

    class Artifact:
        def __init__(self, name: str, type: str) -> None:
            self.name, self.type, self.files = name, type, []

        def add_file(self, path: str) -> None:
            self.files.append(path)


@pytest.mark.parametrize("attribute", ["_wandb", "_trackio"])
def test_samples_are_a_table_and_the_page_an_artifact(attribute: str, tmp_path: Path) -> None:
    tracker = Recorder()
    callbacks = [TrainerCallback(), SimpleNamespace(**{attribute: tracker}, _initialized=True)]
    track_samples(callbacks, STATE, SAMPLES)
    track_page(callbacks, STATE, tmp_path / "tokens.html")
    table, artifact = tracker.logged
    assert table["samples"].rows == [{"step": 4, **sample} for sample in SAMPLES] and table["train/global_step"] == 4
    assert (artifact.name, artifact.files) == ("token_view", [str(tmp_path / "tokens.html")])
    for closed in (SimpleNamespace(**{attribute: tracker}, _initialized=False), SimpleNamespace(tb_writer=None)):
        track_samples([closed], STATE, SAMPLES)
    track_samples(callbacks, SimpleNamespace(global_step=4, is_world_process_zero=False), SAMPLES)
    assert len(tracker.logged) == 2


def test_tensorboard_gets_text_that_is_no_markup() -> None:
    texts: dict[str, tuple[str, int]] = {}
    writer = SimpleNamespace(add_text=lambda name, text, step: texts.update({name: (text, step)}))
    track_samples([SimpleNamespace(tb_writer=writer)], STATE, SAMPLES)
    assert texts["samples/1"] == ("<pre>The &lt;b&gt;</pre>\n<pre> cat</pre>", 4) and len(texts) == 2


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["tensorboard", "trackio", "wandb"])
def test_a_run_with_a_tracker(
    tracker: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "TRACKIO_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    module = pytest.importorskip(tracker, reason=f"{tracker} is not installed")
    assert main([*words, "--report_to", tracker, "--sample_prompts", "2", "--inspect_pairs", "2"]) == 0
    assert "cannot be shown" not in capsys.readouterr().err
    if tracker == "wandb":
        module.finish()  # writes what is queued
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != tmp_path / "run"]
    content = b"".join(path.read_bytes() for path in kept)
    assert b"samples" in content
    assert tracker == "tensorboard" or b"token_view" in content


def test_a_resumed_run_has_the_samples_of_every_evaluation_once(words: list[str], tmp_path: Path) -> None:
    words += ["--sample_prompts", "1", "--save_strategy", "steps", "--save_steps", "2"]
    assert main(words) == 0
    whole = read_run(tmp_path / "run").samples
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    assert main([*words, "--resume_from_checkpoint", checkpoint]) == 0
    assert read_run(tmp_path / "run").samples == whole
    assert [sample["step"] for sample in whole] == [0, 2, 4]


def test_a_sample_does_not_command_the_terminal() -> None:
    written = io.StringIO()
    ProgressCallback("training", Console(file=written)).show_sample(STATE, "a\n\x1b[2J", "b\x07 \x9b31m")
    assert written.getvalue() == "sample at step 4: a \ufffd[2J -> b\ufffd \ufffd31m\n"
