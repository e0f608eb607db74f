"""Loads models and tokenizers by name, and says in words what is wrong when that fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tdpo.config import ModelConfig
from tdpo.data.templates import TEMPLATES
from tdpo.errors import UserError, nearest
from tdpo.models.policy import head_of


def load_model(config: ModelConfig, name: str | None = None) -> Any:
    """Loads a causal language model.

    Args:
        config: How to load it.
        name: Hub name or folder, where it is not ``config.model_name_or_path`` (a reference).

    Raises:
        UserError: naming the model and what is wrong with it.
    """
    own = name is None or name == config.model_name_or_path
    name = name or config.model_name_or_path
    _check_folder(name, ("config.json", "adapter_config.json"), "model")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            revision=config.model_revision if own else "main",
            output_loading_info=True,
            dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
    except Exception as error:  # whatever a broken folder or the network may raise, it is about the name
        raise UserError(f"model {name!r} cannot be loaded: {_first_line(error)}") from error
    model, told = loaded
    missing = sorted([*told["missing_keys"], *(str(key) for key in told["mismatched_keys"])])
    if missing:
        raise UserError(
            f"model {name!r} lacks weights of {type(model).__name__}, which would be drawn at random: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}. It is no whole causal language model"
        )
    return model


def load_tokenizer(config: ModelConfig) -> Any:
    """Loads the tokenizer and applies ``eos_token`` and ``chat_template_path``.

    Raises:
        UserError: naming the tokenizer and what is wrong with it.
    """
    name = config.tokenizer_name_or_path or config.model_name_or_path
    _check_folder(name, ("tokenizer_config.json", "tokenizer.json"), "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=config.model_revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # as above
        raise UserError(f"tokenizer {name!r} cannot be loaded: {_first_line(error)}") from error
    if config.eos_token is not None:
        if config.eos_token not in tokenizer.get_vocab():
            raise UserError(f"--eos_token {config.eos_token!r} is no token of the tokenizer {name!r}")
        tokenizer.eos_token = config.eos_token
    if config.chat_template_path is not None:
        tokenizer.chat_template = _template(config.chat_template_path)
        _check_template(tokenizer, config.chat_template_path)
    return tokenizer


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Refuses a tokenizer with more tokens than the model has rows for.

    Raises:
        UserError: naming both sizes.
    """
    rows, tokens = head_of(model).vocab_size, len(tokenizer)
    if tokens > rows:
        raise UserError(
            f"the tokenizer has {tokens} tokens, the model's vocabulary {rows} entries: they do not belong together "
            "(--tokenizer_name_or_path names another tokenizer)"
        )


def _check_folder(name: str, files: tuple[str, ...], what: str) -> None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / file).is_file() for file in files):
            raise UserError(f"{name}: no {what} in this folder (it has no {files[0]})")
    elif folder.exists():
        raise UserError(f"{name}: is a file; a {what} is a folder or a hub name")
    elif folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such folder")


def _template(path: str) -> str:
    """A chat template from a file, or one of :data:`TEMPLATES` by its name where no file has that name."""
    if path in TEMPLATES and not Path(path).is_file():
        return TEMPLATES[path]
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--chat_template_path {path}: {error}. It takes a Jinja file, or one of {', '.join(TEMPLATES)}."
            f"{nearest(path, TEMPLATES)}"
        ) from error


def _check_template(tokenizer: Any, path: str) -> None:
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"--chat_template_path {path}: no valid Jinja template: {error}") from error
    except jinja2.TemplateError:  # it may well refuse this chat; whether it takes the user's is told by row
        return


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
