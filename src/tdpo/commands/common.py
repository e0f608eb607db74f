"""What several commands do alike: look at the output folder, read data, print tables, write JSON."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import transformers
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from transformers.trainer_utils import get_last_checkpoint

from tdpo.config import RunOptions
from tdpo.data.dataset import PairDataset
from tdpo.data.sft import SFTDataset
from tdpo.data.sources import SourceRow, read_source
from tdpo.errors import UserError

Prepared = TypeVar("Prepared", PairDataset, SFTDataset)
OUTPUT = ("output_dir",)
"""Options a training command cannot do without, though the trainer could."""
MODEL_FILES = ("config.json", "model.safetensors", "adapter_config.json")


def console() -> Console:
    """Where a command's results go: standard output, of the main process only."""
    return Console(quiet=not is_main_process(), highlight=False)


def is_main_process() -> bool:
    """Whether this is the first process of its launcher, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def quieten() -> None:
    """Sends warnings through one handler and takes away the libraries' own bars and advice."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    handler = RichHandler(console=Console(stderr=True), show_time=False, show_path=False)
    level = logging.WARNING if is_main_process() else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler], force=True)


def prepare_output(args: RunOptions) -> str | None:
    """Checks the output folder before anything is loaded.

    Returns:
        The checkpoint to resume from, or None.

    Raises:
        UserError: if it cannot be written, or holds a model that would be overwritten.
    """
    folder = Path(str(args.output_dir))
    check_writable(folder)
    checkpoint = get_last_checkpoint(folder)
    holds = [name for name in MODEL_FILES if (folder / name).exists()] + ([checkpoint] if checkpoint else [])
    if holds and not (args.resume or args.overwrite_output_dir):
        raise UserError(
            f"--output_dir {folder} already holds {', '.join(Path(h).name for h in holds)}: --resume goes on from the "
            "newest checkpoint, --overwrite_output_dir replaces"
        )
    return args.resume_from_checkpoint or (checkpoint if args.resume else None)


def read_dataset(name: str, split: str, config: str | None, prepare: Callable[[list[SourceRow]], Prepared]) -> Prepared:
    """Reads a dataset, prepares it, and prints the report of what became of its rows."""
    prepared = prepare(read_source(name, split, config))
    for line in prepared.report.lines():
        console().print(line, soft_wrap=True)
    return prepared


def check_writable(folder: Path) -> None:
    """Makes the folder and tries to write in it.

    Raises:
        UserError: naming the folder and the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object; the file appears whole or not at all.

    Raises:
        UserError: if the place cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def metric_table(metrics: Mapping[str, float], title: str) -> Table:
    """Metrics as a table: a row a quantity, columns for chosen, rejected and their margin."""
    loss = f", loss {metrics['loss']:.4f}" if "loss" in metrics else ""
    table = Table(title=title + loss, title_justify="left")
    for column in ("", "chosen", "rejected", "margin", "accuracy"):
        table.add_column(column, justify="left" if not column else "right")
    for name in ("rewards", "implicit_rewards", "logps", "kl", "kl_per_token"):
        cells = [metrics.get(f"{name}/{part}") for part in ("chosen", "rejected")]
        margin = metrics.get(f"{name}/margins", metrics.get(f"{name}/margin"))
        cells += [margin, metrics.get(f"{name}/accuracies")]
        if any(cell is not None for cell in cells):
            table.add_row(name, *("" if cell is None else f"{cell:.4g}" for cell in cells))
    return table
