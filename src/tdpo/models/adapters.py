"""What tdpo has to know of peft: which parameters an adapter owns, what the model is without it, how it is merged."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
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

    if not isinstance(peft_config, PeftConfig):
        raise UserError(f"peft_config must be a peft.PeftConfig such as LoraConfig, found {type(peft_config).__name__}")
    if has_adapter(model):
        raise UserError("model has an adapter already; leave peft_config (--use_peft) out to continue training it")
    peft_config = exclude_idle_parts(model, peft_config)
    try:
        with ties_are_known():
            adapted: Any = get_peft_model(model, peft_config)
    except ValueError as error:
        kind = causal_lm(model).config.model_type
        raise UserError(
            f"peft_config: {error} (for a model of type {kind}; --lora_target_modules names layers, or all-linear)"
        ) from error
    check_tunes_weights(adapted)
    _warn_of_lost_names(adapted, peft_config)
    return adapted


def _warn_of_lost_names(adapted: Any, peft_config: Any) -> None:
    """Warns of names in a list that no module has, which peft passes over as long as another one is found."""
    known = [f".{name}" for name, _ in adapted.named_modules()]
    for option in ("target_modules", "modules_to_save"):
        asked = getattr(peft_config, option, None)
        names = sorted(asked) if isinstance(asked, list | tuple | set) else []
        lost = [name for name in names if not any(module.endswith(f".{name}") for module in known)]
        if lost:
            logger.warning("%s: %s has no module %s", option, type(causal_lm(adapted)).__name__, ", ".join(lost))


def check_tunes_weights(model: Any) -> None:
    """Refuses an adapter that training would leave out: one of the prompt, of some tokens alone, or a merged one.

    Raises:
        UserError: naming what kind of adapter it is.
    """
    from peft.tuners.tuners_utils import BaseTuner

    if not has_adapter(model):
        return
    if not isinstance(model.base_model, BaseTuner):
        kind = type(model.active_peft_config).__name__
        raise UserError(f"peft_config: {kind} changes the prompt; use LoRA or another tuner of weights")
    if any(getattr(config, "alora_invocation_tokens", None) for config in model.peft_config.values()):
        raise UserError(
            "peft_config: alora_invocation_tokens is not available: peft looks for these tokens in its own forward, "
            "so the adapter would never be trained; leave it out"
        )
    if any(getattr(layer, "merged", False) for layer in adapter_layers(model)):
        raise UserError(
            "the adapter is merged into the base (merge_adapter), so it would not be trained: call "
            "model.unmerge_adapter() first"
        )


def warn_of_dropout(peft_config: Any) -> None:
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


def frozen_base(model: Any) -> list[nn.Parameter]:
    """Returns the weights under an adapter that training leaves as they are; none for a model without an adapter."""
    if not has_adapter(model):
        return []
    prefix = tuner_prefix(model)
    named = model.get_base_model().named_parameters()
    return [weight for name, weight in named if not weight.requires_grad and base_name(name, prefix) is not None]


def changes_nothing(model: Any) -> bool:
    """Whether the model still equals its base, as under a new LoRA, whose B is 0; False for tuners of other kinds."""
    return not moves_its_base(model) and all(_changes_nothing(layer) for layer in adapter_layers(model))


def _changes_nothing(layer: Any) -> bool:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

    active = layer.active_adapters
    if isinstance(layer, TrainableTokensWrapper):
        return True  # the layer inside it is looked at on its own
    if isinstance(layer, TrainableTokensLayer):
        rows = [(layer.trainable_tokens_delta, layer.trainable_tokens_original, name) for name in active]
        return all(torch.equal(now[name], original[name]) for now, original, name in rows if name in now)
    if isinstance(layer, ModulesToSaveWrapper):
        original = layer.original_module.state_dict()
        saved = [layer.modules_to_save[name].state_dict() for name in active if name in layer.modules_to_save]
        return all(torch.equal(weight, original[name]) for state in saved for name, weight in state.items())
    if not isinstance(layer, LoraLayer) or layer.lora_variant:
        return False
    zeros = [weight for name in active if name in layer.lora_B for weight in layer.lora_B[name].parameters()]
    zeros += [layer.lora_embedding_A[name] for name in active if name in layer.lora_embedding_A]
    return not any(weight.any() for weight in zeros)


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
    config = model.get_base_model().config
    tied = [part for part in (config, config.get_text_config()) if getattr(part, "tie_word_embeddings", False)]
    untied = _untie(model.get_base_model())
    try:
        with ties_are_known():
            plain = model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"the adapter cannot be merged: {error}") from error
    head, embedding = plain.get_output_embeddings(), plain.get_input_embeddings()
    if untied and torch.equal(head.weight, embedding.weight):
        head.weight = embedding.weight
    for part in tied:
        # Loading would tie them again, and so lose what was trained in one of them.
        part.tie_word_embeddings = head.weight is embedding.weight
    return plain


def _untie(lm: Any) -> bool:
    """Gives the head its own copy of a weight it shares with the embedding, if an adapter is on either of the two.

    peft adds a layer's change to its weight in place, and so would change the other layer as well.

    Returns:
        Whether it did.
    """
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    plain_head, plain_embedding = without_adapter(head), without_adapter(embedding)
    if plain_head.weight is not plain_embedding.weight or (plain_head is head and plain_embedding is embedding):
        return False
    plain_head.weight = nn.Parameter(plain_head.weight.detach().clone(), requires_grad=False)
    return True


def without_adapter(layer: Any) -> Any:
    """Returns the plain layer inside whatever peft wrapped around it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    while isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
        layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer.original_module
    return layer
