"""Runs functions in place of forwards, so that they run inside whatever a model is wrapped in.

DDP, FSDP2 and ZeRO synchronise gradients and gather weights, and peft switches adapters, around the *forward* of what
they wrap. So body, head and loss have to run within the wrapped model's forward, and whatever reads the head's weight
within the head's own, since each module's weights may be whole only while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from tdpo.models.policy import causal_lm, head_of

Result = TypeVar("Result")


@contextmanager
def redirect_forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Runs ``function`` wherever the forward of ``module`` would run inside the context; hooks run as always."""
    own = vars(module).get("forward")  # an instance's own: accelerate and others patch it
    module.forward = function
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def run_in_forward(wrapped: Any, model: Any, function: Callable[[Any], Result]) -> Result:
    """Calls ``function(causal_lm)`` within the forward of a model and of everything it is wrapped in.

    Autocast that accelerate puts on a forward is bypassed; enter it outside.

    Args:
        wrapped: The model as a training engine wrapped it, or the model itself.
        model: The model inside it, with or without adapters.
        function: Called with the causal language model inside both.
    """
    lm = causal_lm(model)
    with redirect_forward(lm, lambda *_, **__: function(lm)):
        return wrapped(input_ids=None)  # DDP needs an argument to move to its device


def run_in_head(model: nn.Module, states: Tensor, function: Callable[[Tensor], Result]) -> Result:
    """Calls ``function(states)`` within the forward of the model's head, and of every module the head is made of.

    The function has to return, as a tensor in a tuple, every tensor a backward may start from: wrappers gather the
    weights again when its gradient arrives.
    """
    head_of(model)  # proves the model, once, by a forward that has to find its head as it is
    head = causal_lm(model).get_output_embeddings()
    calls = [
        module.__call__
        for name, module in head.named_modules()  # an adapter that saves a head whole wraps two
        # Containers of modules or of trained tokens have no forward; a parametrisation's computes the weight.
        if type(module).forward is not nn.Module.forward and "parametrizations" not in name.split(".")
    ]
    with ExitStack() as redirections:
        for call, inner in zip(calls, [*calls[1:], function], strict=False):
            redirections.enter_context(redirect_forward(call.__self__, inner))
        return (calls or [function])[0](states)
