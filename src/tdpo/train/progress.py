"""Progress of long work: a bar with loss, accuracy and KL on a terminal, one line a log elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback
from typing_extensions import override

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
EVALUATION = "evaluation"
SAMPLE_LENGTH = 100
"""Characters of a sample's prompt, and of its response, that are shown."""
SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("rewards/accuracies", "accuracy", "{:.2f}"),
    ("kl/chosen", "KL chosen", "{:.3g}"),
    ("kl/rejected", "KL rejected", "{:.3g}"),
)


def bar(console: Console, transient: bool = False) -> Progress:
    """Makes a progress bar with elapsed and remaining time and a column for figures."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console,
        transient=transient,
    )


def without_control(text: str) -> str:
    r"""Replaces control characters, which a terminal would obey.

    Examples:
        >>> without_control("a\x1b[2Jb") == "a\N{REPLACEMENT CHARACTER}[2Jb"
        True
    """
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def figures(metrics: Mapping[str, Any], prefix: str = "") -> str:
    """Formats the metrics worth watching in one line.

    Examples:
        >>> figures({"loss": 0.6931, "rewards/accuracies": 0.5})
        'loss 0.6931  accuracy 0.50'
    """
    return "  ".join(
        f"{word} {form.format(metrics[prefix + key])}" for key, word, form in SHOWN if prefix + key in metrics
    )


class ProgressCallback(TrainerCallback):
    """Shows training and evaluation: a bar each on a terminal, one line a log elsewhere; on the main process only."""

    def __init__(self, label: str, console: Console | None = None) -> None:
        self.label = label
        self.console = console or Console(stderr=True)
        self._progress = bar(self.console)
        self._tasks: dict[str, Any] = {}

    def _show(self, state: Any, name: str, total: int, **changes: Any) -> None:
        """Changes the bar of that name, which is opened when there is none."""
        if state.is_world_process_zero and self.console.is_terminal:
            self._progress.start()
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(name, total=total, figures="")
            self._progress.update(self._tasks[name], **changes)

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show(state, self.label, state.max_steps, completed=state.global_step)

    on_step_end = on_train_begin

    @override
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        line = figures(logs) or figures(logs, "eval_")
        if not state.is_world_process_zero or not line:
            return
        if "loss" in logs and self._tasks:
            self._show(state, self.label, state.max_steps, figures=line)
        else:
            name = self.label if "loss" in logs else EVALUATION
            step = f"step {state.global_step}/{state.max_steps}: " if state.max_steps else ""
            self.console.print(f"{name}: {step}{line}", highlight=False, soft_wrap=True)

    def show_sample(self, state: Any, prompt: str, response: str) -> None:
        """Shows a response sampled during training, in one line above the bars."""
        if state.is_world_process_zero:
            cut = (" ".join(text.split())[:SAMPLE_LENGTH] for text in (prompt[-SAMPLE_LENGTH:], response))
            texts = map(without_control, cut)
            line = "sample at step {}: {} -> {}".format(state.global_step, *texts)
            self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    @override
    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if eval_dataloader is not None:
            self._show(state, EVALUATION, len(eval_dataloader), advance=1)

    @override
    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if EVALUATION in self._tasks:
            self._progress.remove_task(self._tasks.pop(EVALUATION))
            if not self._tasks:
                self._progress.stop()

    def close(self) -> None:
        """Closes the open bars; safe to call after an exception, and twice."""
        if self._tasks:
            self._progress.stop()
        while self._tasks:
            self._progress.remove_task(self._tasks.popitem()[1])
