"""The record of a run and the page on it: what is written while training, and what is read from the folder alone."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser import Page
from conftest import REPOSITORY, make_model, preference_rows
from transformers import PreTrainedTokenizerFast

from tdpo import TDPOConfig, TDPOTrainer
from tdpo.cli import main
from tdpo.errors import Stopped, UserError
from tdpo.report.collect import RECORD, read_run, read_runs
from tdpo.report.run import run_page
from tdpo.report.run_figures import charts, throughput
from tdpo.train.record import settings

HOSTILE = "</style><script>alert(1)</script>{{ 7 * 7 }}"


def train(tokenizer: PreTrainedTokenizerFast, folder: Path, **options: Any) -> TDPOTrainer:
    """Runs a few steps into a folder."""
    settings = {"max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    args = TDPOConfig(output_dir=str(folder), report_to="none", disable_tqdm=True, beta=0.2, **(settings | options))
    rows = preference_rows()
    trainer = TDPOTrainer(
        make_model(len(tokenizer)), args=args, train_dataset=rows, eval_dataset=rows[:4], processing_class=tokenizer
    )
    with contextlib.suppress(Stopped):
        trainer.train()
    return trainer


@pytest.fixture(scope="module")
def run_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    trainer = train(tokenizer, folder, eval_strategy="steps", eval_steps=2)
    trainer.save_state()
    trainer.save_model()
    return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / RECORD).read_text(encoding="utf-8").splitlines()]


def test_a_record_has_settings_data_environment_and_every_log(run_folder: Path) -> None:
    start, *middle, end = lines(run_folder)
    assert (start["event"], start["steps"], start["per_step"]) == ("start", 4, 4)
    assert start["objective"] == "tdpo2(beta=0.2, alpha=0.5)" and start["reward_scale"] == 0.2
    assert start["settings"]["learning_rate"] == 1e-3 and start["settings"]["beta"] == 0.2
    assert "warmup_steps" not in start["settings"] and "output_dir" not in start["settings"]
    assert start["data"]["train"]["rows"] == 24 and start["data"]["eval"]["rows"] == 4
    assert start["data"]["train"]["lines"][0].endswith("24 rows, 24 kept")
    assert {"tdpo", "torch", "transformers", "device"} <= set(start["environment"])
    assert (end["event"], end["status"], end["step"]) == ("end", "finished", 4)
    history = json.loads((run_folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    without = ("event", "time", "memory")
    assert [{k: v for k, v in log.items() if k not in without} for log in middle] == history
    assert all(log["memory"] > 2**20 for log in middle)


def test_secrets_stay_out_of_record_and_card(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kwargs = {"token": "hf_secret", "eos_token": "</s>"}
    words = ["--hub_token", "hf_secret", "--api_key=hf_secret", f"--model_init_kwargs={json.dumps(kwargs)}"]
    monkeypatch.setattr("sys.argv", ["tdpo", "train", *words])
    args = TDPOConfig(output_dir=str(tmp_path), hub_token="hf_secret", model_init_kwargs=kwargs, learning_rate=2e-6)
    assert settings(args)["model_init_kwargs"] == {"token": "...", "eos_token": "</s>"}
    trainer = train(tokenizer, tmp_path, max_steps=1, hub_token="hf_secret")
    trainer.save_model()
    for name in (RECORD, "README.md"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "hf_secret" not in text and "--hub_token ..." in text and "</s>" in text


def test_settings_of_zero_are_recorded(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    train(tokenizer, tmp_path, max_steps=1, seed=0, max_grad_norm=0.0, alpha=0.0)
    found = lines(tmp_path)[0]["settings"]
    assert (found["seed"], found["max_grad_norm"], found["alpha"]) == (0, 0.0, 0.0)


def test_a_run_reads_as_it_was(run_folder: Path) -> None:
    run = read_run(run_folder)
    assert (run.name, run.status, run.steps) == ("first", "finished", 4)
    assert run.series("loss")[0] == [1, 2, 3, 4] and run.series("eval_loss")[0] == [2, 4]
    logged = [line["kl/chosen"] for line in lines(run_folder) if "kl/chosen" in line]
    assert run.series("kl/chosen")[1] == logged and run.last("kl/chosen") == logged[-1] > 0
    assert run.last("no such metric") is None


def test_a_killed_run_opens_and_says_so(run_folder: Path, tmp_path: Path) -> None:
    whole = (run_folder / RECORD).read_bytes()
    cut = whole[: whole.rfind(b'"step": 3') + 20]  # in the middle of a line
    (tmp_path / RECORD).write_bytes(cut)
    run = read_run(tmp_path)
    assert run.status.startswith("not finished: 2 of 4 steps are recorded") and run.series("loss")[0] == [1, 2]
    assert f"{tmp_path.name}: not finished: 2 of 4 steps" in run_page([run])


def test_a_resumed_run_has_every_step_once(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    train(tokenizer, tmp_path, save_steps=2)
    before = read_run(tmp_path)
    for path in tmp_path.glob("checkpoint-4"):
        path.rename(tmp_path / "other")
    train(tokenizer, tmp_path, save_steps=2, resume=True)
    after = read_run(tmp_path)
    assert [line["event"] for line in lines(tmp_path)].count("start") == 2
    assert after.series("loss") == before.series("loss") and after.status == "finished"


def test_a_run_resumed_after_half_a_line_reads(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    train(tokenizer, tmp_path, save_steps=2)
    (tmp_path / "checkpoint-4").rename(tmp_path / "other")
    whole = (tmp_path / RECORD).read_bytes()
    (tmp_path / RECORD).write_bytes(whole[: whole.rfind(b'"step": 4') + 5])
    train(tokenizer, tmp_path, save_steps=2, resume=True)
    run = read_run(tmp_path)
    assert run.series("loss")[0] == [1, 2, 3, 4] and run.status == "finished"


def test_a_stopped_run_says_so_and_one_stopped_at_its_end_does_not(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    train(tokenizer, tmp_path / "stopped", max_time="1s", max_steps=10**6, save_strategy="no")
    assert read_run(tmp_path / "stopped").status == "stopped with code 124"


def test_an_evaluation_alone_leaves_a_record_as_it_is(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    before = train(tokenizer, tmp_path, max_steps=1)
    text = (tmp_path / RECORD).read_bytes()
    args = TDPOConfig(output_dir=str(tmp_path), report_to="none", disable_tqdm=True)
    TDPOTrainer(before.model, args=args, eval_dataset=preference_rows(4), processing_class=tokenizer).evaluate()
    assert (tmp_path / RECORD).read_bytes() == text


def test_several_held_out_datasets_are_in_record_report_and_card(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    args = TDPOConfig(output_dir=str(tmp_path), max_steps=1, eval_strategy="steps", eval_steps=1, report_to="none")
    held_out = {"train": preference_rows(4), "b": preference_rows(6)}
    trainer = TDPOTrainer(
        make_model(len(tokenizer)), args=args, train_dataset=preference_rows(), eval_dataset=held_out,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    run = read_run(tmp_path)
    rows = {name: data["rows"] for name, data in run.start["data"].items()}
    assert rows == {"train": 24, "eval train": 4, "eval b": 6} and run.held_out == ["eval_train_", "eval_b_"]
    assert "loss, held out b" in run_page([run])
    assert "## Held-out data b, step 1" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_new_run_in_the_same_folder_starts_a_new_record(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for steps in (3, 2):
        train(tokenizer, tmp_path, max_steps=steps)
    assert [line["step"] for line in lines(tmp_path) if line["event"] == "end"] == [2]


def test_a_record_that_cannot_be_written_stops_nothing(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / RECORD).mkdir()
    assert train(tokenizer, tmp_path).state.global_step == 4
    messages = [record.message for record in caplog.records if "tdpo report will miss the rest" in record.message]
    assert len(messages) == 1 and str(tmp_path / RECORD) in messages[0]


def test_the_logs_of_another_trainer_are_enough(run_folder: Path, tmp_path: Path) -> None:
    state = json.loads((run_folder / "trainer_state.json").read_text(encoding="utf-8"))
    state["max_steps"] = 10
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps(state))
    run = read_run(tmp_path)
    assert run.reward_scale is None and "Log-ratio of the responses over" not in run_page([run])
    (tmp_path / "objective.json").write_bytes((run_folder / "objective.json").read_bytes())
    run = read_run(tmp_path)
    assert run.reward_scale == 0.2
    assert run.status == "not finished: 4 of 10 steps" and run.last("loss") == read_run(run_folder).last("loss")
    assert "no run.jsonl" in run_page([run])


def test_names_of_runs_tell_them_apart(run_folder: Path, tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent / "first").mkdir(parents=True)
        (tmp_path / parent / "first" / RECORD).write_bytes((run_folder / RECORD).read_bytes())
    assert [run.name for run in read_runs([tmp_path / "a/first", tmp_path / "b/first"])] == ["a/first", "b/first"]


def test_throughput_after_a_resumption_does_not_count_the_time_in_between() -> None:
    logs = [{"step": 1, "loss": 1.0, "time": 0.0}, {"step": 2, "loss": 1.0, "time": 2.0}, {"step": 2, "resumed": True}]
    logs += [{"step": 3, "loss": 1.0, "time": 3600.0}, {"step": 4, "loss": 1.0, "time": 3601.0}]
    run = read_run_of(logs)
    run.start["per_step"] = 8
    assert throughput(run).series("throughput") == ([2, 4], [4.0, 8.0])


def test_throughput_leaves_out_evaluations() -> None:
    times = [("loss", 1, 10.0), ("loss", 2, 12.0), ("eval_loss", 2, 50.0), ("loss", 3, 52.0), ("loss", 4, 53.0)]
    run = read_run_of([{"step": step, "time": time, name: 1.0} for name, step, time in times])
    assert throughput(run).series("throughput") == ([2, 4], [4.0, 8.0])


def read_run_of(logs: list[dict[str, Any]]) -> Any:
    from tdpo.report.collect import Run

    return Run("run", {"per_step": 8}, logs, "finished")


def test_the_page_is_complete_and_loads_nothing(run_folder: Path) -> None:
    page = run_page(read_runs([run_folder]))
    run = read_run(run_folder)
    assert f"<td>{run.last('eval_loss'):.4g}</td>" in page and f"<td>{run.last('kl/rejected'):.4g}</td>" in page
    drawn = re.findall(r'alt="(.*?) over optimizer steps"', page)
    assert drawn == [chart.title for chart in charts()]
    assert page.count("<b>Healthy:</b>") == page.count("<b>Trouble:</b>") == len(drawn)
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "default-src 'none'" in page


def test_text_of_a_run_stays_text(run_folder: Path) -> None:
    run = read_run(run_folder)
    run.start["command"] = run.start["data"]["train"]["lines"][0] = HOSTILE
    run.samples.append({"step": 0, "prompt": HOSTILE, "response": HOSTILE})
    page = run_page([run])
    assert "<script" not in page and page.count("&lt;script&gt;") == 4


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_the_page_in_a_browser(chromium: Any, run_folder: Path, tmp_path: Path, scheme: str, width: int) -> None:
    runs = read_runs([run_folder, run_folder])
    runs[0].samples.append({"step": 0, "prompt": "\u0645\u0631\u062d\u0628\u0627", "response": HOSTILE})
    (tmp_path / "page.html").write_text(run_page(runs), encoding="utf-8")
    opened = Page(chromium, tmp_path / "page.html", viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    sizes = opened.page.eval_on_selector_all("figure img", "images => images.map((image) => image.naturalWidth)")
    assert len(sizes) == len(charts()) and min(sizes) > 300
    # A narrow table scrolls: no number and no word of it is broken.
    broken = """cells => cells.map((cell) => {
      const text = document.createRange(); text.selectNodeContents(cell); return text.getClientRects().length; })"""
    assert max(opened.page.eval_on_selector_all("thead + tbody td", broken)) == 1
    opened.page.locator("summary").first.click()
    assert opened.page.get_by_text("per_device_train_batch_size").first.is_visible()
    assert opened.problems == []
    assert opened.serious_findings() == []
    opened.page.close()


def test_displacement_is_warned_of_in_nats() -> None:
    logs = [{"step": 1, "loss": 0.5, "implicit_rewards/chosen": -0.4, "implicit_rewards/rejected": -0.8}]
    run = read_run_of(logs)
    run.start["reward_scale"] = 0.1
    assert "log-ratio of chosen -4 nats, of rejected -8" in run_page([run])
    for chosen, rejected, warned in ((-0.05, -0.8, False), (-2.0, -0.05, True), (-2.0, 0.05, False)):
        logs[0] |= {"implicit_rewards/chosen": chosen, "implicit_rewards/rejected": rejected}
        assert ("displacement." in run_page([run])) == warned


def test_the_commands_record_samples_and_write_the_page(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    words = ["--model_name_or_path", model_folder, "--dataset_name", pairs_file, "--output_dir", tmp_path / "run"]
    words += ["--max_steps", "2", "--sample_prompts", "2", "--report_to", "none", "--learning_rate", "1e-2"]
    assert main(["train", *map(str, words)]) == 0
    run = read_run(tmp_path / "run")
    assert [(sample["step"], sample["prompt"]) for sample in run.samples] == [
        (step, row["prompt"]) for step in (0, 2) for row in preference_rows(2)
    ]
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "run"), "--output", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "Samples" in text and "step 2" in text and str(model_folder) in text


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["report"]) == 2
    assert "name the folder of a run" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "x.html")]) == 2
    assert f"{tmp_path} has no run.jsonl and no trainer_state.json" in capsys.readouterr().err
    (tmp_path / RECORD).write_text("[1]\n")
    with pytest.raises(UserError, match="not the record of a run"):
        read_run(tmp_path)


def test_the_documentation_lists_the_charts() -> None:
    text = (REPOSITORY / "docs" / "report.md").read_text(encoding="utf-8")
    rows = [(chart.title.replace("|", r"\|"), chart.healthy, chart.sick.strip()) for chart in charts()]
    assert all(f"| {title} | {healthy} | {sick} |" in text for title, healthy, sick in rows)
