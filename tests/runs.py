"""Starts training runs as processes of their own, one or several under torchrun, and reads what they wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file

Weights = dict[str, torch.Tensor]
LENGTHS = ["--max_length", "96", "--max_prompt_length", "48"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def environment(**more: str) -> dict[str, str]:
    """Returns the environment of the tests, on one thread, with this project's sources and no GPU."""
    path = filter(None, [str(REPOSITORY / "src"), more.pop("PYTHONPATH", ""), os.environ.get("PYTHONPATH")])
    more["PYTHONPATH"] = os.pathsep.join(path)
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def train_words(model: Path, data: Path, out: Path, *options: object) -> list[str]:
    """Returns the words of ``tdpo train`` on a CPU."""
    words = [
        "train", "--model_name_or_path", model, "--dataset_name", data, "--output_dir", out, "--use_cpu",
        "--disable_tqdm", "--learning_rate", "1e-2", *LENGTHS, *options,
    ]  # fmt: skip
    return [str(word) for word in words]


def start(words: list[str], processes: int = 1, **more: str) -> subprocess.Popen[str]:
    """Starts a command; several processes run under torchrun, whose process is returned."""
    launcher = [sys.executable] if processes == 1 else [*TORCHRUN, "--nproc_per_node", str(processes)]
    return subprocess.Popen(
        [*launcher, "-m", "tdpo", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(**more),
    )  # fmt: skip


def finish(run: subprocess.Popen[str], timeout: float = 60) -> tuple[int, str]:
    """Waits for a run and returns its exit code and its output; one that hangs fails the test."""
    try:
        output, _ = run.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        run.kill()
        pytest.fail(f"no end within {timeout} s: {run.communicate()[0][-2000:]}")
    return run.returncode, output


def completed(words: list[str], processes: int = 1, timeout: float = 60, **more: str) -> str:
    """Runs a command that has to succeed and returns its output."""
    code, output = finish(start(words, processes, **more), timeout)
    assert code == 0, output[-3000:]
    return output


def wait_for(condition: Callable[[], Any], run: subprocess.Popen[str], timeout: float = 60) -> None:
    """Waits until a condition holds; a run that ends before, or takes too long, fails the test."""
    end = time.monotonic() + timeout
    while not condition():
        if run.poll() is not None or time.monotonic() > end:
            run.kill()
            pytest.fail(f"ended early or takes too long ({run.returncode}): {run.communicate()[0][-2000:]}")
        time.sleep(0.002)


def interrupted(run: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    """Sends a signal to a run, waits for it, and returns its exit code and its output."""
    run.send_signal(number)
    return finish(run)


def weights(folder: Path) -> Weights:
    """Reads the saved weights of a model."""
    return load_file(folder / "model.safetensors")


def adapter_weights(folder: Path) -> Weights:
    """Reads the saved weights of an adapter."""
    return load_file(folder / "adapter_model.safetensors")


def history(folder: Path) -> list[dict[str, float]]:
    """Reads the logs of a finished run without its timings."""
    logs = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    timings = ("runtime", "per_second", "train_loss", "total_flos", "preparation")
    kept = (
        {name: value for name, value in log.items() if not any(timing in name for timing in timings)} for log in logs
    )
    return [log for log in kept if len(log) > 2]
