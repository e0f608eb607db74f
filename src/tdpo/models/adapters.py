"""Adds, checks, switches off and merges peft's adapters, and separates their parameters from those of the base."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tdpo.errors import UserError
from tdpo.models.multimodal import exclude_idle_parts
from tdpo.models.policy import causal_lm

logger = logging.getLogger("tdpo")
KEEPING_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Initialisations of LoRA that leave the base's weights as they are; the others (PiSSA, OLoRA, ...) change them."""


def has_adapter(model: Any) -> bool:
    """Returns whether the model is wrapped by peft."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def with_adapter(model: Any, peft_config: Any) -> Any:
    """Adds a new adapter to a model.

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
        with silence_tied_warnings():
            adapted: Any = get_peft_model(model, peft_config)
    except ValueError as error:
        kind = causal_lm(model).config.model_type
        raise UserError(
            f"peft_config: {error} (for a model of type {kind}; --lora_target_modules names layers, or all-linear)"
        ) from error
    check_tunes_weights(adapted)
    # peft ignores names in a list that no module has as long as it finds another one.
    modules = [f".{name}" for name, _ in adapted.named_modules()]
    for option in ("target_modules", "modules_to_save"):
        asked = getattr(peft_config, option, None)
        names = sorted(asked) if isinstance(asked, list | tuple | set) else []
        missing = [name for name in names if not any(module.endswith(f".{name}") for module in modules)]
        if missing:
            logger.warning("%s: %s has no module %s", option, type(causal_lm(adapted)).__name__, ", ".join(missing))
    return adapted


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
    """Warns that the dropout of an adapter's configuration is off like the model's own."""
    dropout = getattr(peft_config, "lora_dropout", 0.0)
    if dropout:
        logger.warning(
            "lora_dropout %g is off: --disable_dropout is on, and covers the adapter (set it to false to keep it)",
            dropout,
        )


@contextmanager
def silence_tied_warnings() -> Iterator[None]:
    """Silences peft's advice about tied weights under an adapter, which :func:`merge_adapter` takes care of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Model has `tie_word_embeddings=True` and a tied layer")
        warnings.filterwarnings("ignore", message=r"Input and output embeddings are no longer tied")
        warnings.filterwarnings("ignore", message=r"`is_gradient_checkpointing` is deprecated")
        yield


def base_tensors(model: Any, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of an adapted model that are its base's, under their names in the base.

    Args:
        model: The adapted model.
        named: Names in ``get_base_model()`` and tensors.

    Examples:
        >>> from types import SimpleNamespace
        >>> lora = SimpleNamespace(base_model=SimpleNamespace(prefix="lora_"))
        >>> names = "q_proj.base_layer.weight", "q_proj.lora_A.default.weight", "lm_head.original_module.weight"
        >>> [name for name, _ in base_tensors(lora, [(name, torch.zeros(1)) for name in names])]
        ['q_proj.weight', 'lm_head.weight']
    """
    prefix = getattr(model.base_model, "prefix", "")
    own = (prefix, "trainable_tokens_") if prefix else ("trainable_tokens_",)
    for name, tensor in named:
        parts = name.split(".")
        if "modules_to_save" not in parts and not any(part.startswith(own) for part in parts):
            yield (
                ".".join(part for part in parts if part not in ("base_layer", "original_module", "token_adapter")),
                tensor,
            )


def adapter_settings(model: Any) -> dict[str, dict[str, Any]]:
    """Returns, by adapter, the settings that decide which weights it has and their scale; empty without adapters."""
    names = (
        "peft_type", "r", "lora_alpha", "target_modules", "target_parameters", "modules_to_save", "use_dora",
        "use_rslora", "bias", "layers_to_transform", "rank_pattern", "alpha_pattern",
    )  # fmt: skip
    configs = model.peft_config if has_adapter(model) else {}
    found = {adapter: {name: getattr(config, name, None) for name in names} for adapter, config in configs.items()}
    return json.loads(json.dumps(found, default=sorted))  # targets are sets


def find_changed_base(model: Any) -> str:
    """Explains why the model with its adapter off is not the model the adapter was added to; empty if it is."""
    for config in model.peft_config.values():
        init = getattr(config, "init_lora_weights", True)
        if init not in KEEPING_INITS:
            return f"init_lora_weights={init!r} changes the weights of the base"
        if getattr(config, "layer_replication", None):
            return "layer_replication changes the layers of the base"
    named = base_tensors(model, model.get_base_model().named_parameters())
    return next((f"{name} of the base is trained too" for name, weight in named if weight.requires_grad), "")


def frozen_base(model: Any) -> list[Any]:
    """Returns the weights under an adapter that training leaves as they are; none for a model without an adapter."""
    if not has_adapter(model):
        return []
    named = base_tensors(model, model.get_base_model().named_parameters())
    return [weight for _, weight in named if not weight.requires_grad]


def equals_base(model: Any) -> bool:
    """Returns whether the model equals its base, as under a new LoRA, whose B is 0; False for tuners of other kinds."""
    return not find_changed_base(model) and all(map(_layer_equals_base, adapter_layers(model)))


def _layer_equals_base(layer: Any) -> bool:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

    active = layer.active_adapters
    if isinstance(layer, TrainableTokensWrapper):
        return True  # the layer inside it is one of the layers too
    if isinstance(layer, TrainableTokensLayer):
        now, original = layer.trainable_tokens_delta, layer.trainable_tokens_original
        return all(torch.equal(now[name], original[name]) for name in active if name in now)
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
    """Returns every layer that an adapter can be switched off in, modules that are saved whole among them."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    return [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]


@contextmanager
def adapter_disabled(layers: list[Any]) -> Iterator[None]:
    """Switches the adapter of layers off, and restores each layer and what took a gradient afterwards.

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


def merge_adapter(model: Any) -> Any:
    """Merges an adapter into its base: its change is added to the weights, saved modules replace their originals.

    Returns:
        The model without peft's wrappers.

    Raises:
        UserError: for a model without an adapter, or where a merged weight is not finite.
    """
    if not has_adapter(model):
        raise UserError("the model has no adapter, so there is nothing to merge")
    lm = model.get_base_model()
    tied = [part for part in (lm.config, lm.config.get_text_config()) if getattr(part, "tie_word_embeddings", False)]
    layers = lm.get_output_embeddings(), lm.get_input_embeddings()
    head, embedding = (without_adapter(layer) for layer in layers)
    # peft adds a layer's change to its weight in place, and so would change a layer that shares the weight.
    untied = head.weight is embedding.weight and layers != (head, embedding)
    if untied:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    try:
        with silence_tied_warnings():
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


def without_adapter(layer: Any) -> Any:
    """Returns the plain layer inside whatever peft wrapped around it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    while isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
        layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer.original_module
    return layer
