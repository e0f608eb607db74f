"""The command line: it answers at once, says every option, and turns every mistake into one readable message."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model, make_tokenizer, preference_rows, write_jsonl
from transformers import AutoModelForCausalLM

from tdpo.cli import COMMANDS, main
from tdpo.commands.inspect import InspectOptions
from tdpo.commands.options import parse
from tdpo.commands.train import OPTIONS as TRAIN_OPTIONS
from tdpo.config import EvalDataConfig
from tdpo.errors import UserError
from tdpo.files import check_outputs

QUICK = [
    "--max_length=96", "--max_prompt_length=48", "--max_steps=2", "--save_strategy=no", "--use_cpu", "--disable_tqdm",
]  # fmt: skip


def mistake(capsys: pytest.CaptureFixture, *words: object) -> str:
    """Runs a command that must fail as a user's mistake; returns the one message."""
    assert main([str(word) for word in words]) == 2
    output = capsys.readouterr().err
    assert "Traceback" not in output
    assert output.startswith("tdpo ")
    return output


def train(model: object, data: object, out: object, *more: object) -> list[object]:
    return [
        "train", "--model_name_or_path", model, "--dataset_name", data, "--output_dir", out, *QUICK, *more,
    ]  # fmt: skip


def test_help_answers_in_under_a_second() -> None:
    start = time.perf_counter()
    output = subprocess.run([sys.executable, "-m", "tdpo", "--help"], capture_output=True, text=True, check=True).stdout
    assert time.perf_counter() - start < 1
    assert all(f"  {name} " in output for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_has_a_line_for_every_option(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    output = capsys.readouterr().out
    options = re.findall(r"^  --(\w+)[^\n]*?(?:\s{2,}(\S.*)|\n\s{10,}(\S.*))$", output, re.M)
    assert len(options) == len(re.findall(r"^  --", output, re.M)) >= 2
    for name, same_line, next_line in options:
        assert len(same_line or next_line) > 10, name
    if command == "train":
        assert {field.name for kind in TRAIN_OPTIONS for field in dataclasses.fields(kind) if field.init} == {
            name for name, *_ in options
        }


def test_version_is_printed(capsys: pytest.CaptureFixture) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_yaml_and_command_line_are_one_grammar(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "eval_strategy: no\nmodel_name_or_path: m\ndataset_name: d\noutput_dir: o\nlearning_rate: 5e-6\n"
        "beta: 0.3\nresume: true\n"
        "report_to: none\nlr_scheduler_kwargs: {num_cycles: 2}\neval_dataset_name: null\n"
    )
    model, *_, data, args = parse("train", TRAIN_OPTIONS, ["--config", str(file), "--beta", "0.5", "--use_cpu"])
    assert (model.model_name_or_path, data.dataset_name, data.eval_dataset_name) == ("m", "d", None)
    assert (args.learning_rate, args.beta, args.resume) == (5e-6, 0.5, True)
    assert args.eval_strategy == "no"
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lerning_rate: 1", "unknown key 'lerning_rate'. Did you mean 'learning_rate'?"),
        ("- a\n- b", "expected a mapping"),
        ("a: [", "not valid YAML"),
        ("max_steps: many", "argument --max_steps: invalid int value: 'many'"),
    ],
)
def test_mistakes_in_a_config_file_are_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as raised:
        parse("train", TRAIN_OPTIONS, ["--config", str(file)])
    assert message in str(raised.value)


def test_mistakes_in_options_are_named(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    start = ["train", "--model_name_or_path", "m", "--dataset_name", "d.jsonl", "--output_dir", str(tmp_path / "o")]
    assert "no command 'trian'" in mistake(capsys, "trian")
    assert "Did you mean 'train'?" in mistake(capsys, "trian")
    assert "unknown option --bta. Did you mean 'beta'?" in mistake(capsys, *start, "--bta", "1")
    assert "--objective dpo: dpo has no alpha (tdpo2, fdpo do)" in mistake(
        capsys, *start, "--objective", "dpo", "--alpha", "0.5"
    )
    assert "unknown objective 'ppo'; there are: dpo, tdpo1" in mistake(capsys, *start, "--objective", "ppo")
    assert "--model_name_or_path" in mistake(capsys, "train")
    assert "nofile.yaml: No such file" in mistake(capsys, *start, "--config", "nofile.yaml")
    assert "arguments are required: --output_dir" in mistake(capsys, *start[:5])
    assert "a value without an option: stray" in mistake(capsys, *start, "stray")


def test_mistakes_in_data_are_named(
    capsys: pytest.CaptureFixture, tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    def output(rows: list[Any], *more: object) -> str:
        data = write_jsonl(tmp_path / "data.jsonl", rows)
        return mistake(capsys, *train(model_folder, data, tmp_path / "out", *more))

    rows = preference_rows(20)
    assert "missing.jsonl: no such file or folder" in mistake(
        capsys, *train(model_folder, "missing.jsonl", tmp_path / "out")
    )
    assert "no column 'rejected'; found the columns 'prompt', 'chosen'" in output([{"prompt": "a", "chosen": "b"}])
    assert "data.jsonl, row 17: field 'chosen' must be a text or a list of chat messages, found the number 3" in output(
        [*rows[:16], {**rows[16], "chosen": 3}, *rows[17:]]
    )
    assert "data.jsonl, row 2: field 'rejected' is an empty response" in output([rows[0], {**rows[1], "rejected": ""}])
    assert "no pair is left" in output([{**rows[0], "rejected": rows[0]["chosen"]}])
    chat, answer = ([{"role": role, "content": "Hi"}] for role in ("user", "assistant"))
    assert "no chat template" in output([{"prompt": chat, "chosen": answer, "rejected": answer * 2}])
    assert "row 1: prompt" in output([{**rows[0], "chosen": "x " * 200}], "--on_overlong", "error")
    assert "nowhere.jsonl: no such file" in mistake(
        capsys, *train(model_folder, pairs_file, tmp_path / "out", "--eval_dataset_name", "nowhere.jsonl")
    )


def test_mistakes_in_models_and_tokenizers_are_named(
    capsys: pytest.CaptureFixture, tmp_path: Path, pairs_file: Path, model_folder: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty}: no tokenizer in this folder" in mistake(capsys, *train(empty, pairs_file, tmp_path / "o"))
    make_tokenizer().save_pretrained(empty)
    assert f"{empty}: no model in this folder (it has no config.json)" in mistake(
        capsys, *train(empty, pairs_file, tmp_path / "o")
    )
    assert "./none: no such folder" in mistake(capsys, *train("./none", pairs_file, tmp_path / "o"))
    assert "is a file; a tokenizer is a folder" in mistake(capsys, *train(pairs_file, pairs_file, tmp_path / "o"))

    ended = make_tokenizer()
    ended.eos_token = ended.pad_token = None
    ended.save_pretrained(tmp_path / "endless")
    endless = ["--tokenizer_name_or_path", tmp_path / "endless"]
    assert "no end-of-sequence token" in mistake(capsys, *train(model_folder, pairs_file, tmp_path / "o", *endless))
    assert "'<end>' is not a token of the tokenizer" in mistake(
        capsys, *train(model_folder, pairs_file, tmp_path / "o", *endless, "--eos_token", "<end>")
    )

    make_model(100).save_pretrained(tmp_path / "small")
    small = train(tmp_path / "small", pairs_file, tmp_path / "o", "--tokenizer_name_or_path", model_folder)
    assert re.search(r"the tokenizer has \d+ tokens, the model's vocabulary 100 entries", mistake(capsys, *small))
    other = train(model_folder, pairs_file, tmp_path / "o", "--ref_model_name_or_path", tmp_path / "small")
    assert re.search(r"the policy's vocabulary has \d+ entries, the reference's 100", mistake(capsys, *other))

    broken = tmp_path / "broken"
    make_model(100).save_pretrained(broken)
    make_tokenizer().save_pretrained(broken)
    (broken / "model.safetensors").write_bytes(b"not safetensors")
    assert f"model '{broken}' cannot be loaded" in mistake(capsys, *train(broken, pairs_file, tmp_path / "o"))


def test_an_end_token_may_be_named(tmp_path: Path, pairs_file: Path, model_folder: Path) -> None:
    ended = make_tokenizer()
    ended.eos_token = None
    ended.save_pretrained(tmp_path / "endless")
    words = train(model_folder, pairs_file, tmp_path / "o", "--tokenizer_name_or_path", tmp_path / "endless")
    assert main([str(word) for word in [*words, "--eos_token", "."]]) == 0


def test_output_that_would_be_lost_is_protected(
    capsys: pytest.CaptureFixture, tmp_path: Path, pairs_file: Path, model_folder: Path
) -> None:
    words = train(model_folder, pairs_file, tmp_path / "out")
    assert main([str(word) for word in words]) == 0
    capsys.readouterr()
    assert "already holds config.json, model.safetensors, training_args.bin: --resume" in mistake(capsys, *words)
    assert main([str(word) for word in [*words, "--overwrite_output_dir"]]) == 0
    (tmp_path / "file").write_text("")
    capsys.readouterr()
    assert "cannot be written" in mistake(capsys, *train(model_folder, pairs_file, tmp_path / "file" / "out"))


def test_overwriting_leaves_nothing_of_the_earlier_run(
    capsys: pytest.CaptureFixture, tmp_path: Path, pairs_file: Path, model_folder: Path
) -> None:
    out = tmp_path / "out"
    words = train(model_folder, pairs_file, out, "--save_strategy", "steps", "--save_steps", "1")
    assert main([str(word) for word in words]) == 0
    for name in ("adapter_config.json", "chat_template.jinja", "keep.txt"):
        (out / name).write_text("{}")
    again = [*train(model_folder, pairs_file, out), "--overwrite_output_dir"]
    assert main([str(word) for word in again]) == 0
    left = {path.name for path in out.iterdir()}
    assert not left & {"checkpoint-1", "checkpoint-2", "adapter_config.json", "chat_template.jinja"}
    assert {"keep.txt", "model.safetensors"} <= left
    capsys.readouterr()
    assert "contradict each other" in mistake(capsys, *again, "--resume")
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "a", "chosen": 3, "rejected": "b"}])
    mistake(capsys, *train(model_folder, bad, out, "--overwrite_output_dir"))
    assert (out / "model.safetensors").is_file(), "a mistake in the data costs nothing"
    inner = out / "checkpoint-7"
    shutil.copytree(model_folder, inner)
    output = mistake(capsys, *train(inner, pairs_file, out, "--overwrite_output_dir"))
    assert "would remove a model" in output and (inner / "model.safetensors").is_file()
    own = train(out, pairs_file, out, "--overwrite_output_dir")
    assert "is the folder a model is read from" in mistake(capsys, *own)
    assert (out / "model.safetensors").is_file()


def test_resume_goes_on_from_the_newest_checkpoint(
    capsys: pytest.CaptureFixture, tmp_path: Path, pairs_file: Path, model_folder: Path
) -> None:
    saving = ["--save_strategy", "steps", "--save_steps", "1", "--lr_scheduler_type", "constant"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out, steps, more in ((whole, 2, []), (parts, 1, []), (parts, 2, ["--resume"])):
        words = train(model_folder, pairs_file, out, *saving, "--max_steps", steps, *more)
        assert main([str(word) for word in words]) == 0
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()


def test_mistakes_that_transformers_notices_are_told_in_words(
    capsys: pytest.CaptureFixture, tmp_path: Path, pairs_file: Path, model_folder: Path
) -> None:
    def output(*more: object) -> str:
        return mistake(capsys, *train(model_folder, pairs_file, tmp_path / "out", *more))

    assert "--per_device_train_batch_size must be at least 1, got 0" in output("--per_device_train_batch_size", 0)
    assert "--learning_rate must be at least 0, got nan" in output("--learning_rate", "nan")
    assert "--logits_budget must be at least 1" in output("--logits_budget", "-5")
    assert "--bf16_full_eval" in output("--bf16_full_eval")
    assert "eval_dataset" in output("--eval_strategy", "epoch")
    assert "nonsense" in output("--lr_scheduler_type", "nonsense")
    assert "tensorboard" in output("--report_to", "tensorboard").lower()
    held_out = ["--eval_dataset_name", pairs_file, "--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 1]
    best = ["--save_strategy", "steps", "--load_best_model_at_end", "--metric_for_best_model", "eval_accuracy"]
    assert "--metric_for_best_model eval_accuracy: no such metric" in output(*held_out, *best)


def test_a_model_without_a_head_is_not_given_a_random_one(
    capsys: pytest.CaptureFixture, tmp_path: Path, pairs_file: Path, tokenizer: Any
) -> None:
    from transformers import LlamaForSequenceClassification

    config = make_model(len(tokenizer)).config
    config.tie_word_embeddings, config.pad_token_id = False, 0
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    output = mistake(capsys, *train(tmp_path / "classifier", pairs_file, tmp_path / "out"))
    assert "lacks weights of LlamaForCausalLM, which would be drawn at random: lm_head.weight" in output


def test_square_brackets_in_a_path_are_only_characters(
    capsys: pytest.CaptureFixture, tmp_path: Path, model_folder: Path
) -> None:
    folder = tmp_path / "[bold]" / "[" / "b]"
    folder.mkdir(parents=True)
    data = write_jsonl(folder / "pairs.jsonl", preference_rows(4))
    assert main([str(word) for word in train(model_folder, data, folder / "[out]")]) == 0
    assert f"saved to {folder}/[out]" in capsys.readouterr().out


def test_train_and_eval_write_one_flat_object(
    capsys: pytest.CaptureFixture, tmp_path: Path, pairs_file: Path, model_folder: Path
) -> None:
    words = train(model_folder, pairs_file, tmp_path / "out", "--eval_dataset_name", pairs_file)
    assert main([str(word) for word in words]) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    output = capsys.readouterr().out
    assert "pairs.jsonl (preference): 24 rows, 24 kept" in output and "objective tdpo2(beta=0.1, alpha=0.5)" in output
    figures = tmp_path / "deep" / "figures.json"
    words = [
        "eval", "--model_name_or_path", tmp_path / "out", "--ref_model_name_or_path", model_folder,
        "--dataset_name", pairs_file, "--json", figures, *QUICK[:2],
    ]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    metrics = json.loads(figures.read_text())
    assert {"loss", "rewards/accuracies", "implicit_rewards/accuracies", "kl/chosen"} <= metrics.keys()
    assert all(isinstance(value, float) for value in metrics.values())
    again = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert metrics["kl/rejected"] == pytest.approx(again["eval_kl/rejected"], rel=1e-4)


def test_sft_learns_the_chosen_responses_and_says_the_loss(
    capsys: pytest.CaptureFixture, tmp_path: Path, pairs_file: Path, model_folder: Path
) -> None:
    words = [
        "sft", "--model_name_or_path", model_folder, "--dataset_name", pairs_file, "--eval_dataset_name", pairs_file,
        "--output_dir", tmp_path / "out", "--max_steps", "20", "--learning_rate", "1e-2", "--use_cpu",
        "--disable_tqdm", "--save_strategy", "no", "--max_length", "96", "--eval_on_start",
    ]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [log["eval_loss"] for log in history if "eval_loss" in log]
    assert losses[-1] < 0.7 * losses[0]
    assert f"held-out loss {losses[-1]:.4f} nats per token" in capsys.readouterr().out


def test_generate_shows_policy_and_reference_side_by_side(
    capsys: pytest.CaptureFixture, tmp_path: Path, pairs_file: Path, model_folder: Path
) -> None:
    words = [
        "generate", "--model_name_or_path", model_folder, "--ref_model_name_or_path", model_folder,
        "--dataset_name", pairs_file, "--num_prompts", "3", "--num_samples", "2", "--max_new_tokens", "5",
        "--json", tmp_path / "samples.jsonl",
    ]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in preference_rows(3)]
    assert all(line["policy"] == line["reference"] and len(line["policy"]) == 2 for line in lines), (
        "one seed, one model"
    )
    assert "policy" in capsys.readouterr().out
    assert "give either --prompt or --dataset_name" in mistake(capsys, *words[:5])
    assert "leave no room" in mistake(capsys, *words[:5], "--prompt", "The", "--max_new_tokens", "128")
    assert "--top_p must be in (0, 1], got 2" in mistake(capsys, *words[:5], "--prompt", "The", "--top_p", "2")


def test_ctrl_c_ends_with_a_word_and_code_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    import tdpo.commands.train as command

    def interrupted(argv: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupted)
    assert main(["train"]) == 130
    assert "tdpo train: interrupted" in capsys.readouterr().err


def test_the_module_runs_as_launchers_run_it(tmp_path: Path) -> None:
    output = subprocess.run([sys.executable, "-m", "tdpo", "train", "--bta", "1"], capture_output=True, text=True)
    assert output.returncode == 2 and "Traceback" not in output.stderr


def test_a_mixture_in_yaml_is_read_split_and_counted(
    capsys: pytest.CaptureFixture, tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    odd = [{"question": r["prompt"], "good": r["chosen"], "bad": r["rejected"]} for r in preference_rows(20)]
    write_jsonl(tmp_path / "odd.jsonl", odd)
    (tmp_path / "run.yaml").write_text(
        f"datasets:\n- {{name: {pairs_file}, weight: 2}}\n- name: {tmp_path / 'odd.jsonl'}\n"
        "  columns: {prompt: question, chosen: good, rejected: bad}\ntest_fraction: 0.3\nsplit_seed: 1\n"
    )
    out = tmp_path / "out"
    words = ["train", "--config", tmp_path / "run.yaml", "--model_name_or_path", model_folder, "--output_dir", out]
    assert main([str(word) for word in [*words, *QUICK]]) == 0
    output = " ".join(capsys.readouterr().out.split())
    read = re.findall(r"\(preference\): 44 rows, (\d+) (?:kept|pairs of them), (\d+) on the other side", output)
    (train, held_out), (test, rest) = [tuple(map(int, counts)) for counts in read]
    assert test > 0 and f"held out: {test} pairs" in output
    prompts = [row["prompt"] for row in (*preference_rows(24), *preference_rows(20))]
    from tdpo.config.row_spec import Side

    ours = [Side(0.3, 1, True).holds(prompt) for prompt in prompts]
    assert rest == ours.count(False) == 44 - held_out
    assert test == sum(ours) + sum(ours[:24]) and train == 44 - sum(ours) + 24 - sum(ours[:24])
    assert "either --dataset_name or --datasets" in mistake(capsys, *words, "--dataset_name", pairs_file)
    assert "--dataset_name" in mistake(capsys, *words[:1], *words[3:])


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--output_dir"],
        ["check-data", "--json"],
        ["cache-reference", "--reference_cache"],
        ["weights", "--guide_model", "guide", "--output_dir"],
        ["frontier", "--objectives", "dpo", "--output_dir"],
    ],
    ids=lambda words: words[0],
)
def test_format_options_beside_a_mixture_are_refused_everywhere(
    words: list[str], capsys: pytest.CaptureFixture, tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    words = [*words, str(tmp_path / "out"), "--model_name_or_path", str(model_folder), "--datasets", str(pairs_file)]
    assert "--columns and --datasets contradict each other" in mistake(capsys, *words, "--columns", "prompt=question")


@pytest.mark.parametrize("command", ["eval", "inspect"])
def test_a_model_that_is_not_there_is_named(command: str, capsys: pytest.CaptureFixture, pairs_file: Path) -> None:
    words = [command, "--dataset_name", pairs_file, "--ref_model_name_or_path", "./no-such-model"]
    words += ["--format", "terminal"] if command == "inspect" else []
    assert "./no-such-model: no such folder" in mistake(capsys, *words, "--model_name_or_path", "./no-such-model")
    assert "model 'no such' cannot be loaded" in mistake(capsys, *words, "--model_name_or_path", "no such")


def test_paths_from_the_home_folder_mean_the_same_everywhere(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path, pairs_file: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pairs.jsonl").write_bytes(pairs_file.read_bytes())
    (tmp_path / "run.yaml").write_text("dataset_name: ~/pairs.jsonl\nfix: ~/pairs.jsonl\n")
    words = ["check-data", "--model_name_or_path", model_folder, "--config", tmp_path / "run.yaml"]
    assert "--fix ~/pairs.jsonl".replace("~", str(tmp_path)) in mistake(capsys, *words)
    assert (tmp_path / "pairs.jsonl").read_bytes() == pairs_file.read_bytes()
    (data,) = parse("train", (EvalDataConfig,), ["--datasets", "~/a.jsonl,weight=2", "b", "--eval_dataset_name=~/c"])
    assert (data.datasets, data.eval_dataset_name) == ([f"{tmp_path}/a.jsonl,weight=2", "b"], f"{tmp_path}/c")
    pair = ["--prompt", "~/ is home", "--chosen", "~/a", "--rejected", "b", "--ref_model_name_or_path=~/m"]
    (asked,) = parse("inspect", (InspectOptions,), [*pair, "--format", "terminal"])
    assert (asked.prompt, asked.chosen, asked.ref_model_name_or_path) == ("~/ is home", "~/a", f"{tmp_path}/m")


def test_an_output_may_be_named_from_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    check_outputs(None, "~/figures/of-today.json")
    assert [path.name for path in tmp_path.iterdir()] == ["figures"]


def test_scored_completions_are_learnt_compared_and_sampled(
    capsys: pytest.CaptureFixture, tmp_path: Path, model_folder: Path
) -> None:
    rows = [{"q": f"The {n}", "completion": f" is {i}", "reward": i} for n in ("river", "garden") for i in range(4)]
    data = write_jsonl(tmp_path / "scored.jsonl", rows)
    named = ["--columns", "prompt=q"]
    words = [*train(model_folder, data, tmp_path / "out"), *named, "--pairs_from", "margin", "--min_margin", "2"]
    assert main([str(word) for word in words]) == 0
    assert "(scored): 8 rows, 6 kept" in capsys.readouterr().out
    words = ["--model_name_or_path", model_folder, "--dataset_name", data, *named]
    tuned = ["--output_dir", tmp_path / "sft", "--max_steps", 1, "--use_cpu", "--disable_tqdm", "--save_strategy", "no"]
    assert main([str(word) for word in ["sft", *words, *tuned, "--dataset_format", "scored"]]) == 0
    assert "(scored): 8 rows, 2 kept" in capsys.readouterr().out, "the best completion of each prompt"
    samples = ["--json", tmp_path / "samples.jsonl", "--max_new_tokens", 2, "--num_prompts", 100]
    assert main([str(word) for word in ["generate", *words, *samples]]) == 0
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert prompts == [row["q"] for row in rows]
    assert "unknown dataset format 'scord'" in mistake(capsys, "generate", *words, "--dataset_format", "scord")
    assert "--min_margin belong together" in mistake(capsys, *train(model_folder, data, "o"), "--min_margin", "2")
    assert "unknown dataset format 'scord'" in mistake(
        capsys, *train(model_folder, data, "o"), "--dataset_format", "scord"
    )
