"""``torch.compile`` where it helps: layer by layer, in place."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import nn

from tdpo.errors import UserError
from tdpo.models.policy import causal_lm, unwrapped

logger = logging.getLogger("tdpo")


def compile_layers(models: Iterable[nn.Module], backend: str | None = None, mode: str | None = None) -> int:
    """Compiles every layer of some models where it stands; names, hooks and saved files stay as they are.

    All layers of a model share one compiled program. What lies around them differs from batch to batch and from mask to
    mask, and the head and the loss have kernels of their own, so compiling more gains nothing and compiles again.

    Args:
        models: Transformers models; their ``_no_split_modules`` say what their layers are.
        backend: As in ``torch.compile``; None is torch's default.
        mode: As in ``torch.compile``.

    Returns:
        How many layers were compiled.

    Raises:
        UserError: for a model that does not say what its layers are.
    """
    compiled = 0
    for model in models:
        lm = causal_lm(model)
        names = set(getattr(lm, "_no_split_modules", None) or ())
        layers = [module for module in lm.modules() if type(module).__name__ in names]
        inner = {id(part) for layer in layers for part in layer.modules() if part is not layer}
        outer = [layer for layer in layers if id(layer) not in inner]
        if not outer:
            raise UserError(f"--torch_compile: {type(lm).__name__} does not say what its layers are")
        for layer in outer:
            layer.compile(backend=backend or "inductor", mode=mode, dynamic=True)
        compiled += len(outer)
    return compiled


def uncompiled(model: Any) -> Any:
    """Returns a model without what ``torch.compile`` and ``Module.compile`` put around all of it.

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
