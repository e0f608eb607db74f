"""Parts of several commands: read data, report errors, print tables, write JSON."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import cached_file

from tdpo.config import EvalDataConfig, ModelConfig, ObjectiveOptions
from tdpo.data.dataset import check_fits
from tdpo.data.options import make_tokeniser, open_held_out, open_training, prepare
from tdpo.data.sources import Source
from tdpo.data.tokenise import Tokeniser
from tdpo.errors import UserError, first_line
from tdpo.files import atomic_write
from tdpo.models.load import check_folder, load_model, load_tokenizer
from tdpo.models.policy import head_of, position_limit
from tdpo.objectives import Objective
from tdpo.objectives.remembered import FILE, read_objective

MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "adapter_config.json", "*.bin")


def console() -> Console:
    """Returns the console for a command's results: standard output, of the main process only."""
    return Console(quiet=not is_main_process(), highlight=False, markup=False)


def is_main_process() -> bool:
    """Returns whether this is the first process of its launcher, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def quieten() -> None:
    """Sends warnings through one handler and silences the libraries' own bars and advice."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, where it is installed, warns in every run
    # DeepSpeed calls these in torch, which warns once per call and process.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # TRL and transformers read options of their own that transformers has renamed.
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    handler = RichHandler(console=Console(stderr=True), show_time=False, show_path=False)
    level = logging.WARNING if is_main_process() else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler], force=True)


@contextmanager
def user_errors(trainer: Any = None) -> Iterator[None]:
    """Raises :class:`UserError` for errors of transformers about options and of the file system.

    Args:
        trainer: A trainer about to train: until its first step a ValueError is about its options, later it is a bug.
    """
    try:
        yield
    except (ValueError, ImportError) as error:
        if trainer is not None and trainer.state.global_step > 0:
            raise
        raise UserError(str(error)) from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{error}. Earlier checkpoints stay as they are (--resume continues from them)") from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory: {first_line(error).rstrip('.')}. A lower "
            "--per_device_train_batch_size with a higher --gradient_accumulation_steps gives the same result in less "
            "memory; so do --logits_budget, --gradient_checkpointing and --accelerate_config fsdp2; --max_length "
            "shortens the data"
        ) from error
    except UnpicklingError as error:
        raise UserError(f"a file of the checkpoint is not what it should be, and was not run: {error}") from error
    except RuntimeError as error:
        if not any(words in str(error) for words in ("to be installed", "No executable batch size", "out-of-memory")):
            raise
        raise UserError(str(error)) from error


def read_dataset(source: Source, options: Any, tokeniser: Tokeniser) -> Any:
    """Prepares the dataset of a command's options and prints the report on its rows."""
    prepared = prepare(options, source, tokeniser)
    for line in prepared.report.lines():
        console().print(line, soft_wrap=True)
    return prepared


def read_datasets(model_config: ModelConfig, data: EvalDataConfig, options: Any) -> tuple[Any, Any, Any]:
    """Returns the tokenizer, the dataset to train on and the held-out one, or None without held-out rows."""
    tokenizer, spec = load_tokenizer(model_config), options.row_spec()
    tokeniser = make_tokeniser(options, tokenizer)
    sources = open_training(data, spec), open_held_out(data, spec)
    train, held_out = (None if source is None else read_dataset(source, options, tokeniser) for source in sources)
    return tokenizer, train, held_out


def device() -> str:
    """Returns the device that commands without training run on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_scoring_models(
    config: ModelConfig, names: Iterable[str], pairs: Any, source: str, tokenizer: Any
) -> list[PreTrainedModel]:
    """Loads models that score pairs, in evaluation mode, on :func:`device`.

    Args:
        config: Options of loading them.
        names: Hub names or folders.
        pairs: The pairs.
        source: Name of the pairs, for messages.
        tokenizer: Their tokenizer.

    Raises:
        UserError: if a model cannot be loaded, or has too few words or positions for the pairs.
    """
    models = [load_model(config, name).to(device()).eval() for name in names]
    for model in models:
        check_fits(pairs, head_of(model).vocab_size, position_limit(model), source, len(tokenizer))
    return models


def saved_objective(model_config: ModelConfig, options: ObjectiveOptions) -> Objective:
    """Returns the objective of the options, or the one the model was trained with where they name none.

    Raises:
        UserError: if there is no such model, and naming the model's file if what it says does not go together with the
            options.
    """
    folder, revision = model_config.model_name_or_path, model_config.model_revision
    check_folder(folder)
    try:
        saved = cached_file(folder, FILE, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise UserError(f"model {folder!r} cannot be loaded: {first_line(error)}") from error
    remembered = None if saved is None else read_objective(saved)
    try:
        return options.build_objective(remembered)
    except UserError as error:
        if remembered is None or options.objective:
            raise
        raise UserError(f"{saved}: {error}. Give --objective") from error


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object; see :func:`write_text`."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes a file atomically.

    Raises:
        UserError: if it cannot be written.
    """
    path = Path(path).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def metric_table(metrics: Mapping[str, float], title: str) -> Table:
    """Makes a table of metrics: a row for each quantity, columns for chosen, rejected and their margin."""
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
