"""A run survives what happens to runs: signals, time limits, full disks, half-written files, ranks that die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, make_model
from runs import environment, finish, interrupted, start, train_words, wait_for
from safetensors.torch import load_file
from tiny_training import tiny_trainer

from tdpo import TDPOConfig, TDPOTrainer, UserError
from tdpo.cli import main
from tdpo.commands.common import user_errors
from tdpo.config import seconds
from tdpo.models.compiling import compile_layers
from tdpo.models.policy import causal_lm
from tdpo.ops.heads import default_logits_budget
from tdpo.score import LogitsBudget
from tdpo.train import checkpointing
from tdpo.train.stopping import StopRequest

LONG = ["--max_steps", "100000", "--save_steps", "5", "--save_total_limit", "2", "--per_device_train_batch_size", "2"]


@pytest.mark.parametrize(
    ("number", "code", "processes"), [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 1), (signal.SIGTERM, None, 2)]
)
def test_a_signal_saves_and_leaves_with_its_code(
    tmp_path: Path, model_folder: Path, pairs_file: Path, number: signal.Signals, code: int | None, processes: int
) -> None:
    out = tmp_path / "out"
    run = start(train_words(model_folder, pairs_file, out, *LONG), processes)
    wait_for(lambda: checkpointing.checkpoints(out), run)
    exit_code, output = interrupted(run, number)
    assert exit_code == code if code else exit_code != 0, output  # torchrun has a code of its own
    newest, passed = checkpointing.latest_complete(out)
    assert newest is not None and not passed
    step = checkpointing.step_of(newest)
    assert f"interrupted by {number.name} at step {step} of 100000: saved checkpoint-{step}" in output
    assert processes > 1 or "Traceback" not in output  # torchrun shows one of its own
    assert not list(out.glob("*.partial")) and not (out / "model.safetensors").exists()


def test_a_second_signal_leaves_at_once(tmp_path: Path) -> None:
    code = (
        "import runpy, signal, time\n"
        f"own = runpy.run_path({str(REPOSITORY / 'src/tdpo/train/stopping.py')!r})\n"
        "request = own['StopRequest']()\n"
        "with own['handle_signals'](request.handle):\n"
        "    print('ready', flush=True)\n"
        "    while not request.poll(): time.sleep(0.01)\n"
        "    print('asked', flush=True)\n"
        "    time.sleep(60)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment())
    assert run.stdout is not None
    for word in ("ready", "asked"):
        assert run.stdout.readline().strip() == word
        run.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    assert run.wait(10) == 143 and time.monotonic() - begun < 5


def test_the_time_limit_saves_and_leaves_with_124(
    tmp_path: Path, model_folder: Path, pairs_file: Path, capsys: pytest.CaptureFixture
) -> None:
    words = train_words(model_folder, pairs_file, tmp_path / "out", "--max_steps", "100000", "--max_time", "0.5s")
    assert main(words) == 124
    newest, _ = checkpointing.latest_complete(tmp_path / "out")
    assert newest is not None
    assert f"out of time (--max_time) at step {checkpointing.step_of(newest)} of 100000" in capsys.readouterr().err
    assert main([*words[:-4], "--max_steps", str(checkpointing.step_of(newest) + 1), "--resume"]) == 0


@pytest.mark.parametrize("text", ["", "soon", "0", "5x", "1h 2m", "-3"])
def test_an_invalid_duration_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected seconds or a duration such as"):
        seconds(text)


def test_a_signal_forwarded_by_a_launcher_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("exited"))
    request = StopRequest()
    request.handle(signal.SIGINT, None)
    request.handle(signal.SIGINT, None)
    assert request.poll() == 130


def trainer(folder: Path, tokenizer: Any, **options: Any) -> TDPOTrainer:
    """Makes a trainer of four steps that saves after every second one."""
    return tiny_trainer(folder, tokenizer, **{"max_steps": 4, "save_steps": 2, "save_strategy": "steps", **options})


def test_incomplete_checkpoints_are_passed_over(tmp_path: Path, tokenizer: Any) -> None:
    trainer(tmp_path, tokenizer, save_steps=1).train()
    newest, passed = checkpointing.latest_complete(tmp_path)
    assert newest == tmp_path / "checkpoint-4" and passed == []
    size = (newest / "optimizer.pt").stat().st_size
    with (newest / "optimizer.pt").open("r+b") as file:
        file.truncate(size // 2)
    (tmp_path / "checkpoint-3" / "rng_state.pth").unlink()
    (tmp_path / "checkpoint-2" / "manifest.json").unlink()
    newest, passed = checkpointing.latest_complete(tmp_path)
    assert newest == tmp_path / "checkpoint-1"
    assert passed == [
        f"checkpoint-4 is incomplete and is passed over: optimizer.pt has {size // 2} of {size} bytes",
        "checkpoint-3 is incomplete and is passed over: rng_state.pth is missing",
        "checkpoint-2 is incomplete and is passed over: manifest.json is missing, which is written last",
    ]
    resumed = trainer(tmp_path, tokenizer)
    resumed.train(resume_from_checkpoint=True)
    assert resumed._initial_global_step == 1
    assert checkpointing.latest_complete(tmp_path)[0] == tmp_path / "checkpoint-4", "written again"


def test_rotation_never_removes_the_last_complete_checkpoint(tmp_path: Path) -> None:
    def write(step: int, complete: bool = True) -> Path:
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text("x" * step)
        checkpointing.seal(folder)
        if not complete:
            (folder / "weights").write_text("")
        return folder

    def remaining() -> list[int]:
        return [checkpointing.step_of(path) for path in checkpointing.checkpoints(tmp_path)]

    for step in (10, 20):
        write(step)
    checkpointing.rotate(tmp_path, 1, write(30, complete=False), None)
    assert remaining() == [10, 20, 30], "the one just written is incomplete, so all stay"
    checkpointing.rotate(tmp_path, 2, write(40), best=str(tmp_path / "checkpoint-10"))
    assert remaining() == [10, 30, 40]
    checkpointing.rotate(tmp_path, 1, write(15), best=None)
    assert remaining() == [15, 30], "the newest is the one written last, also after going back to an earlier step"
    checkpointing.rotate(tmp_path, None, write(50), best=None)
    assert remaining() == [15, 30, 50]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a megabyte."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True)
    if made.returncode:
        pytest.skip(f"needs to mount a small tmpfs: {made.stderr.decode().strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_leaves_earlier_checkpoints_intact(
    small_disk: Path, model_folder: Path, pairs_file: Path, capsys: pytest.CaptureFixture
) -> None:
    out = small_disk / "out"
    words = train_words(model_folder, pairs_file, out, "--max_steps", "40", "--save_steps", "2")
    assert main(words) == 2
    output = capsys.readouterr().err
    newest, passed = checkpointing.latest_complete(out)
    assert newest is not None and not passed and not list(out.glob("*.partial"))
    step = checkpointing.step_of(newest)
    assert f"checkpoint-{step + 2} could not be written to {out}" in output and "MiB free" in output
    assert f"{newest.name} is complete, --resume continues from it" in output and "Traceback" not in output
    words[words.index("--max_steps") + 1] = str(step + 1)
    assert main([*words, "--resume", "--save_strategy", "no"]) == 2
    output = capsys.readouterr().err
    assert "No space left on device" in output and "Traceback" not in output
    assert checkpointing.find_defect(newest) == "", "resuming on a full disk leaves it as it was"


def test_code_in_a_checkpoint_is_not_executed(tmp_path: Path, tokenizer: Any) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    trainer(tmp_path / "out", tokenizer).train()
    newest, _ = checkpointing.latest_complete(tmp_path / "out")
    assert newest is not None
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        kept = (newest / name).read_bytes()
        torch.save(Payload(), newest / name)
        if name == "training_args.bin":  # it is never read
            trainer(tmp_path / "out", tokenizer, max_steps=5).train(resume_from_checkpoint=str(newest))
        else:
            with pytest.raises(Exception, match=r"[Ww]eights.only"):
                trainer(tmp_path / "out", tokenizer, max_steps=5).train(resume_from_checkpoint=str(newest))
        (newest / name).write_bytes(kept)
    assert not (tmp_path / "ran").exists()


def test_a_rank_that_dies_ends_the_job_with_its_error(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    out = tmp_path / "out"
    run = start(train_words(model_folder, pairs_file, out, *LONG), 2)
    wait_for(lambda: checkpointing.checkpoints(out), run)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(run.pid)], capture_output=True, text=True).stdout
    begun = time.monotonic()
    os.kill(int(children.split()[-1]), signal.SIGKILL)
    code, output = finish(run)
    assert code != 0 and time.monotonic() - begun < 45
    assert "Signal 9 (SIGKILL)" in output
    assert checkpointing.latest_complete(out)[0] is not None


def test_the_manifest_lists_every_file(tmp_path: Path, tokenizer: Any) -> None:
    trainer(tmp_path, tokenizer, max_steps=1).train()
    folder = tmp_path / "checkpoint-1"
    sizes = json.loads((folder / "manifest.json").read_text())["sizes"]
    assert sizes == {p.name: p.stat().st_size for p in folder.iterdir() if p.name != "manifest.json"}
    assert {"model.safetensors", "optimizer.pt", "run_state_0.json", "trainer_state.json"} <= set(sizes)


def test_out_of_memory_over_the_logits_halves_their_budget_once(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tdpo import ops

    asked: list[int] = []
    pair_loss = ops.pair_loss

    def scarce(*args: Any, **options: Any) -> Any:
        asked.append(args[5])
        if args[5] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return pair_loss(*args, **options)

    monkeypatch.setattr(ops, "pair_loss", scarce)
    default = default_logits_budget(torch.device("cpu"))
    limit = default // 2
    trainer(tmp_path / "a", tokenizer, max_steps=2).train()
    assert asked == [default, limit, limit]
    assert f"--logits_budget is halved to {limit} bytes" in caplog.text
    limit = 2**20
    output = r"out of memory: CUDA out of memory\. A lower --per_device_train_batch_size"
    with pytest.raises(UserError, match=output), user_errors():
        trainer(tmp_path / "b", tokenizer).train()
    assert asked[3:] == [default, default // 2], "not halved for ever"


def test_a_resumed_run_takes_the_budget_of_its_checkpoint_unless_one_is_given() -> None:
    first = LogitsBudget()
    first.halve(torch.device("cpu"))
    resumed, own, fresh = LogitsBudget(), LogitsBudget(2**20), LogitsBudget()
    for budget in (resumed, own):
        budget.load(first.state())
    fresh.load({})
    found = [budget.bytes_on(torch.device("cpu")) for budget in (resumed, own, fresh)]
    assert found == [2**27, 2**20, 2**28] and not resumed.halved


def test_split_batches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batches are distributed by tdpo"):
        TDPOConfig(output_dir=str(tmp_path), use_cpu=True, accelerator_config={"split_batches": True})


@pytest.mark.parametrize("adapter", [False, True])
def test_compiled_layers_change_nothing_but_time(tmp_path: Path, tokenizer: Any, adapter: bool) -> None:
    """Compiled without code generation, whose digits are its own."""
    from peft import LoraConfig

    lora = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]) if adapter else None
    ends = []
    for number, options in enumerate(({}, {"torch_compile_backend": "aot_eager"})):
        made = trainer(tmp_path / str(number), tokenizer, peft_config=lora, learning_rate=1e-2, **options)
        made.train()
        made.save_model()
        layers = causal_lm(made.model).model.layers
        assert all((layer._compiled_call_impl is not None) == bool(options) for layer in layers)
        ends.append(load_file(next((tmp_path / str(number)).glob("*model.safetensors"))))
    assert set(ends[0]) == set(ends[1])
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_a_model_without_a_list_of_layers_is_not_compiled(tokenizer: Any) -> None:
    model = make_model(len(tokenizer))
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(UserError, match="--torch_compile: LlamaForCausalLM has no list of layers of one class"):
        compile_layers([model])


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, tokenizer: Any) -> None:
    ends = []
    for number, recompute in enumerate((False, True)):
        made = trainer(tmp_path / str(number), tokenizer, gradient_checkpointing=recompute, learning_rate=1e-2)
        made.train()
        ends.append(torch.cat([p.detach().flatten() for p in made.model.parameters()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-6)
