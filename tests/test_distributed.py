"""One run, however it is shared: processes, accumulation and sharding give one trajectory, and nothing counts twice."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, preference_rows, write_jsonl
from runs import TORCHRUN, completed, environment, history, train_words, weights
from transformers import AutoModelForCausalLM

from tdpo.cli import main
from tdpo.commands import launch
from tdpo.commands.launch import PRESETS

WAYS = {"one": (1, 8, 1), "accumulated 2": (1, 4, 2), "accumulated 4": (1, 2, 4), "two processes": (2, 4, 1)}
"""Processes, pairs of a micro-batch and micro-batches of a step; every way takes 8 pairs a step."""
FIRST_GRADIENT, WEIGHTS, LOGS = 1e-6, 2e-6, 1e-4
"""Relative tolerances: gradient at step 1; weights (to the largest of a tensor) and logs after 30 float32 steps."""


@pytest.fixture(scope="module")
def odd_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 pairs: 3 are left for the last step of an epoch and for the last batch of an evaluation."""
    return write_jsonl(tmp_path_factory.mktemp("odd") / "pairs.jsonl", preference_rows(27))


def run(way: str, model: Path, data: Path, out: Path, *options: object) -> Path:
    """Trains with SGD, which shows every difference of gradients as one of weights, and evaluates."""
    processes, micro, accumulation = WAYS[way]
    words = train_words(
        model, data, out, "--optim", "sgd", "--lr_scheduler_type", "constant", "--logging_steps", 1,
        "--per_device_train_batch_size", micro, "--gradient_accumulation_steps", accumulation,
        "--per_device_eval_batch_size", 4, "--eval_dataset_name", data, "--save_strategy", "no", *options,
    )  # fmt: skip
    if processes == 1:
        assert main(words) == 0
    else:
        completed(words, processes)
    return out


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, odd_pairs: Path) -> dict[str, Path]:
    """The runs of the small world, 30 steps, one folder a way."""
    folder = tmp_path_factory.mktemp("ways")
    options = ["--max_steps", 30, "--learning_rate", 0.05, "--max_grad_norm", 100]
    ends = {way: run(way, model_folder, odd_pairs, folder / way, *options) for way in WAYS}
    return {**ends, "fsdp2": run_sharded(model_folder, odd_pairs, odd_pairs, folder / "fsdp2", 0.05)}


def run_sharded(model: Path, data: Path, held_out: Path, out: Path, learning_rate: float) -> Path:
    """The same in two processes whose policy is sharded by FSDP2."""
    args = {
        "optim": "sgd", "lr_scheduler_type": "constant", "logging_steps": 1, "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4, "save_strategy": "no", "max_steps": 30, "learning_rate": learning_rate,
        "max_grad_norm": 100, "max_length": 96, "max_prompt_length": 48, "use_cpu": True, "disable_tqdm": True,
        "output_dir": str(out),
    }  # fmt: skip
    options = out.with_suffix(".json")
    options.write_text(json.dumps({"model": str(model), "data": str(data), "held_out": str(held_out), "args": args}))
    script = [*TORCHRUN, "--nproc_per_node", "2", str(Path(__file__).with_name("fsdp2_run.py")), str(options)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def assert_same_trajectory(ours: Path, theirs: Path) -> None:
    """Loss, gradient norm and every metric of every step, then the weights."""
    logs, expected = history(ours), history(theirs)
    assert len(logs) == len(expected)
    for log, other in zip(logs, expected, strict=True):
        for name in other.keys() - {"epoch"}:  # transformers counts epochs in micro-batches, so a part of one differs
            tolerance = FIRST_GRADIENT if name == "grad_norm" and other["step"] == 1 else LOGS
            assert log[name] == pytest.approx(other[name], rel=tolerance, abs=1e-5), (other["step"], name)
    assert_same_weights(ours, theirs)


def assert_same_weights(ours: Path, theirs: Path) -> None:
    end, expected = weights(ours), weights(theirs)
    assert set(end) == set(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(end[name], weight, rtol=0, atol=WEIGHTS * weight.abs().max().item(), msg=name)


@pytest.mark.parametrize("way", [*[way for way in WAYS if way != "one"], "fsdp2"])
def test_the_trajectory_is_that_of_one_process(trajectories: dict[str, Path], model_folder: Path, way: str) -> None:
    assert_same_trajectory(trajectories[way], trajectories["one"])
    moved = weights(trajectories["one"])["model.norm.weight"] - weights(model_folder)["model.norm.weight"]
    assert moved.abs().max() > 1000 * WEIGHTS, "the run went somewhere"


def test_parameters_are_sharded_and_the_head_is_whole_in_the_step(trajectories: dict[str, Path]) -> None:
    told = json.loads((trajectories["fsdp2"] / "sharding.json").read_text())
    assert told["held"] < 0.6 * told["whole"]
    vocabulary, width = weights(trajectories["one"])["model.embed_tokens.weight"].shape
    assert told["heads"] == [f"Parameter [{vocabulary}, {width}]"], "a plain, whole tensor wherever the step reads it"


def test_an_evaluation_counts_every_pair_once(trajectories: dict[str, Path], odd_pairs: Path, tmp_path: Path) -> None:
    """27 pairs in two processes with batches of 4: the last round has three pairs for two processes."""
    one, *others = (
        json.loads((trajectories[way] / "eval_results.json").read_text()) for way in ("one", "two processes", "fsdp2")
    )
    for name in ("eval_loss", "eval_rewards/margins", "eval_kl/rejected", "eval_kl_per_token/chosen"):
        for other in others:
            assert other[name] == pytest.approx(one[name], rel=LOGS), name
    pairs = others[0]["eval_implicit_rewards/accuracies"] * 27
    assert pairs == pytest.approx(round(2 * pairs) / 2, abs=1e-4), "a mean over 27 pairs, ties counting a half"


def test_fewer_pairs_than_processes(tmp_path: Path, model_folder: Path) -> None:
    data = write_jsonl(tmp_path / "one.jsonl", preference_rows(1))
    ends = [
        run(way, model_folder, data, tmp_path / way, "--max_steps", 2, "--learning_rate", 0.05)
        for way in ("one", "two processes")
    ]
    assert_same_trajectory(ends[1], ends[0])


def test_a_real_model_on_real_dialogues_takes_one_trajectory(shared: Path, tmp_path: Path) -> None:
    from test_real_data import write_dialogues

    dialogues = write_dialogues(shared, tmp_path / "hh", 60, 12)
    model = shared / "data/models/stories260k"
    options = ["--max_steps", 30, "--learning_rate", 1e-3, "--max_grad_norm", 100]
    ways = ("one", "accumulated 4", "two processes")
    ends = {way: run(way, model, dialogues, tmp_path / way, *options) for way in ways}
    ends["fsdp2"] = run_sharded(model, dialogues / "train.jsonl", dialogues / "test.jsonl", tmp_path / "fsdp2", 1e-3)
    for way in ends:
        assert_same_trajectory(ends[way], ends["one"])
    losses = [log["loss"] for log in history(ends["one"]) if "loss" in log]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-5)


def test_what_several_processes_save_loads_as_any_model(trajectories: dict[str, Path], tokenizer: Any) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = [
        AutoModelForCausalLM.from_pretrained(trajectories[way])(input_ids=ids).logits
        for way in ("one", "two processes")
    ]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_what_accelerate_launch_makes_of_it(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    file = REPOSITORY / "src/tdpo/presets" / f"{preset}.yaml"
    words = ["--config_file", str(file), "--num_processes", "2", "--main_process_port", "0", "x.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    args.deepspeed_fields_from_accelerate_config = ""  # which there is only where deepspeed is installed
    theirs = prepare_deepspeed_cmd_env(args)[1] if preset == "zero2" else prepare_multi_gpu_env(args)
    ours = launch.environment_of(launch.read_config(preset))
    assert ours == {name: theirs[name] for name in ours}
    assert (theirs.get("ACCELERATE_USE_FSDP"), theirs.get("FSDP_VERSION")) == (
        ("true", "2") if preset == "fsdp2" else (None, None)
    )


def test_the_command_starts_its_own_processes(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    out = tmp_path / "out"
    words = train_words(model_folder, pairs_file, out, "--max_steps", 2, "--accelerate_config", "ddp")
    told = completed([*words, "--num_processes", "2"])
    assert (out / "checkpoint-2" / "rng_state_1.pth").is_file(), "two processes wrote it"
    assert told.count("saved to") == 1


def test_mistakes_about_processes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def told(*words: object) -> str:
        start = train_words(tmp_path / "m", tmp_path / "d", tmp_path / "o")
        assert main([*start, *map(str, words)]) == 2
        return capsys.readouterr().err

    assert "accelerate has no FSDP on a CPU" in told("--accelerate_config", "fsdp2")
    assert "no such file, nor a preset (ddp, fsdp2, zero2). Did you mean 'fsdp2'?" in told("--accelerate_config=fsdp")
    assert "--num_processes must be at least 1, got 0" in told("--accelerate_config", "ddp", "--num_processes", 0)
    assert "it has no effect alone" in told("--num_processes", 2)
    file = tmp_path / "run.yaml"
    file.write_text("accelerate_config: ddp\n")
    assert "give it on the command line" in told("--config", file)
    file.write_text("distributed_type: TPU\n")
    assert "distributed_type must be one of MULTI_GPU" in told("--accelerate_config", file)
    file.write_text("distributed_type: MULTI_GPU\nnum_machines: 2\n")
    assert "start torchrun on every machine" in told("--accelerate_config", file)
    file.write_text("distributed_type: FSDP\nfsdp: {}\n")
    assert "fsdp is not understood" in told("--accelerate_config", file)


def test_deepspeed_takes_the_same_trajectory(
    trajectories: dict[str, Path], model_folder: Path, odd_pairs: Path, tmp_path: Path
) -> None:
    """ZeRO-2 on CPUs over gloo; DeepSpeed compiles an extension at its first start, which takes a compiler and time."""
    pytest.importorskip("deepspeed", reason="needs deepspeed, which is no part of the test packages")
    words = train_words(
        model_folder, odd_pairs, tmp_path / "zero2", "--optim", "sgd", "--lr_scheduler_type", "constant",
        "--logging_steps", 1, "--per_device_train_batch_size", 4, "--per_device_eval_batch_size", 4,
        "--eval_dataset_name", odd_pairs, "--max_steps", 30, "--learning_rate", 0.05, "--max_grad_norm", 100,
        "--save_steps", 10, "--accelerate_config", "zero2", "--num_processes", 2,
    )  # fmt: skip
    completed(words, timeout=600, DS_ACCELERATOR="cpu")
    assert_same_trajectory(tmp_path / "zero2", trajectories["one"])
    shards = list((tmp_path / "zero2" / "checkpoint-30" / "global_step30").glob("*zero_pp_rank_*_optim_states.pt"))
    assert len(shards) == 2, "the optimizer was sharded"
