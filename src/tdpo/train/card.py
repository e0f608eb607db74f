"""The model card of a trained model: data, objective, results, settings, versions and the command."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from tdpo.files import atomic_write
from tdpo.models.adapters import has_adapter
from tdpo.objectives.base import Objective

logger = logging.getLogger("tdpo")
FILE = "README.md"
MARK = "<!-- written by tdpo; a card without this line is left as it is -->"
PAPER = "[Token-level Direct Preference Optimization](https://arxiv.org/abs/2404.11999)"
RESULTS = {
    "loss": "loss", "rewards/accuracies": "accuracy of the objective's reward",
    "implicit_rewards/accuracies": "accuracy of the log-ratio", "rewards/margins": "reward margin",
    "kl/chosen": "sequential KL(reference || policy), chosen, nats per response",
    "kl/rejected": "sequential KL(reference || policy), rejected, nats per response",
}  # fmt: skip
"""Held-out metrics in the card, with their labels."""


def write_card(trainer: Any, folder: Path, model_name: str | None = None, tags: Any = None, **header: Any) -> None:
    """Writes the card into a folder, unless it holds a card of other origin or nothing was trained."""
    path = folder / FILE
    start = trainer.record.start if trainer.record else {}
    if not start:
        return
    if path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        logger.warning("%s is not a model card of tdpo; it is left as it is", path)
        return
    atomic_write(path, model_card(trainer, start, model_name or folder.name, tags, **header))


def model_card(trainer: Any, start: dict[str, Any], name: str, tags: Any = None, **header: Any) -> str:
    """Returns the card.

    Args:
        trainer: The trainer, for the logs and the objective.
        start: The first line of the run's record; see :mod:`tdpo.train.record`.
        name: Name of the model.
        tags: Further tags.
        **header: Arguments of transformers' model card: language, license, dataset and so on.
    """
    objective: Objective | None = getattr(trainer, "objective", None)
    own = ["tdpo", objective.spelling() if objective else "sft"]
    adapter = has_adapter(trainer.model)
    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        base_model=header.pop("finetuned_from", None) or _hub_name(start["model"]),
        tags=[*own, *([tags] if isinstance(tags, str) else tags or [])],
        datasets=header.pop("dataset", None),
        language=header.get("language"),
        license=header.get("license"),
        pipeline_tag="text-generation",
    )
    method = f"the objective `{objective}` ({PAPER})" if objective else "supervised fine-tuning"
    parts = [
        f"---\n{data.to_yaml()}\n---\n{MARK}",
        f"# {name}",
        f"Trained from `{start['model'] or 'a model in memory'}` with {method} by tdpo {start['environment']['tdpo']}.",
        _results(trainer.state, trainer.args.load_best_model_at_end),
        "## Data",
        _table(
            [(part, *_data(found)) for part, found in start["data"].items()], "data", "source", "rows", "fingerprint"
        ),
        "## Settings",
        _table(sorted(start["settings"].items()), "option", "value"),
        *([f"## Command\n\n```\n{start['command']}\n```"] if start["command"] else []),
        "## Versions",
        _table(list(start["environment"].items()), "name", "value"),
    ]
    return "\n\n".join(parts) + "\n"


def _results(state: Any, best: bool) -> str:
    """Returns the last metrics of each held-out dataset, those of the best step if its model is ``best`` and loaded."""
    logs = state.log_history
    if best and state.best_global_step and state.best_model_checkpoint:
        logs = [log for log in logs if log["step"] <= state.best_global_step]
    last: dict[str, dict[str, Any]] = {}
    for log in logs:
        for prefix in (
            name.removesuffix("loss") for name in log if name.startswith("eval_") and name.endswith("_loss")
        ):
            last[prefix] = log
    if not last:
        return "No held-out data was evaluated."
    parts = []
    for prefix, log in last.items():
        rows = [(label, f"{log[prefix + name]:.4g}") for name, label in RESULTS.items() if prefix + name in log]
        of = "" if prefix == "eval_" else f" {prefix.removeprefix('eval_').removesuffix('_')}"
        parts.append(f"## Held-out data{of}, step {log['step']}\n\n" + _table(rows, "metric", "value"))
    return "\n\n".join(parts)


def _data(found: dict[str, Any]) -> tuple[str, str, str]:
    return str(found.get("source", "in memory")), f"{found['rows']:,}", found.get("fingerprint", "-")


def _hub_name(name: str) -> str | None:
    """Returns a name that can be one of the hub; None for a folder."""
    plain = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None
    return name if plain and not Path(name).exists() else None


def _table(rows: list[tuple[Any, ...]], *heads: str) -> str:
    escaped = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in [heads, *rows]]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]])
