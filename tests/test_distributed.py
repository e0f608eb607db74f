"""Processes, accumulation and sharding give the trajectory of one process, and no pair counts twice."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, SHARED, preference_rows, write_jsonl
from runs import Weights, adapter_weights, completed, finish, history, start, train_words, weights
from test_real_data import write_dialogues
from transformers import AutoModelForCausalLM

from tdpo.cli import main
from tdpo.distributed import launch
from tdpo.distributed.launch import PRESETS

FIRST_GRADIENT, WEIGHTS, ADAPTER, LOGS = 2e-6, 1e-6, 5e-5, 1e-4
"""Relative tolerances: the gradient of step 1 and the weights after 30 steps, full ones or an adapter's, which start at
zero, to the largest entry of each tensor; and logs. All in float32."""
FIRST_NORM = 5e-6
"""Of the norm of the first step's gradient, as logged."""
ROUNDING = 2**-23
FULL_RATE, ADAPTER_RATE = 1e-3, 1e-2
TESTS = Path(__file__).parent
FSDP_ON_CPUS = TESTS / "fsdp_on_cpus"
LORA = ("--use_peft", "--lora_r", 4)


@dataclass(frozen=True)
class Way:
    """How a run is distributed; every way takes 8 pairs a step.

    Attributes:
        processes: Number of processes.
        micro: Pairs of a micro-batch of one process.
        accumulation: Micro-batches of a step.
        engine: The value of ``--accelerate_config``, or empty.
        options: Further options.
    """

    processes: int = 1
    micro: int = 8
    accumulation: int = 1
    engine: str = ""
    options: tuple[object, ...] = ()


WAYS = {
    "one": Way(),
    "accumulated 2": Way(micro=4, accumulation=2),
    "accumulated 4": Way(micro=2, accumulation=4),
    "cached": Way(options=("--reference", "cached")),
    "ddp": Way(2, 4),
    "fsdp2": Way(2, 4, engine="fsdp2"),
    "fsdp2, accumulated 2": Way(2, 2, 2, "fsdp2"),
    "zero2": Way(2, 4, engine="zero2"),
    "zero3": Way(2, 4, engine="zero3"),
}
"""All weights are trained, against a frozen reference unless the options name another."""
ADAPTED = {
    "frozen": Way(options=(*LORA, "--reference", "frozen")),
    "adapter_off": Way(options=LORA),
    "cached": Way(options=(*LORA, "--reference", "cached")),
    "adapter_off, ddp": Way(2, 4, options=LORA),
    "adapter_off, fsdp2": Way(2, 4, engine="fsdp2", options=LORA),
    "adapter_off, zero3": Way(2, 4, engine="zero3", options=LORA),
}
"""An adapter is trained; the reference is its base, in one form or another."""
OBJECTIVES = {
    "tdpo2": ("--objective", "tdpo2", "--token_weights", "decay:0.9"),
    "tbpo": ("--objective", "tbpo"),
    "simpo": ("--objective", "simpo"),
    "two passes": ("--objective", "test_objective_family:Squared"),
}
"""Objectives on pairs with token weights; the last one's gradient takes two passes over the logits."""
OBJECTIVE_WAYS = {
    "one": Way(),
    "ddp": Way(2, 4),
    "fsdp2": Way(2, 4, engine="fsdp2"),
    "zero3": Way(2, 4, engine="zero3"),
    "cached": Way(options=("--reference", "cached")),
    "checkpointed": Way(options=("--activation_checkpointing",)),
    "fsdp2, cached, checkpointed": Way(
        2, 4, engine="fsdp2", options=("--reference", "cached", "--activation_checkpointing")
    ),
}
"""What these are trained in."""


@dataclass(frozen=True)
class World:
    """The inputs of a run: a model's folder, training pairs and held-out pairs."""

    model: Path
    train: Path
    held_out: Path


@pytest.fixture(scope="module")
def odd_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 pairs: 3 are left for the last step of an epoch and for the last batch of an evaluation."""
    return write_jsonl(tmp_path_factory.mktemp("odd") / "pairs.jsonl", preference_rows(27))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, odd_pairs: Path) -> World:
    """Stories260k on dialogues of Anthropic HH where they are available, else a small model; both of odd counts."""
    if not (SHARED / "data").is_dir():
        return World(model_folder, odd_pairs, odd_pairs)
    dialogues = write_dialogues(SHARED, tmp_path_factory.mktemp("world") / "hh", 59, 11)
    return World(SHARED / "data/models/stories260k", dialogues / "train.jsonl", dialogues / "test.jsonl")


def run(way: Way, world: World, out: Path, *options: object) -> str:
    """Trains through the command line with SGD, which shows every difference of gradients as one of weights."""
    words = train_words(
        world.model, world.train, out, "--optim", "sgd", "--lr_scheduler_type", "constant", "--logging_steps", 1,
        "--per_device_train_batch_size", way.micro, "--gradient_accumulation_steps", way.accumulation,
        "--per_device_eval_batch_size", 4, "--save_strategy", "no", "--max_grad_norm", 100, *way.options, *options,
    )  # fmt: skip
    if way.processes == 1:
        assert main(words) == 0
        return ""
    environment = {"PYTHONPATH": str(TESTS)}  # where an objective of the tests' own is
    if not way.engine:
        return completed(words, way.processes, **environment)
    if way.engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="needs deepspeed: pip install 'tdpo[deepspeed]'")
        environment["DS_ACCELERATOR"] = "cpu"
    if way.engine == "fsdp2":
        environment["PYTHONPATH"] += os.pathsep + str(FSDP_ON_CPUS)
    engine = _zero3_of_small_weights(out.parent) if way.engine == "zero3" else way.engine
    words += ["--accelerate_config", engine, "--num_processes", str(way.processes)]
    return completed(words, timeout=300, **environment)  # DeepSpeed compiles an extension at its first start


def _zero3_of_small_weights(folder: Path) -> str:
    """ZeRO stage 3 that shards every weight; by default it replicates those of fewer than 100,000 numbers."""
    settings, file = folder / "zero3.json", folder / "zero3.yaml"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    settings.write_text(json.dumps({"zero_optimization": zero, **dict.fromkeys(sizes, "auto")}))
    section = f"deepspeed_config_file: {settings}\n  zero3_init_flag: false"
    file.write_text(f"distributed_type: DEEPSPEED\ndeepspeed_config:\n  {section}\n")
    return str(file)


class Runs:
    """The runs of one world, each started when it is first used."""

    def __init__(self, world: World, folder: Path, ways: dict[str, Way], *options: object) -> None:
        self.world, self.folder, self.ways, self.options = world, folder, ways, options
        self.outputs: dict[str, str] = {}

    def __getitem__(self, name: str) -> Path:
        out = self.folder / name.replace(" ", "-") / "out"
        if name not in self.outputs:
            out.parent.mkdir()
            self.outputs[name] = run(self.ways[name], self.world, out, *self.options)
        return out


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory, world: World) -> Runs:
    """30 steps of each way, and an evaluation."""
    options = ["--max_steps", 30, "--learning_rate", FULL_RATE, "--eval_dataset_name", world.held_out]
    return Runs(world, tmp_path_factory.mktemp("ways"), WAYS, *options)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, world: World) -> Runs:
    """The same of the ways that train an adapter."""
    options = ["--max_steps", 30, "--learning_rate", ADAPTER_RATE, "--eval_dataset_name", world.held_out]
    return Runs(world, tmp_path_factory.mktemp("adapted"), ADAPTED, *options)


@pytest.fixture(scope="module")
def objective_runs(tmp_path_factory: pytest.TempPathFactory, world: World) -> dict[str, Runs]:
    """30 steps of each objective. Every third pair has no weights, and the last step and evaluation one pair alone."""
    spans = {"chosen_weights": [[1, 10, 2.5], [12, 15, 0.0]], "rejected_kl_weights": [[1, 10, 3.0], [11, 13, 0.0]]}
    rows = [row | (spans if number % 3 else {}) for number, row in enumerate(preference_rows(66))]
    folder = tmp_path_factory.mktemp("objectives")
    files = write_jsonl(folder / "train.jsonl", rows[:57]), write_jsonl(folder / "test.jsonl", rows[57:])
    weighted, runs = World(world.model, *files), {}
    for name, options in OBJECTIVES.items():
        (folder / name).mkdir()
        common = ["--max_steps", 30, "--learning_rate", FULL_RATE, "--eval_dataset_name", weighted.held_out, *options]
        runs[name] = Runs(weighted, folder / name, OBJECTIVE_WAYS, *common)
    return runs


@pytest.fixture(scope="module")
def first_steps(tmp_path_factory: pytest.TempPathFactory, world: World) -> Runs:
    """One step of SGD at a rate of 1 each: it moves the weights by the gradient."""
    return Runs(world, tmp_path_factory.mktemp("first"), WAYS, "--max_steps", 1, "--learning_rate", 1)


def assert_same_trajectory(ours: Path, theirs: Path, end: Callable[[Path], Weights] = weights) -> None:
    """Compares loss, gradient norm and metrics of every step and of the evaluation, then the weights."""
    logs, expected = history(ours), history(theirs)
    assert len(logs) == len(expected) == 31
    for log, other in zip(logs, expected, strict=True):
        for name in other.keys() - {"epoch"}:  # transformers counts epochs in micro-batches, so a part of one differs
            if other.get("step") == 1 and name.endswith("accuracies"):
                continue  # at the start all margins are zero, and rounding decides who wins
            first = name == "grad_norm" and other["step"] == 1
            near = (
                pytest.approx(other[name], rel=FIRST_NORM) if first else pytest.approx(other[name], rel=LOGS, abs=3e-5)
            )
            assert log[name] == near, (other["step"], name)
    assert_close(end(ours), end(theirs), WEIGHTS if end is weights else ADAPTER)


def assert_close(ours: Weights, theirs: Weights, tolerance: float) -> None:
    """Compares every tensor, with a tolerance relative to its largest entry."""
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=tolerance * tensor.abs().max().item(), msg=name)


def ways(*quick: str, slow: tuple[str, ...] = ()) -> list[Any]:
    """Returns parameters; processes start slowly, so ways that others nearly cover run only with ``-m slow``."""
    return [*quick, *(pytest.param(way, marks=pytest.mark.slow) for way in slow)]


@pytest.mark.parametrize(
    "way",
    ways("accumulated 2", "accumulated 4", "cached", "ddp", "fsdp2", "zero3", slow=("fsdp2, accumulated 2", "zero2")),
)
def test_the_trajectory_is_that_of_one_process(trajectories: Runs, way: str) -> None:
    assert_same_trajectory(trajectories[way], trajectories["one"])


def test_training_moves_the_weights_and_starts_at_log_2(trajectories: Runs) -> None:
    start, end = weights(trajectories.world.model), weights(trajectories["one"])
    assert (end["model.norm.weight"] - start["model.norm.weight"]).abs().max() > 100 * WEIGHTS
    losses = [log["loss"] for log in history(trajectories["one"]) if "loss" in log]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize("way", ways("accumulated 4", "cached", "ddp", "fsdp2", slow=("zero2", "zero3")))
def test_the_gradient_of_the_first_step_is_that_of_one_process(first_steps: Runs, way: str) -> None:
    """Tensor by tensor, up to the rounding of the weights the gradient was added to."""
    start, ours, theirs = (weights(f) for f in (first_steps.world.model, first_steps[way], first_steps["one"]))
    for name, weight in start.items():
        gradient = (weight.double() - theirs[name].double()).abs().max().item()
        seen = FIRST_GRADIENT * gradient + ROUNDING * weight.abs().max().item()
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=seen, msg=name)
        assert gradient > 100 * seen, name


@pytest.mark.parametrize(
    "way", ways("adapter_off", "cached", "adapter_off, ddp", "adapter_off, fsdp2", slow=("adapter_off, zero3",))
)
def test_the_adapters_trajectory_equals_that_with_a_frozen_copy_of_its_base(adapted: Runs, way: str) -> None:
    assert_same_trajectory(adapted[way], adapted["frozen"], adapter_weights)


@pytest.mark.parametrize(
    ("objective", "way"),
    [
        ("tdpo2", "checkpointed"), ("tdpo2", "cached"), ("two passes", "fsdp2"),
        *(
            pytest.param(objective, way, marks=pytest.mark.slow)
            for objective in OBJECTIVES
            for way in ("ddp", "fsdp2", "zero3", "fsdp2, cached, checkpointed")
            if (objective, way) != ("two passes", "fsdp2") and not (objective == "simpo" and "cached" in way)
        ),
    ],
)  # fmt: skip
def test_objectives_and_token_weights_give_the_trajectory_of_one_process(
    objective_runs: dict[str, Runs], objective: str, way: str
) -> None:
    runs = objective_runs[objective]
    assert_same_trajectory(runs[way], runs["one"])
    remembered = [(runs[name] / "objective.json").read_text() for name in (way, "one")]
    assert remembered[0] == remembered[1]


def test_token_weights_change_the_trajectory(objective_runs: dict[str, Runs], tmp_path: Path) -> None:
    """By far more than the runs above may differ."""
    runs = objective_runs["tdpo2"]
    rows = [json.loads(line) for line in runs.world.train.read_text().splitlines()]
    plain = [{name: text for name, text in row.items() if not name.endswith("weights")} for row in rows]
    train = write_jsonl(tmp_path / "plain.jsonl", plain)
    run(Way(), replace(runs.world, train=train), tmp_path / "out", *runs.options)
    ours, theirs = ([log["loss"] for log in history(folder)[:30]] for folder in (tmp_path / "out", runs["one"]))
    assert max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)) > 500 * LOGS


@pytest.mark.slow
def test_token_weights_are_not_rounded_in_mixed_precision(world: World, tmp_path: Path) -> None:
    """DeepSpeed's inputs are of the precision of its weights, in which 1.003 would be 1."""
    losses = {}
    for name, weight, beta in (("weight", 1.003, 2.0), ("beta", 1.0, 2.006), ("neither", 1.0, 2.0)):
        ids = [
            {"prompt_ids": [first, first + 1], "chosen_ids": [first + 2, 5], "rejected_ids": [first + 3, 6, 7]}
            for first in range(10, 90, 10)
        ]
        rows = [row | {"chosen_weights": [weight] * 2, "rejected_weights": [weight] * 3} for row in ids]
        data = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        options = ["--objective", "simpo", "--beta", beta, "--max_steps", 1, "--bf16"]
        run(WAYS["zero2"], replace(world, train=data), tmp_path / name, *options)
        losses[name] = history(tmp_path / name)[0]["loss"]
    assert losses["weight"] == pytest.approx(losses["beta"], rel=1e-5)
    assert abs(losses["neither"] - losses["beta"]) > 1e-4 * losses["beta"]


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_weights_really_are_sharded(trajectories: Runs, engine: str) -> None:
    """Accelerate, asked for FSDP on a CPU, would train with plain data parallelism and not say so."""
    _ = trajectories[engine]
    shares = re.search(r"weights: sharded, ([\d,]+) of ([\d,]+) in this process", trajectories.outputs[engine])
    assert shares is not None
    local, total = (int(number.replace(",", "")) for number in shares.groups())
    assert local < 0.55 * total
    assert total == sum(tensor.numel() for tensor in weights(trajectories.world.model).values())


@pytest.mark.parametrize("way", ways("fsdp2", slow=("zero2", "zero3")))
def test_in_mixed_precision_policy_and_reference_start_equal(world: World, tmp_path: Path, way: str) -> None:
    """These engines make the policy's weights bf16, so the reference's have to be too; and the loss is not rounded."""
    run(WAYS[way], world, tmp_path / "out", "--max_steps", 1, "--bf16")
    (log,) = [log for log in history(tmp_path / "out") if "loss" in log]
    assert log["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log["kl/chosen"] == log["kl/rejected"] == 0


def test_an_evaluation_counts_every_pair_once(trajectories: Runs) -> None:
    """An odd number of pairs in two processes with batches of 4: the last round has too few pairs for both."""
    pairs = len(trajectories.world.held_out.read_text().splitlines())
    one = json.loads((trajectories["one"] / "eval_results.json").read_text())
    for way in ("ddp", "fsdp2"):
        other = json.loads((trajectories[way] / "eval_results.json").read_text())
        for name in ("eval_loss", "eval_rewards/margins", "eval_kl/rejected", "eval_kl_per_token/chosen"):
            assert other[name] == pytest.approx(one[name], rel=LOGS), name
        right = other["eval_implicit_rewards/accuracies"] * pairs
        assert right == pytest.approx(round(2 * right) / 2, abs=1e-4), "a mean over the pairs, ties counting a half"


def test_fewer_pairs_than_processes(tmp_path: Path, model_folder: Path) -> None:
    data = write_jsonl(tmp_path / "one.jsonl", preference_rows(1))
    single = World(model_folder, data, data)
    for name in ("one", "ddp"):
        run(WAYS[name], single, tmp_path / name, "--max_steps", 2, "--learning_rate", 0.05)
    assert_close(weights(tmp_path / "ddp"), weights(tmp_path / "one"), WEIGHTS)


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "zero3"])
def test_a_model_saved_by_several_processes_loads(trajectories: Runs, way: str) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = [AutoModelForCausalLM.from_pretrained(trajectories[name])(input_ids=ids).logits for name in ("one", way)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", ways("fsdp2", slow=("zero2", "zero3")))
def test_a_sharded_run_resumes_bit_for_bit(world: World, tmp_path: Path, way: str) -> None:
    options = ["--optim", "adamw_torch", "--max_steps", 6, "--save_strategy", "steps", "--save_steps", 3]
    options += ["--eval_dataset_name", world.held_out]
    run(WAYS[way], world, tmp_path / "uninterrupted", *options)
    shutil.copytree(tmp_path / "uninterrupted" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    run(WAYS[way], world, tmp_path / "resumed", *options, "--resume")
    ends = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("uninterrupted", "resumed")]
    assert ends[0] == ends[1]
    assert history(tmp_path / "uninterrupted") == history(tmp_path / "resumed")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_the_environment_of_accelerate_launch(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    file = REPOSITORY / "src/tdpo/distributed/presets" / f"{preset}.yaml"
    words = ["--config_file", str(file), "--num_processes", "2", "--main_process_port", "0", "x.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    args.deepspeed_fields_from_accelerate_config = ""  # which there is only where deepspeed is installed
    theirs = prepare_deepspeed_cmd_env(args)[1] if preset.startswith("zero") else prepare_multi_gpu_env(args)
    ours = launch.environment_of(launch.read_config(preset))
    assert ours == {name: theirs[name] for name in ours}
    assert (theirs.get("ACCELERATE_USE_FSDP"), theirs.get("FSDP_VERSION")) == (
        ("true", "2") if preset == "fsdp2" else (None, None)
    )


@pytest.mark.parametrize("kind", ["MULTI_CPU", "MULTI_GPU"])
def test_a_file_says_which_devices_are_used(kind: str, tmp_path: Path) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

    file = tmp_path / "file.yaml"
    devices = "use_cpu: true" if kind == "MULTI_CPU" else "gpu_ids: 2,3"
    file.write_text(f"distributed_type: {kind}\nnum_processes: 2\n{devices}\n")
    words = ["--config_file", str(file), "--main_process_port", "0", "x.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    theirs = prepare_multi_gpu_env(args) if kind == "MULTI_GPU" else prepare_simple_launcher_cmd_env(args)[1]
    ours = launch.environment_of(launch.read_config(str(file)))
    named = {"ACCELERATE_USE_CPU": "true"} if kind == "MULTI_CPU" else {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert ours == named
    assert {name: theirs[name].lower() for name in named} == named
    assert launch.named_gpus({"gpu_ids": [0, 1]}) == launch.named_gpus({"gpu_ids": "0, 1,"}) == ["0", "1"]
    assert launch.named_gpus({"gpu_ids": 0}) == ["0"] and launch.named_gpus({"gpu_ids": None}) == []
    assert launch.named_gpus({"gpu_ids": "all"}) == launch.named_gpus({"gpu_ids": ""}) == launch.named_gpus({}) == []


def test_the_command_starts_its_own_processes(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    out = tmp_path / "out"
    words = train_words(model_folder, pairs_file, out, "--max_steps", 2, "--accelerate_config", "ddp")
    output = completed([*words, "--num_processes", "2"])
    assert (out / "checkpoint-2" / "rng_state_1.pth").is_file(), "two processes wrote it"
    assert output.count("saved to") == 1


def test_fsdp_on_cpus_is_refused(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    """Accelerate would ignore the settings and train with plain data parallelism."""
    words = train_words(model_folder, pairs_file, tmp_path / "out", "--accelerate_config", "fsdp2")
    code, output = finish(start([*words, "--num_processes", "1"]))
    assert code != 0 and output.count("FSDP does not run on CPUs: use --accelerate_config ddp") == 1


def test_mistakes_about_processes_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def error_of(*words: object) -> str:
        start = train_words(tmp_path / "m", tmp_path / "d", tmp_path / "o")
        assert main([*start, *map(str, words)]) == 2
        return capsys.readouterr().err

    assert error_of("--accelerate_config", "ddp", "--num_processes", 2, "--bta", 1).count("Did you mean 'beta'?") == 1
    assert "d: no such file or folder" in error_of("--accelerate_config", "ddp", "--num_processes", 2)
    assert "no such file, nor a preset (ddp, fsdp2, zero2, zero3). Did you mean 'fsdp2'?" in error_of(
        "--accelerate_config=fsdp"
    )
    assert "--num_processes must be at least 1, got 0" in error_of("--accelerate_config", "ddp", "--num_processes", 0)
    assert "it has no effect alone" in error_of("--num_processes", 2)
    file = tmp_path / "run.yaml"
    file.write_text("accelerate_config: ddp\n")
    assert "give it on the command line" in error_of("--config", file)
    file.write_text("distributed_type: TPU\n")
    assert "distributed_type must be one of MULTI_GPU" in error_of("--accelerate_config", file)
    file.write_text("distributed_type: MULTI_GPU\nnum_machines: 2\n")
    assert "start torchrun on every machine" in error_of("--accelerate_config", file)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        assert "zero2 needs deepspeed: pip install 'tdpo[deepspeed]'" in error_of("--accelerate_config", "zero2")
    file.write_text("distributed_type: FSDP\nfsdp: {}\n")
    assert "fsdp is not understood" in error_of("--accelerate_config", file)
