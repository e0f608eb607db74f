"""Multimodal models trained on text alone: finds the weights that text does not reach, and keeps their processors."""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from tdpo.errors import UserError
from tdpo.models.policy import body_states, causal_lm
from tdpo.models.probe import probe_ids, probing

logger = logging.getLogger("tdpo")
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)
"""Files of a processor beside those of its tokenizer."""


def tokenizer_of(processing_class: Any) -> Any:
    """Returns the tokenizer of a processor, with the processor's chat template; a tokenizer, or None, as it is.

    Raises:
        UserError: for an object that is neither.
    """
    if processing_class is None or isinstance(processing_class, PreTrainedTokenizerBase):
        return processing_class
    tokenizer = getattr(processing_class, "tokenizer", None)
    if tokenizer is None:
        raise UserError(
            f"processing_class: {type(processing_class).__name__} has no tokenizer; pass a tokenizer, or a processor "
            "that has one (AutoProcessor)"
        )
    template = getattr(processing_class, "chat_template", None)
    if template and template != tokenizer.chat_template:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = template
    return tokenizer


def processor_template(name: str, revision: str | None = None) -> str | None:
    """Returns the chat template that only the processor of a checkpoint has: older ones keep it in its files."""
    for file in ("chat_template.json", "processor_config.json"):
        found = find_file(name, file, revision)
        if found is not None:
            content = json.loads(Path(found).read_text(encoding="utf-8"))
            if isinstance(content, dict) and isinstance(content.get("chat_template"), str):
                return content["chat_template"]
    return None


def copy_processor(model: Any, folder: Path) -> None:
    """Copies the processor files of the checkpoint a model was loaded from to a folder that lacks them.

    The files alone are needed, so a processor whose libraries are not installed (torchvision, say) is kept too.
    """
    config = causal_lm(model).config
    name, revision = getattr(config, "_name_or_path", ""), getattr(config, "_commit_hash", None)
    if not (name and is_multimodal(model)):
        return
    for file in PROCESSOR_FILES:
        found = find_file(name, file, revision)
        if found is not None and not (folder / file).exists():
            shutil.copyfile(found, folder / file)


def find_file(name: str, file: str, revision: str | None = None) -> str | None:
    """Returns the path of a file of a folder or hub name, None if it has none."""
    try:
        return cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # the folder is gone since the model was loaded
        return None


def is_multimodal(model: nn.Module) -> bool:
    """Returns whether the model's config holds configs of parts, as those of vision or audio models do."""
    return any(isinstance(value, PreTrainedConfig) for value in vars(causal_lm(model).config).values())


def idle_parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Finds the weights of a multimodal model that rows of text alone do not reach.

    One forward pass of text decides: the weights in its autograd graph take part, and the quantised ones of modules
    that ran, which no graph holds.

    Returns:
        The weights by the outermost module that holds no others; a vision tower and its projector, say. Empty for a
        model of text.
    """
    lm: Any = causal_lm(model)
    if not is_multimodal(lm):
        return {}
    reached = {id(parameter) for parameter in lm.get_output_embeddings().parameters()}
    frozen = [parameter for parameter in lm.parameters() if not parameter.requires_grad]

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        own = module.parameters(recurse=False)
        reached.update(id(parameter) for parameter in own if not parameter.is_floating_point())

    handles = [module.register_forward_hook(record) for module in lm.modules()]
    try:
        with probing(lm, gradients=True):
            for parameter in frozen:  # the graph holds trainable weights alone
                parameter.requires_grad_(parameter.is_floating_point())
            nodes: list[Any] = [body_states(lm, input_ids=probe_ids(lm, 1, 3)).grad_fn]
    finally:
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(False)
    visited: set[Any] = {None}
    while nodes:
        node = nodes.pop()
        if node not in visited:
            visited.add(node)
            nodes += [following for following, _ in node.next_functions]
            if hasattr(node, "variable"):  # a leaf of the graph
                reached.add(id(node.variable))
    named = list(lm.named_parameters(remove_duplicate=False))
    used = {part for name, parameter in named if id(parameter) in reached for part in _parts(name)}
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named:
        if id(parameter) not in reached:
            parts.setdefault(next(part for part in _parts(name) if part not in used), []).append(parameter)
    return parts


def _parts(name: str) -> Iterator[str]:
    """Yields the modules that hold a parameter, the outermost first, and the parameter's own name."""
    return accumulate(name.split("."), "{}.{}".format)


def freeze_idle_parts(model: nn.Module) -> None:
    """Freezes what rows of text alone do not reach, and logs one line that names it.

    Otherwise data parallelism waits for gradients that never come, and decay could move weights that no row trains.
    """
    parts = {
        name: parameters
        for name, parameters in idle_parts(model).items()
        if any(parameter.requires_grad for parameter in parameters)
    }
    for parameters in parts.values():
        for parameter in parameters:
            parameter.requires_grad_(False)
    if parts:
        logger.warning("frozen, since text alone does not reach them: %s", _describe(parts))


def exclude_idle_parts(model: nn.Module, peft_config: Any) -> Any:
    """Excludes what rows of text alone do not reach from an adapter, and logs one line that names it.

    The names of a language model's layers are often those of its vision tower too, where an adapter would stay at zero.

    Returns:
        The configuration, a copy where something is left out.
    """
    parts = idle_parts(model)
    if not (parts and hasattr(peft_config, "exclude_modules")):
        return peft_config
    peft_config, asked = copy.copy(peft_config), peft_config.exclude_modules
    patterns = [rf"({'|'.join(map(re.escape, parts))})(\..*)?"]
    if isinstance(asked, str):
        patterns.append(asked)
    elif asked:
        patterns.append(rf"(.*\.)?({'|'.join(map(re.escape, asked))})")
    peft_config.exclude_modules = "|".join(f"(?:{pattern})" for pattern in patterns)
    logger.warning("no adapter, since text alone does not reach them: %s", _describe(parts))
    return peft_config


def _describe(parts: dict[str, list[nn.Parameter]]) -> str:
    sizes = {name: sum(parameter.numel() for parameter in parameters) for name, parameters in parts.items()}
    return ", ".join(f"{name} ({size:,} weights)" for name, size in sizes.items())
