"""The sweep of ``tdpo frontier``: its runs, their rows, what it refuses, and that killing it changes no byte."""

from __future__ import annotations

import csv
import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import make_model, make_tokenizer, preference_rows, write_jsonl
from filelock import FileLock
from runs import finish, start

from tdpo import TDPOConfig, UserError
from tdpo.cli import main
from tdpo.commands import frontier
from tdpo.commands.options import parse
from tdpo.config import EvalDataConfig
from tdpo.config.tokens import Rendering
from tdpo.data.tokenise import Tokeniser
from tdpo.demo import world
from tdpo.demo.run import DemoOptions, _build, _make_pairs
from tdpo.rl.common import ScoredPrompts
from tdpo.rl.ppo import PPOOptions
from tdpo.sweep import Sweep, SweepOptions, plan

REWARD = "tdpo.demo.grammar:rewards"


@pytest.fixture(scope="module")
def small_world(tmp_path_factory) -> Path:
    """The demo's world, its SFT model and pairs, at a size of seconds."""
    folder = tmp_path_factory.mktemp("world")
    options = DemoOptions(sft_texts=400, train_prompts=16, held_out_prompts=16, max_new_tokens=32)
    prompts = _build(options, folder)
    words = [
        "sft",
        "--model_name_or_path",
        folder / "base",
        "--dataset_name",
        folder / "sft.jsonl",
        "--max_steps",
        "50",
    ]
    words += ["--output_dir", folder / "sft", "--learning_rate", "3e-3", "--save_strategy", "no", "--use_cpu"]
    words += ["--per_device_train_batch_size", "32"]
    assert main([str(word) for word in words]) == 0
    _make_pairs(options, folder, prompts)
    return folder


def sweep_words(folder: Path, out: Path, *more: str) -> list[str]:
    words = ["frontier", "--model_name_or_path", folder / "sft", "--dataset_name", folder / "pairs"]
    words += [
        "--eval_dataset_name",
        folder / "pairs",
        "--output_dir",
        out,
        "--prompts_dataset_name",
        folder / "prompts.jsonl",
        "--reward",
        REWARD,
        "--use_cpu",
    ]
    words += ["--max_steps", "4", "--eval_steps", "2", "--per_device_train_batch_size", "4", "--learning_rate", "1e-3"]
    words += ["--max_new_tokens", "16", "--max_length", "96", "--max_prompt_length", "48", *more]
    return [str(word) for word in words]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


GRID = ["--objectives", "dpo", "tdpo2", "--alphas", "0.5", "--betas", "0.1", "--seeds", "0", "1"]


@pytest.fixture(scope="module")
def whole(small_world, tmp_path_factory) -> Path:
    """A sweep of two objectives and two seeds that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "out"
    code, output = finish(start(sweep_words(small_world, out, *GRID)), timeout=240)
    assert code == 0, output
    return out


def test_rows_are_of_every_run_and_measurement(whole):
    rows = read(whole / "frontier.csv")
    names = list(rows[0])
    assert ",".join(names[:10]) == "objective,beta,alpha,learning_rate,seed,step,reward,reward_se,kl,kl_se"
    assert {"entropy", "length", "distinct_2", "kl_reference_policy", "accuracy", "kl_chosen"} <= set(names)
    found = [(row["objective"], row["beta"], row["alpha"], row["seed"], row["step"]) for row in rows]
    assert found == [("sft", "", "", "", "0")] + [
        (objective, "0.1", "0.5" if objective == "tdpo2" else "", seed, step)
        for objective in ("dpo", "tdpo2")
        for seed in ("0", "1")
        for step in ("2", "4")
    ]
    assert float(rows[0]["kl"]) == 0.0
    assert all(float(row["kl"]) > 0 for row in rows[1:])
    assert rows[1]["kl"] != rows[3]["kl"]  # the seeds differ


def test_rows_are_what_measuring_by_hand_gives(whole, small_world):
    samples = [json.loads(line) for line in (whole / "samples-sft.jsonl").read_text().splitlines()]
    sft = read(whole / "frontier.csv")[0]
    assert len(samples) == 16
    assert float(sft["reward"]) == pytest.approx(sum(sample["reward"] for sample in samples) / 16, abs=1e-12)


def test_killed_twice_it_ends_with_the_same_bytes(whole, small_world, tmp_path):
    out, rng = tmp_path / "out", random.Random()
    seed = rng.randrange(10**6)
    rng.seed(seed)
    print("moments drawn with", seed)
    for _ in range(2):
        run = start(sweep_words(small_world, out, *GRID))
        before, wanted = len(list(out.glob("runs/*/step-*"))), rng.randrange(1, 6)
        while run.poll() is None and len(list(out.glob("runs/*/step-*"))) < before + wanted:
            time.sleep(0.02)
        time.sleep(rng.random() * 0.5)
        run.send_signal(signal.SIGKILL)
        run.wait()
    code, output = finish(start(sweep_words(small_world, out, *GRID)), timeout=240)
    assert code == 0, output
    for name in ("frontier.csv", "frontier.png", "frontier.svg"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_workers_give_the_same_rows(whole, small_world, tmp_path):
    code, output = finish(start(sweep_words(small_world, tmp_path / "out", *GRID, "--workers", "2")), timeout=240)
    assert code == 0, output
    assert "worker 0:" in output and "worker 1:" in output
    assert (tmp_path / "out" / "frontier.csv").read_bytes() == (whole / "frontier.csv").read_bytes()


def test_a_finished_sweep_is_extended_and_another_is_refused(whole, small_world, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before = (out / "frontier.csv").read_text()
    more = [*GRID, "--runs", '{"objective": "ipo", "beta": [0.5], "label": "mine"}', "--max_steps", "4"]
    assert main(sweep_words(small_world, out, *more)) == 0
    rows = read(out / "frontier.csv")
    assert [(row["objective"], row["label"], row["step"]) for row in rows[-4:]] == [
        ("ipo", "mine", "2"),
        ("ipo", "mine", "4"),
    ] * 2 or (
        [(row["objective"], row["label"], row["step"]) for row in rows[-2:]]
        == [("ipo", "mine", "2"), ("ipo", "mine", "4")]
    )
    assert (out / "frontier.csv").read_text().startswith(before)
    capsys.readouterr()
    assert main(sweep_words(small_world, out, *GRID, "--warmup_steps", "1")) == 2
    assert "holds a run with another warmup_steps" in capsys.readouterr().err
    shutil.copytree(small_world / "pairs", tmp_path / "fewer")
    train = tmp_path / "fewer" / "train.jsonl"
    train.write_text("".join(train.read_text().splitlines(keepends=True)[:-1]))
    assert main(sweep_words(small_world, out, *GRID, "--dataset_name", str(tmp_path / "fewer"))) == 2
    assert "holds a run with another pairs;" in capsys.readouterr().err
    shutil.rmtree(out / "runs")  # what the message asks for is not enough: the SFT model's row is another too
    assert main(sweep_words(small_world, out, *GRID, "--num_prompts", "2")) == 2
    assert f"{out} holds a run with another prompts;" in capsys.readouterr().err


@pytest.fixture
def once(monkeypatch):
    """Calls a function before the measurement of a step."""
    real = Sweep._write_samples

    def at(step: int, action) -> None:
        def write(self, path, samples):
            if path.name == "samples.jsonl" and len(list(path.parent.glob("step-*"))) == step // 2 - 1:
                action()
            real(self, path, samples)

        monkeypatch.setattr(Sweep, "_write_samples", write)

    return at


@pytest.mark.parametrize("step", [2, 4])
def test_a_signal_while_measuring_stops_the_sweep(step, whole, small_world, tmp_path, once, monkeypatch, capsys):
    out, signals = tmp_path / "out", []

    def interrupt() -> None:
        if not signals:
            signals.append(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

    once(step, interrupt)
    words = sweep_words(small_world, out, *GRID)
    assert main(words) == 128 + signal.SIGTERM
    message = " ".join(capsys.readouterr().err.split())
    assert f"interrupted at step {min(step + 1, 4)} of 4 of dpo" in message  # after the step that follows the signal
    assert "the same command resumes the sweep" in message
    assert "--resume" not in message
    assert [path.name for path in sorted(out.glob("runs/*/step-*"))] == ["step-0000002.json", "step-0000004.json"][
        : step // 2
    ]
    assert not (out / "frontier.csv").exists()
    assert main(words) == 0
    assert (out / "frontier.csv").read_bytes() == (whole / "frontier.csv").read_bytes()


def test_a_run_of_another_process_is_named(whole, small_world, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    folder = next(out.glob("runs/dpo*"))
    (folder / "finished").unlink()
    with FileLock(folder / "run.lock"):
        run = start(sweep_words(small_world, out, *GRID))
        code, output = finish(run, timeout=240)
    assert code == 2
    assert f"{folder.name}: another process trains it" in output


def test_workers_take_the_gpus_this_process_may_use(monkeypatch):
    given = []

    class Process:
        def __init__(self, command, env, start_new_session):
            given.append(env["CUDA_VISIBLE_DEVICES"])

        def wait(self):
            return 0

    monkeypatch.setattr(frontier.subprocess, "Popen", Process)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5")
    assert frontier._start_workers([], 3) == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert frontier._start_workers([], 2) == []
    assert given == ["2", "GPU-5", "2", "0", "1"]


def test_of_a_mixture_no_prompts_are_held_out():
    data = EvalDataConfig(datasets=["x,weight=1"], test_fraction=0.5)
    with pytest.raises(UserError, match="give --prompts_dataset_name or --eval_dataset_name"):
        frontier._prompts(data, options(), config(), None, None)


def test_prompts_of_ppo_and_rloo_are_rendered_as_those_of_training(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ place }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    said = [[{"role": role, "content": text}] for role, text in (("user", " Why?"), ("assistant", " So."))]
    rows = [{"prompt": said[0], "chosen": said[1], "rejected": [{"role": "assistant", "content": " No."}]}]
    data = EvalDataConfig(dataset_name=str(write_jsonl(tmp_path / "chats.jsonl", rows)))
    tokeniser = Tokeniser(tokenizer, rendering=Rendering({"place": "The garden"}))
    (prompt,) = frontier._train_prompts(data, config(), tokeniser)
    assert (prompt.content, tokenizer.decode(prompt.ids)) == (said[0], "The garden Why?")
    scored = ScoredPrompts(make_model(len(tokenizer)), tokenizer, [prompt], len, PPOOptions(max_new_tokens=4))
    assert (scored.prompts, scored.ids) == ([said[0]], [prompt.ids])


def test_ppo_and_rloo_are_curves_too(small_world, tmp_path):
    pytest.importorskip("trl")
    out = tmp_path / "out"
    runs = [
        {
            "objective": name,
            "beta": 0.05,
            "steps": 2,
            "eval_every": 1,
            "batch_size": 4,
            "seed": 3,
            "learning_rate": 1e-3,
        }
        for name in ("ppo", "rloo")
    ]
    assert main(sweep_words(small_world, out, "--runs", *map(json.dumps, runs))) == 0
    rows = read(out / "frontier.csv")
    found = [(row["objective"], row["beta"], row["seed"], row["step"]) for row in rows[1:]]
    assert found == [(name, "0.05", "3", step) for name in ("ppo", "rloo") for step in ("1", "2")]
    assert all(0 < float(row["kl"]) < 100 for row in rows[1:])
    before = (out / "frontier.csv").read_bytes()
    assert main(sweep_words(small_world, out, "--runs", *map(json.dumps, runs))) == 0  # nothing is left to train
    assert (out / "frontier.csv").read_bytes() == before
    again = tmp_path / "again"
    assert main(sweep_words(small_world, again, "--runs", *map(json.dumps, runs))) == 0
    assert (again / "frontier.csv").read_bytes() == before


def test_an_adapter_and_other_pairs(small_world, tmp_path, capsys):
    shutil.copytree(small_world / "pairs", tmp_path / "fewer")
    train = tmp_path / "fewer" / "train.jsonl"
    train.write_text("".join(train.read_text().splitlines(keepends=True)[:6]))
    runs = [{"objective": "dpo"}, {"objective": "dpo", "dataset_name": str(tmp_path / "fewer"), "label": "fewer"}]
    words = sweep_words(small_world, tmp_path / "out", "--use_peft", "--lora_r", "2", "--runs", *map(json.dumps, runs))
    assert main([*words, "--save_models"]) == 0
    rows = read(tmp_path / "out" / "frontier.csv")
    assert [(row["label"], row["step"]) for row in rows] == [
        ("sft", "0"), ("dpo", "2"), ("dpo", "4"), ("fewer", "2"), ("fewer", "4")
    ]  # fmt: skip
    assert rows[2]["kl"] != rows[4]["kl"]
    assert all(float(row["kl"]) > 0 for row in rows[1:])
    models = sorted(path.parent.name for path in (tmp_path / "out").glob("runs/*/model/adapter_config.json"))
    assert len(models) == 2
    capsys.readouterr()
    assert main([*words, "--objectives", "ppo"]) == 2
    assert "leave --use_peft out" in capsys.readouterr().err


def test_runs_may_differ_in_precision_and_move_their_reference(small_world, tmp_path):
    runs = [
        {"objective": "dpo"}, {"objective": "dpo", "bf16": True, "label": "half"},
        {"objective": "dpo", "sync_ref_model": True, "ref_model_sync_steps": 1, "label": "moved"},
    ]  # fmt: skip
    assert main(sweep_words(small_world, tmp_path / "out", "--runs", *map(json.dumps, runs))) == 0
    found = {row["label"]: float(row["kl"]) for row in read(tmp_path / "out" / "frontier.csv") if row["step"] == "4"}
    assert set(found) == {"dpo", "half", "moved"} and len(set(found.values())) == 3


def options(**fields) -> SweepOptions:
    return SweepOptions(**fields)


def config(**fields) -> TDPOConfig:
    return TDPOConfig(output_dir="out", max_steps=4, eval_steps=2, use_cpu=True, **fields)


def test_the_grid_gives_each_run_once_and_alpha_where_it_belongs():
    sweep = options(objectives=["dpo", "tdpo2"], betas=[0.1, 0.2], alphas=[0.3, 0.7], seeds=[4], learning_rates=[1e-4])
    found = [(run.columns["objective"], run.columns["beta"], run.columns["alpha"]) for run in plan(sweep, config())]
    assert found == [
        ("dpo", 0.1, ""), ("dpo", 0.2, ""), ("tdpo2", 0.1, 0.3), ("tdpo2", 0.1, 0.7), ("tdpo2", 0.2, 0.3),
        ("tdpo2", 0.2, 0.7),
    ]  # fmt: skip
    assert {(run.args.seed, run.args.learning_rate) for run in plan(sweep, config())} == {(4, 1e-4)}
    names = [run.name for run in plan(sweep, config())]
    assert len(set(names)) == 6
    assert names[0] == "dpo-beta=0.1-learning_rate=0.0001-seed=4"


def test_the_objective_alone_is_swept_too_and_lists_may_have_singular_names(tmp_path):
    assert [run.name for run in plan(options(betas=[0.1, 0.2]), config(objective="ipo"))] == [
        "ipo-beta=0.1", "ipo-beta=0.2"
    ]  # fmt: skip
    assert [run.name for run in plan(options(), config())] == ["tdpo2"]
    path = tmp_path / "sweep.yaml"
    path.write_text("objective: [dpo, ipo]\nbeta: [0.1, 0.3]\nseed: 7\nlearning_rates: 1e-4\noutput_dir: out\n")
    sweep, args = parse("frontier", (SweepOptions, TDPOConfig), ["--config", str(path)])
    assert (sweep.objectives, sweep.betas, sweep.learning_rates) == (["dpo", "ipo"], [0.1, 0.3], [1e-4])
    assert (sweep.seed, args.beta) == (7, None)


def test_entries_of_runs_take_lists_and_labels():
    sweep = options(
        runs=[
            '{"objective": "tdpo2", "alpha": [0.1, 0.9]}',
            '{"objective": "dpo", "token_weights": "decay:0.9", "label": "w"}',
        ],
        seeds=[0, 1],
    )
    runs = plan(sweep, config())
    assert [(run.label, run.columns["alpha"], run.args.seed) for run in runs] == [
        ("tdpo2", 0.1, 0), ("tdpo2", 0.9, 0), ("tdpo2", 0.1, 1), ("tdpo2", 0.9, 1), ("w", "", 0), ("w", "", 1)
    ]  # fmt: skip
    assert runs[-1].args.token_weights == "decay:0.9"
    assert "options" not in runs[0].columns
    assert runs[-1].columns["options"] == "token_weights=decay:0.9"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"runs": ["{objective"]}, "runs, entry 1: not a JSON object"),
        ({"runs": ['{"beta": 1}']}, "runs, entry 1: expected a mapping of options with an objective"),
        ({"runs": ['{"objective": "dpo", "bata": 1}']}, "no option 'bata'. Did you mean 'beta'"),
        ({"runs": ['{"objective": "dpo", "alpha": 1}']}, "the objective dpo has no alpha"),
        ({"runs": ['{"objective": "dpo", "max_length": 8}']}, "max_length is one for all runs"),
        ({"runs": ['{"objective": "rloo", "dataset_name": "x"}']}, "rloo takes its prompts from --dataset_name"),
        ({"objectives": ["tpdo2"]}, "unknown objective 'tpdo2'"),
        ({"objectives": ["dpo"], "betas": [-1.0]}, "beta must be"),
        ({"objectives": ["dpo"], "num_prompts": 1}, "--num_prompts must be at least 2"),
        ({"objectives": ["dpo"], "temperature": 0.7}, "change the samples and not the KL: leave them out"),
        ({"objectives": ["dpo"], "seed": -1}, "--seed must be at least 0, got -1"),
    ],
)
def test_refuses_what_cannot_be_swept(fields, message):
    with pytest.raises(UserError, match=message):
        plan(options(**fields), config())


@pytest.mark.parametrize(
    ("leave_out", "message"),
    [("--eval_dataset_name", "set --eval_dataset_name or --test_fraction"), ("--reward", "--reward is missing"),
     ("--eval_steps", "--eval_steps is missing")],
)  # fmt: skip
def test_names_what_is_missing_before_anything_is_loaded(leave_out, message, tmp_path, capsys):
    data = write_jsonl(tmp_path / "pairs.jsonl", preference_rows(4))
    words = ["frontier", "--model_name_or_path", "no-such-model", "--dataset_name", str(data)]
    words += ["--eval_dataset_name", str(data), "--output_dir", str(tmp_path / "out"), "--objectives", "dpo"]
    words += ["--reward", REWARD, "--eval_steps", "2", "--max_steps", "4"]
    index = words.index(leave_out)
    assert main(words[:index] + words[index + 2 :]) == 2
    assert message in capsys.readouterr().err
    assert main([*words, "--reference_cache", str(tmp_path / "cache")]) == 2
    assert "--reference_cache: a sweep keeps its own" in capsys.readouterr().err
    for option, value in (("--save_steps", "7"), ("--save_total_limit", "2"), ("--report_to", "tensorboard")):
        assert main([*words, option, value]) == 2
        assert f"{option}: " in capsys.readouterr().err
    assert main([*words, "--baseline", "tdpo1"]) == 2
    assert "--baseline tdpo1: there are dpo" in capsys.readouterr().err


def test_the_world_has_enough_pairs(small_world):
    assert world.VOCABULARY == 768
    assert len((small_world / "pairs" / "train.jsonl").read_text().splitlines()) >= 8
