"""Progress of long work: a bar with loss, accuracy and KL on a terminal, one line a log elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback
from typing_extensions import override

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


def figures(metrics: Mapping[str, Any], prefix: str = "") -> str:
    """Formats the metrics worth watching in one line.

    Example:
        >>> figures({"loss": 0.6931, "rewards/accuracies": 0.5})
        'loss 0.6931  accuracy 0.50'
    """
    return "  ".join(
        f"{word} {form.format(metrics[prefix + key])}" for key, word, form in SHOWN if prefix + key in metrics
    )


class ProgressCallback(TrainerCallback):
    """Shows training and evaluation. On the main process only; silent with ``disable_tqdm``."""

    def __init__(self, label: str, console: Console | None = None) -> None:
        self.label = label
        self.console = console or Console(stderr=True)
        self._progress: Progress | None = None
        self._training: Any = None
        self._evaluating: Any = None

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.console.is_terminal:
            self._progress = bar(self.console)
            self._progress.start()
            self._training = self._progress.add_task(self.label, total=state.max_steps, figures="")
            self._progress.update(self._training, completed=state.global_step)

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._training, completed=state.global_step)

    @override
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        line = figures(logs) or figures(logs, "eval_")
        if not line:
            return
        if self._progress is not None and "loss" in logs:
            self._progress.update(self._training, figures=line)
        else:
            name = self.label if "loss" in logs else "evaluation"
            step = f"step {state.global_step}/{state.max_steps}: " if state.max_steps else ""
            self.console.print(f"{name}: {step}{line}", highlight=False, soft_wrap=True)

    @override
    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not self.console.is_terminal or eval_dataloader is None:
            return
        if self._progress is None:
            self._progress = bar(self.console, transient=True)
            self._progress.start()
        if self._evaluating is None:
            self._evaluating = self._progress.add_task("evaluation", total=len(eval_dataloader), figures="")
        self._progress.advance(self._evaluating)

    @override
    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._progress is not None and self._evaluating is not None:
            self._progress.remove_task(self._evaluating)
            self._evaluating = None
            if self._training is None:
                self.close()

    @override
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Closes the open bars; safe to call after an exception, and twice."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._training = self._evaluating = None


def close_bars(callbacks: Iterable[TrainerCallback]) -> None:
    """Closes the progress bars among a trainer's callbacks."""
    for callback in callbacks:
        if isinstance(callback, ProgressCallback):
            callback.close()
