"""Runs code inside a model's forward, whatever the model is wrapped in.

Data-parallel and sharding wrappers synchronise gradients and gather weights around the *forward* of what they wrap. So
body, head and loss have to run within the model's forward: one that was given :func:`open_forward` accepts one more
argument, ``inside=function``, and then returns ``function(model)``. What reads the head's weight runs within the head's
own forward too (:func:`run_in_head`), since each module's weights may be whole only while it runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, TypeVar

from torch import Tensor, nn

from tdpo.models.policy import causal_lm, head_of

Result = TypeVar("Result")


def open_forward(model: nn.Module) -> None:
    """Lets the forward of the causal language model in ``model`` take ``inside``; anything else goes on as before."""
    lm = causal_lm(model)
    if "forward" in vars(lm) and getattr(vars(lm)["forward"], "opened_by_tdpo", False):
        return

    def forward(self: Any, *args: Any, inside: Callable[[Any], Any] | None = None, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs) if inside is None else inside(self)

    # The signature is the model's own, but there is no __wrapped__ for others to unwrap, which would close it again.
    forward.__signature__ = inspect.signature(type(lm).forward)  # type: ignore[attr-defined]
    forward.opened_by_tdpo = True  # type: ignore[attr-defined]
    lm.forward = MethodType(forward, lm)  # bound, so that a deep copy of the model gets its own


def run_inside(model: nn.Module, function: Callable[[Any], Result]) -> Result:
    """Calls ``function(causal_lm)`` within the forward of ``model``, wrapped or not; see :func:`open_forward`."""
    return model(inside=function)


def run_in_head(model: nn.Module, states: Tensor, function: Callable[[Tensor], Result]) -> Result:
    """Calls ``function(states)`` within the forward of the model's head, and of every module the head is made of.

    What it returns has to name, as a tensor in a tuple, every tensor a backward may start from: wrappers gather the
    weights again when its gradient arrives.
    """
    head_of(model)  # proves the model, once, by a forward that has to find its head as it is
    head = causal_lm(model).get_output_embeddings()
    for name, module in reversed(list(head.named_modules())):  # an adapter that saves a head whole wraps two
        # Containers of modules or of trained tokens have no forward; a parametrisation's computes the weight.
        if type(module).forward is nn.Module.forward or "parametrizations" in name.split("."):
            continue
        function = partial(_as_forward, module, function)
    return function(states)


def _as_forward(module: nn.Module, function: Callable[[Tensor], Result], states: Tensor) -> Result:
    """Calls a module, hooks and all, with a function in the place of its forward."""
    own = vars(module).get("forward")
    module.forward = function
    try:
        return module(states)
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
