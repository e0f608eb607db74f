"""Runs code inside a model's forward, whatever the model is wrapped in.

Data-parallel and sharding wrappers synchronise gradients and gather weights around the *forward* of what they wrap;
the head's weight may be whole only there. So body, head and loss have to run within one forward. A model that was
given :func:`open_forward` accepts one more argument, ``inside=function``, and then returns ``function(model)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

from torch import nn

from tdpo.models.policy import causal_lm

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
