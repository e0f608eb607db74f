"""Loads models and tokenizers by name, and says in words what is wrong when that fails."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.utils import find_adapter_config_file

from tdpo.config import ModelConfig
from tdpo.data.templates import TEMPLATES
from tdpo.errors import UserError, nearest
from tdpo.models.adapters import ties_are_known
from tdpo.models.generation import adopt_generation_config
from tdpo.models.multimodal import processor_template

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
LANGUAGE_MODELS = (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM)
"""Auto classes of models that continue a text; the last has the text half alone of some multimodal checkpoints."""


def load_model(
    config: ModelConfig, name: str | None = None, trainable: bool = False, quantization: dict[str, Any] | None = None
) -> Any:
    """Loads a causal language model, an adapter on top of its base where the name is an adapter's.

    Args:
        config: How to load it.
        name: Hub name or folder, where it is not ``config.model_name_or_path`` (a reference).
        trainable: Whether a loaded adapter is to be trained on; a model without one always can be.
        quantization: Arguments of ``BitsAndBytesConfig`` for a model kept in few bits.

    Raises:
        UserError: naming the model and what is wrong with it.
    """
    own = name is None or name == config.model_name_or_path
    name = name or config.model_name_or_path
    _check_folder(name, ("config.json", "adapter_config.json"), "model")
    revision = config.model_revision if own else "main"
    base = adapter_base(name, revision)
    if base is None:
        return _load_whole(config, name, revision, quantization)
    try:
        _check_folder(base, ("config.json",), "model")
        model = _load_whole(config, base, "main", quantization)
    except UserError as error:
        raise UserError(f"the base of the adapter {name!r}: {error}") from error
    try:
        from peft import PeftModel

        with ties_are_known():
            adapted = PeftModel.from_pretrained(model, name, revision=revision, is_trainable=trainable)
    except Exception as error:  # as in _load_whole
        raise UserError(f"adapter {name!r} cannot be put on {base!r}: {_first_line(error)}") from error
    adopt_generation_config(adapted, name)
    return adapted


def load_weights(model: Any, folder: str) -> None:
    """Loads the weights of a checkpoint into a model through the model's class, which knows its names on disk.

    Classes of mixture-of-experts and multimodal models save other names and shapes than those of their modules.

    Raises:
        UserError: if the checkpoint lacks weights of the model.
    """
    config = copy.deepcopy(model.config)
    saved, told = type(model).from_pretrained(folder, config=config, dtype=model.dtype, output_loading_info=True)
    missing = sorted([*told["missing_keys"], *(str(key) for key in told["mismatched_keys"])])
    if missing:
        raise UserError(f"{folder} lacks weights of {type(model).__name__}: {', '.join(missing[:3])}")
    model.load_state_dict(saved.state_dict())


def adapter_base(name: str, revision: str = "main") -> str | None:
    """The base of an adapter as its config names it; None if ``name`` is a model, or nothing.

    Raises:
        UserError: for an adapter that does not name its base.
    """
    folder = Path(name).expanduser()
    try:
        found = find_adapter_config_file(str(folder) if folder.is_dir() else name, revision=revision)
    except (OSError, ValueError):  # a name the hub does not know is told when the model is looked for
        return None
    if found is None:
        return None
    if (folder / "config.json").is_file():
        raise UserError(f"{name}: holds a model (config.json) and an adapter (adapter_config.json); which is meant?")
    try:
        base = json.loads(Path(found).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{found}: cannot be read as the config of an adapter: {error}") from error
    if not base:
        raise UserError(f"{found}: names no base (base_model_name_or_path), so the adapter cannot be loaded")
    return str(base)


def same_model(name: str, other: str) -> bool:
    """Whether two names mean one model: the same hub name, or the same folder however it is written.

    Example:
        >>> same_model("./my-sft", "my-sft"), same_model("my-sft", "my-base")
        (True, False)
    """
    return name == other or Path(name).expanduser().resolve() == Path(other).expanduser().resolve()


def _load_whole(config: ModelConfig, name: str, revision: str, quantization: dict[str, Any] | None) -> Any:
    few_bits = {} if quantization is None else {"quantization_config": _quantization_config(config, quantization)}
    try:
        described = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=config.trust_remote_code)
        model_class = _model_class(described, config.trust_remote_code)
        if model_class is None:
            kind = (described.architectures or [f"{described.model_type} model"])[0]
            raise UserError(f"model {name!r} is a {kind}, not a causal language model")
        loaded: Any = model_class.from_pretrained(
            name,
            revision=revision,
            output_loading_info=True,
            dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            **few_bits,
            **(config.model_init_kwargs or {}),  # type: ignore[arg-type]
        )
    except UserError:
        raise
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


def _model_class(described: Any, remote_code: bool) -> Any:
    """Returns the language model class that a config names, else that of its type; None if it has none.

    An auto class alone would load the text half of a multimodal checkpoint, the decoder of an encoder-decoder, and a
    reward model's body under a tied head.
    """
    remote = (getattr(described, "auto_map", None) or {}) if remote_code else {}
    for auto in LANGUAGE_MODELS:
        if auto.__name__ in remote:
            return auto
    if getattr(described, "is_encoder_decoder", False):
        return None
    kind = type(described)
    known = [auto._model_mapping[kind] for auto in LANGUAGE_MODELS if kind in auto._model_mapping]
    named = getattr(transformers, (described.architectures or [""])[0], None)
    if named in known:
        return named
    # Loading finds out what is missing, but nothing is where the head is tied: all of a base model's weights are there,
    # and those of a model for another task would pass for it.
    base = MODEL_MAPPING.get(kind, None)
    another_task = getattr(named, "config_class", None) is kind and named is not base
    another_task = another_task and getattr(described.get_text_config(), "tie_word_embeddings", False)
    return known[0] if known and not another_task else None


def _quantization_config(config: ModelConfig, arguments: dict[str, Any]) -> Any:
    """Transformers' description of a model in few bits, whose products run in the model's dtype.

    Raises:
        UserError: where bitsandbytes is missing.
    """
    option = next(name for name in ("load_in_4bit", "load_in_8bit") if arguments.get(name))
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"--{option} needs bitsandbytes: pip install 'tdpo[quant]'")
    compute = {} if option == "load_in_8bit" else {"bnb_4bit_compute_dtype": _dtype(config)}
    return BitsAndBytesConfig(**arguments, **compute)


def _dtype(config: ModelConfig) -> Any:
    return torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)


def load_tokenizer(config: ModelConfig) -> Any:
    """Loads the tokenizer and applies ``eos_token`` and ``chat_template_path``.

    Raises:
        UserError: naming the tokenizer and what is wrong with it.
    """
    name, revision = config.tokenizer_name_or_path or config.model_name_or_path, config.model_revision
    if _is_folder(name) and not any((Path(name).expanduser() / file).is_file() for file in TOKENIZER_FILES):
        base = adapter_base(name)  # an adapter saved without the tokenizer has its base's
        name, revision = (name, revision) if base is None else (base, "main")
    _check_folder(name, TOKENIZER_FILES, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # as above
        raise UserError(f"tokenizer {name!r} cannot be loaded: {_first_line(error)}") from error
    if config.eos_token is not None:
        if config.eos_token not in tokenizer.get_vocab():
            raise UserError(f"--eos_token {config.eos_token!r} is no token of the tokenizer {name!r}")
        tokenizer.eos_token = config.eos_token
    if not tokenizer.chat_template:
        tokenizer.chat_template = processor_template(name, revision)
    if config.chat_template_path is not None:
        tokenizer.chat_template = _template(config.chat_template_path)
        _check_template(tokenizer, config.chat_template_path)
    return tokenizer


def model_limits(config: ModelConfig) -> tuple[int | None, int | None]:
    """Reads vocabulary size and positions from the model's config alone; None where it does not say, or there is none.

    An adapter has those of its base.

    Raises:
        UserError: for an adapter that does not name its base, and a config that cannot be read.
    """
    name, revision = config.model_name_or_path, config.model_revision
    base = adapter_base(name, revision)
    name, revision = (name, revision) if base is None else (base, "main")
    try:
        found = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # whatever a broken config or the network may raise, it is about the name
        if (Path(name).expanduser() / "config.json").is_file():
            raise UserError(f"model {name!r}: its config.json cannot be read: {_first_line(error)}") from error
        return None, None  # a tokenizer without a model beside it is enough to look at data
    text = found.get_text_config()
    vocab_size, positions = (getattr(text, key, None) for key in ("vocab_size", "max_position_embeddings"))
    return vocab_size, positions if isinstance(positions, int) and positions > 0 else None


def _is_folder(name: str) -> bool:
    return Path(name).expanduser().is_dir()


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
