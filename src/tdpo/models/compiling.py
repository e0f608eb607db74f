"""``torch.compile`` where it helps: layer by layer, in place."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from accelerate.utils import compile_regions_deepspeed
from accelerate.utils.other import has_repeated_blocks
from torch import nn

from tdpo.errors import UserError
from tdpo.models.policy import body_of, causal_lm
from tdpo.models.probe import unwrapped

logger = logging.getLogger("tdpo")


def compile_layers(models: Iterable[nn.Module], backend: str | None = None, mode: str | None = None) -> None:
    """Compiles the repeated layers of some models in place; names, hooks and saved files stay as they are.

    All layers of a model share one compiled program. The masks differ from batch to batch, and the head and the loss
    have kernels of their own, so compiling those gains nothing and compiles again.

    Args:
        models: Transformers models.
        backend: As in ``torch.compile``; None is torch's default.
        mode: As in ``torch.compile``.

    Raises:
        UserError: for a model without repeated layers.
    """
    for model in models:
        body = body_of(model)  # without the head, whose forward may run the loss
        if not has_repeated_blocks(body):
            name = type(causal_lm(model)).__name__
            raise UserError(f"--torch_compile: {name} has no list of layers of one class to compile")
        # The one of accelerate's functions for regions that compiles in place; it serves without DeepSpeed too.
        compile_regions_deepspeed(body, backend=backend or "inductor", mode=mode, dynamic=True)


def uncompiled(model: Any) -> Any:
    """Removes what ``torch.compile`` and ``Module.compile`` put around a whole model, and returns it.

    Training runs body, head and loss inside the model's forward, which would be compiled again for every batch.
    """
    outer, lm = unwrapped(model), causal_lm(model)
    if outer is not lm:
        outer.base_model.model = lm  # a compiled model within an adapter, whose parameters' names would be saved
    for module in (outer, lm):
        if getattr(module, "_compiled_call_impl", None) is not None:
            module._compiled_call_impl = None
            model = None
    if model is not outer:
        logger.info("the model is trained without the torch.compile around it; --torch_compile compiles its layers")
    return outer
