"""``tdpo merge``: adds an adapter to the weights of its base and saves a plain model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tdpo.commands.common import MODEL_FILES, console, quieten, user_errors
from tdpo.commands.options import parse
from tdpo.config import ModelConfig
from tdpo.config.checks import documented
from tdpo.errors import UserError
from tdpo.files import check_writable
from tdpo.models.adapters import merge_adapter
from tdpo.models.generation import repair_generation_config
from tdpo.models.load import adapter_base, load_model, load_tokenizer
from tdpo.models.multimodal import copy_processor
from tdpo.objectives.remembered import FILE


@documented
@dataclass
class MergeOptions:
    """Options of the merged model.

    Attributes:
        output_dir: Folder for the model and its tokenizer; it must not contain a model.
    """

    output_dir: str


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    model_config, options = parse("merge", (ModelConfig, MergeOptions), argv)
    quieten()
    name, folder = model_config.model_name_or_path, Path(options.output_dir).expanduser()
    check_writable(folder)
    existing = [path.name for pattern in MODEL_FILES for path in sorted(folder.glob(pattern))]
    if existing:
        raise UserError(f"--output_dir {folder} already holds {', '.join(existing)}; name another folder")
    tokenizer = load_tokenizer(model_config)
    base = adapter_base(name, model_config.model_revision)
    model = load_model(model_config)
    if base is None:
        raise UserError(f"{name}: is a model without an adapter, so there is nothing to merge")
    repair_generation_config(model.get_base_model())
    with user_errors():
        merge_adapter(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        copy_processor(model, folder)
        if (objective := Path(name, FILE)).is_file():
            shutil.copy(objective, folder)
    console().print(f"adapter {name} merged into {base}, saved to {folder}", soft_wrap=True)
