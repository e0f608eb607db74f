"""Sends samples and pages to the experiment trackers of a run, which transformers' callbacks open and close."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SAMPLES, VIEW = "samples", "token_view"


def track_samples(callbacks: Iterable[Any], state: Any, samples: Sequence[Mapping[str, str]]) -> None:
    """Sends samples as a table (W&B, trackio, MLflow) or as text (TensorBoard).

    Args:
        callbacks: The trainer's callbacks; those of other trackers are passed over.
        state: The trainer's state.
        samples: ``prompt`` and ``response`` of each.
    """
    if not state.is_world_process_zero:
        return
    step = state.global_step
    rows = [{"step": step, **sample} for sample in samples]
    for callback in callbacks:
        if writer := getattr(callback, "tb_writer", None):
            for number, sample in enumerate(samples, 1):
                shown = {name: f"<pre>{html.escape(text)}</pre>" for name, text in sample.items()}
                writer.add_text(f"{SAMPLES}/{number}", "{prompt}\n{response}".format(**shown), step)
        elif tracker := _like_wandb(callback):
            from pandas import DataFrame  # datasets depends on it

            tracker.log({SAMPLES: tracker.Table(dataframe=DataFrame(rows)), "train/global_step": step})
        elif mlflow := _mlflow(callback):
            columns = {name: [row[name] for row in rows] for name in rows[0]}
            mlflow.log_table(columns, f"{SAMPLES}.json")


def track_page(callbacks: Iterable[Any], state: Any, path: Path) -> None:
    """Sends a page as an artifact to W&B, trackio and MLflow; TensorBoard keeps no files.

    Args:
        callbacks: The trainer's callbacks.
        state: The trainer's state.
        path: The page.
    """
    if not state.is_world_process_zero:
        return
    for callback in callbacks:
        if tracker := _like_wandb(callback):
            artifact = tracker.Artifact(VIEW, type="page")
            artifact.add_file(str(path))
            tracker.log_artifact(artifact)
        elif mlflow := _mlflow(callback):
            mlflow.log_artifact(str(path))


def _like_wandb(callback: Any) -> Any:
    """Returns the module of a tracker with the interface of W&B while it has a run, or None."""
    if not getattr(callback, "_initialized", False):
        return None
    return getattr(callback, "_wandb", None) or getattr(callback, "_trackio", None)


def _mlflow(callback: Any) -> Any:
    return getattr(callback, "_ml_flow", None) if getattr(callback, "_initialized", False) else None
