"""Bars of training and evaluation on a terminal; one line a log elsewhere."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tdpo.train.progress import ProgressCallback

LOGS = {"loss": 0.6931, "rewards/accuracies": 0.5}


def events(callback: ProgressCallback, train: bool, main_process: bool = True) -> None:
    """Sends the events of two steps with an evaluation between them, or of an evaluation alone."""
    state: Any = SimpleNamespace(is_world_process_zero=main_process, global_step=0, max_steps=2 if train else 0)

    def evaluate() -> None:
        for _ in range(3):
            callback.on_prediction_step(None, state, None, eval_dataloader=range(3))
        callback.on_log(None, state, None, logs={f"eval_{name}": value for name, value in LOGS.items()})
        callback.on_evaluate(None, state, None)

    if not train:
        evaluate()
        return
    callback.on_train_begin(None, state, None)
    for state.global_step in (1, 2):
        callback.on_step_end(None, state, None)
        callback.on_log(None, state, None, logs=LOGS)
        if state.global_step == 1:
            evaluate()
    callback.close()


@pytest.mark.parametrize("train", [True, False])
def test_a_terminal_shows_bars_and_closes_them(train: bool) -> None:
    output = io.StringIO()
    callback = ProgressCallback("TDPO2", Console(file=output, force_terminal=True, width=140))
    for _ in range(2):  # a second run opens bars of its own
        output.truncate(output.seek(0))
        events(callback, train)
        shown = output.getvalue()
        assert "/3\x1b" in shown and "evaluation" in shown and "loss 0.6931  accuracy 0.50" in shown
        assert ("2/2" in shown) == train
        assert "\x1b[?25h" in shown[-12:], "the cursor is visible again"


def test_without_a_terminal_each_log_is_a_line() -> None:
    output = io.StringIO()
    events(ProgressCallback("TDPO2", Console(file=output, width=140)), train=True)
    line = "loss 0.6931  accuracy 0.50"
    assert output.getvalue().splitlines() == [
        f"TDPO2: step 1/2: {line}", f"evaluation: step 1/2: {line}", f"TDPO2: step 2/2: {line}",
    ]  # fmt: skip


def test_other_processes_show_nothing() -> None:
    output = io.StringIO()
    events(ProgressCallback("TDPO2", Console(file=output, force_terminal=True)), train=True, main_process=False)
    assert output.getvalue() == ""
