"""Loads models and tokenizers by name, and names what is wrong when that fails."""

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
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.utils import find_adapter_config_file

from tdpo.config import ModelConfig
from tdpo.data.templates import TEMPLATES
from tdpo.errors import UserError, first_line, nearest
from tdpo.models.adapters import silence_tied_warnings
from tdpo.models.generation import adopt_generation_config
from tdpo.models.multimodal import processor_template

MODEL_CONFIGS = ("config.json", "adapter_config.json")
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
    check_folder(name)
    revision = config.model_revision if own else "main"
    base = adapter_base(name, revision)
    if base is None:
        return _load_base(config, name, revision, quantization)
    try:
        check_folder(base, MODEL_CONFIGS[:1])
        model = _load_base(config, base, "main", quantization)
    except UserError as error:
        raise UserError(f"the base of the adapter {name!r}: {error}") from error
    try:
        from peft import PeftModel

        with silence_tied_warnings():
            adapted = PeftModel.from_pretrained(model, name, revision=revision, is_trainable=trainable)
    except Exception as error:  # a broken folder or the network may raise anything
        raise UserError(f"adapter {name!r} cannot be put on {base!r}: {first_line(error)}") from error
    adopt_generation_config(adapted, name)
    return adapted


def load_classifier(name: str) -> tuple[Any, Any]:
    """Loads a sequence-classification or reward model, in evaluation mode and its own dtype, and its tokenizer.

    Args:
        name: Hub name or folder.

    Raises:
        UserError: naming the model and what is wrong with it, such as a language model, whose weights lack the head.
    """
    config = ModelConfig(model_name_or_path=name)
    check_folder(name)
    base = adapter_base(name)
    if base is not None:
        raise UserError(
            f"model {name!r} is an adapter on {base!r}: save the two as one model (merge_and_unload() of peft)"
        )
    kind = "sequence-classification or reward model"
    model = _load_complete(AutoModelForSequenceClassification, kind, name, "main", config)
    return model.eval(), load_tokenizer(config)


def load_weights(model: Any, folder: str) -> None:
    """Loads the weights of a checkpoint into a model through the model's class, which knows its names on disk.

    Classes of mixture-of-experts and multimodal models save other names and shapes than those of their modules.

    Raises:
        UserError: if the checkpoint lacks weights of the model.
    """
    config = copy.deepcopy(model.config)
    saved, info = type(model).from_pretrained(folder, config=config, dtype=model.dtype, output_loading_info=True)
    missing = _missing_weights(info)
    if missing:
        raise UserError(f"{folder} lacks weights of {type(model).__name__}: {missing}")
    model.load_state_dict(saved.state_dict())


def _missing_weights(info: dict[str, Any]) -> str:
    """Names up to three weights that transformers did not find, or found in another shape."""
    names = sorted([*info["missing_keys"], *map(str, info["mismatched_keys"])])
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def adapter_base(name: str, revision: str = "main") -> str | None:
    """Returns the base of an adapter as its config names it; None if ``name`` is a model, or unknown.

    Raises:
        UserError: for an adapter that does not name its base.
    """
    folder = Path(name).expanduser()
    try:
        found = find_adapter_config_file(str(folder) if folder.is_dir() else name, revision=revision)
    except (OSError, ValueError):  # loading the model reports a name that the hub does not know
        return None
    if found is None:
        return None
    if (folder / "config.json").is_file():
        raise UserError(
            f"{name}: has a model (config.json) and an adapter (adapter_config.json); keep one of them in the folder"
        )
    try:
        base = json.loads(Path(found).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{found}: cannot be read as the config of an adapter: {error}") from error
    if not base:
        raise UserError(f"{found}: names no base (base_model_name_or_path), so the adapter cannot be loaded")
    return str(base)


def same_model(name: str, other: str) -> bool:
    """Returns whether two names mean one model: the same hub name, or the same folder however it is written.

    Examples:
        >>> same_model("./my-sft", "my-sft"), same_model("my-sft", "my-base")
        (True, False)
    """
    return name == other or Path(name).expanduser().resolve() == Path(other).expanduser().resolve()


def _load_base(config: ModelConfig, name: str, revision: str, quantization: dict[str, Any] | None) -> Any:
    """Loads a model that is no adapter."""
    options: dict[str, Any] = {**(config.model_init_kwargs or {})}  # type: ignore[dict-item]
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    if quantization is not None:
        if importlib.util.find_spec("bitsandbytes") is None:
            asked = next(option for option in ("load_in_4bit", "load_in_8bit") if quantization.get(option))
            raise UserError(f"--{asked} needs bitsandbytes: pip install 'tdpo[quant]'")
        # Products run in the model's dtype.
        compute = torch.bfloat16 if dtype == "auto" else dtype
        compute_option = {"bnb_4bit_compute_dtype": compute} if quantization.get("load_in_4bit") else {}
        options["quantization_config"] = BitsAndBytesConfig(**quantization, **compute_option)
    described = _from_pretrained(AutoConfig, "model", name, revision, config)
    model_class = _model_class(described, config.trust_remote_code)
    if model_class is None:
        kind = (described.architectures or [f"{described.model_type} model"])[0]
        raise UserError(f"model {name!r} is a {kind}, not a causal language model")
    options |= {"dtype": dtype, "attn_implementation": config.attn_implementation}
    return _load_complete(model_class, "complete causal language model", name, revision, config, **options)


def _load_complete(loader: Any, kind: str, name: str, revision: str, config: ModelConfig, **options: Any) -> Any:
    """Loads a model none of whose weights is missing; transformers would draw such weights at random."""
    model, info = _from_pretrained(loader, "model", name, revision, config, output_loading_info=True, **options)
    if missing := _missing_weights(info):
        raise UserError(
            f"model {name!r} lacks weights of {type(model).__name__}, which would be drawn at random: {missing}. It is "
            f"not a {kind}"
        )
    return model


def _from_pretrained(loader: Any, what: str, name: str, revision: str, config: ModelConfig, **options: Any) -> Any:
    """Loads by a class of transformers, whose errors become one line."""
    try:
        return loader.from_pretrained(name, revision=revision, trust_remote_code=config.trust_remote_code, **options)
    except Exception as error:  # a broken folder or the network may raise anything
        raise UserError(f"{what} {name!r} cannot be loaded: {first_line(error)}") from error


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
    # A missing head fails to load, unless it is tied: then all weights are there, be it of a base model or of a model
    # for another task, which is refused.
    another_task = getattr(named, "config_class", None) is kind and named is not MODEL_MAPPING.get(kind, None)
    if another_task and getattr(described.get_text_config(), "tie_word_embeddings", False):
        return None
    return known[0] if known else None


def load_tokenizer(config: ModelConfig) -> Any:
    """Loads the tokenizer and applies ``eos_token`` and ``chat_template_path``.

    Raises:
        UserError: naming the tokenizer and what is wrong with it.
    """
    name, revision = config.tokenizer_name_or_path or config.model_name_or_path, config.model_revision
    folder = Path(name).expanduser()
    if folder.is_dir() and not any((folder / file).is_file() for file in TOKENIZER_FILES):
        base = adapter_base(name)  # an adapter saved without the tokenizer has its base's
        name, revision = (name, revision) if base is None else (base, "main")
    check_folder(name, TOKENIZER_FILES, "tokenizer")
    tokenizer = _from_pretrained(AutoTokenizer, "tokenizer", name, revision, config)
    if config.eos_token is not None:
        if config.eos_token not in tokenizer.get_vocab():
            raise UserError(f"--eos_token {config.eos_token!r} is not a token of the tokenizer {name!r}")
        tokenizer.eos_token = config.eos_token
    if config.chat_template_path is not None:
        _set_template(tokenizer, config.chat_template_path)
    elif not tokenizer.chat_template:
        tokenizer.chat_template = processor_template(name, revision)
    return tokenizer


def _set_template(tokenizer: Any, path: str) -> None:
    """Sets the chat template of a Jinja file, or the one of :data:`TEMPLATES` where no file has that name."""
    try:
        if path in TEMPLATES and not Path(path).is_file():
            tokenizer.chat_template = TEMPLATES[path]
        else:
            tokenizer.chat_template = Path(path).expanduser().read_text(encoding="utf-8")
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--chat_template_path {path}: {error}. It takes a Jinja file, or one of {', '.join(TEMPLATES)}."
            f"{nearest(path, TEMPLATES)}"
        ) from error
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"--chat_template_path {path}: not a valid Jinja template: {error}") from error
    except jinja2.TemplateError:  # it may refuse this chat; preparing the data names the rows that it refuses
        return


def model_limits(config: ModelConfig) -> tuple[int | None, int | None]:
    """Reads vocabulary size and positions from the model's config alone; None where they are unknown.

    An adapter has those of its base.

    Raises:
        UserError: for an adapter that does not name its base, and a config that cannot be read.
    """
    name, revision = config.model_name_or_path, config.model_revision
    base = adapter_base(name, revision)
    name, revision = (name, revision) if base is None else (base, "main")
    try:
        found = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # a broken config or the network may raise anything
        if (Path(name).expanduser() / "config.json").is_file():
            raise UserError(f"model {name!r}: its config.json cannot be read: {first_line(error)}") from error
        return None, None  # a tokenizer without a model beside it is enough to look at data
    text = found.get_text_config()
    vocab_size, positions = (getattr(text, key, None) for key in ("vocab_size", "max_position_embeddings"))
    return vocab_size, positions if isinstance(positions, int) and positions > 0 else None


def check_folder(name: str, files: tuple[str, ...] = MODEL_CONFIGS, what: str = "model") -> None:
    """Refuses a folder that is not there or has none of the files; a hub name passes.

    Raises:
        UserError: naming the folder.
    """
    folder = Path(name)
    if folder.is_dir():
        if not any((folder / file).is_file() for file in files):
            raise UserError(f"{name}: no {what} in this folder (it has no {files[0]})")
    elif folder.exists():
        raise UserError(f"{name}: is a file; a {what} is a folder or a hub name")
    elif folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such folder")
