"""What tdpo has to know of peft: which parameters an adapter owns, what the model is without it, how it is merged."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tdpo.errors import UserError
from tdpo.models.multimodal import exclude_idle_parts
from tdpo.models.policy import causal_lm

logger = logging.getLogger("tdpo")
KEEPING_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Initialisations of LoRA that leave the base's weights as they are; the others (PiSSA, OLoRA, ...) change them."""


def has_adapter(model: Any) -> bool:
    """Whether the model is wrapped by peft."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def with_adapter(model: Any, peft_config: Any) -> Any:
    """Wraps a model in a new adapter.

    Raises:
        UserError: for a model that has one, and for adapters that change the prompt instead of weights.
    """
    from peft import PeftConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTuner

    if not isinstance(peft_config, PeftConfig):
        raise UserError(f"peft_config must be a peft.PeftConfig such as LoraConfig, found {type(peft_config).__name__}")
    if has_adapter(model):
        raise UserError("model has an adapter already; leave peft_config (--use_peft) out to go on training it")
    peft_config = exclude_idle_parts(model, peft_config)
    try:
        with ties_are_known():
            adapted: Any = get_peft_model(model, peft_config)
    except ValueError as error:
        kind = causal_lm(model).config.model_type
        raise UserError(
            f"peft_config: {error} (for a model of type {kind}; --lora_target_modules names layers, or all-linear)"
        ) from error
    if not isinstance(adapted.base_model, BaseTuner):
        raise UserError(
            f"peft_config: {type(peft_config).__name__} changes the prompt; use LoRA or another tuner of weights"
        )
    return adapted


def tell_of_dropout(peft_config: Any) -> None:
    """Says that the dropout an adapter's configuration asks for is off like the model's own."""
    dropout = getattr(peft_config, "lora_dropout", 0.0)
    if dropout:
        logger.warning(
            "lora_dropout %g is off: --disable_dropout is on, and covers the adapter (set it to false to keep it)",
            dropout,
        )


@contextmanager
def ties_are_known() -> Iterator[None]:
    """Silences peft's advice about tied weights under an adapter, which :func:`merged` takes care of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Model has `tie_word_embeddings=True` and a tied layer")
        warnings.filterwarnings("ignore", message=r"Input and output embeddings are no longer tied")
        warnings.filterwarnings("ignore", message=r"`is_gradient_checkpointing` is deprecated")
        yield


def base_name(name: str, prefix: str) -> str | None:
    """The name a tensor of an adapted model has in its base; None for one that belongs to the adapter.

    Args:
        name: Its name in the state of ``get_base_model()``.
        prefix: What the tuner's own parameters begin with, ``lora_`` for LoRA.

    Example:
        >>> base_name("model.layers.0.q_proj.base_layer.weight", "lora_")
        'model.layers.0.q_proj.weight'
        >>> base_name("lm_head.original_module.weight", "lora_")
        'lm_head.weight'
        >>> base_name("model.layers.0.q_proj.lora_A.default.weight", "lora_") is None
        True
    """
    parts = name.split(".")
    owned = (prefix, "trainable_tokens_") if prefix else ("trainable_tokens_",)
    if "modules_to_save" in parts or any(part.startswith(owned) for part in parts):
        return None
    return ".".join(part for part in parts if part not in ("base_layer", "original_module", "token_adapter"))


def tuner_prefix(model: Any) -> str:
    """What the names of the tuner's own parameters begin with."""
    return getattr(model.base_model, "prefix", "")


def moves_its_base(model: Any) -> str:
    """Why the model with its adapter switched off is not the model the adapter was put on, in words; empty if it is."""
    for config in model.peft_config.values():
        init = getattr(config, "init_lora_weights", True)
        if init not in KEEPING_INITS:
            return f"init_lora_weights={init!r} changes the weights of the base"
        if getattr(config, "layer_replication", None):
            return "layer_replication changes the layers of the base"
    prefix = tuner_prefix(model)
    for name, parameter in model.get_base_model().named_parameters():
        if parameter.requires_grad and base_name(name, prefix) is not None:
            return f"{name} of the base is trained too"
    return ""


def adapter_layers(model: nn.Module) -> list[Any]:
    """Every layer an adapter can be switched off in, modules that are saved whole among them."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    return [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]


@contextmanager
def switched_off(layers: list[Any]) -> Iterator[None]:
    """The layers without their adapter; afterwards each is as it was, and what took a gradient takes it again.

    peft's own ``disable_adapter`` makes every parameter of the active adapter trainable when it ends, also those that
    were frozen on purpose.
    """
    active = [layer for layer in layers if not layer.disable_adapters]
    trained = [(parameter, parameter.requires_grad) for layer in active for parameter in layer.parameters()]
    for layer in active:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in active:
            layer.enable_adapters(True)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def merged(model: Any) -> Any:
    """The adapted model as a plain one: the adapter's change is added to the weights, saved modules take their places.

    Raises:
        UserError: for a model without an adapter, or where a merged weight is not finite.
    """
    if not has_adapter(model):
        raise UserError("the model has no adapter, so there is nothing to merge")
    try:
        with ties_are_known():
            plain = model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"the adapter cannot be merged: {error}") from error
    head, embedding = plain.get_output_embeddings(), plain.get_input_embeddings()
    text = plain.config.get_text_config()
    if getattr(text, "tie_word_embeddings", False) and head.weight is not embedding.weight:
        # Loading would tie them again, and so lose what was trained in one of them.
        text.tie_word_embeddings = plain.config.tie_word_embeddings = False
    return plain
