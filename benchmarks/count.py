"""Numbers of a training step that do not depend on the machine, counted from the operations torch dispatches.

Shapes: V vocabulary, D width, N response tokens.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from measure import MEBIBYTE
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

PRODUCTS = {
    torch.ops.aten.mm: (0, 1),
    torch.ops.aten.addmm: (1, 2),
    torch.ops.aten.addmm_: (1, 2),
    torch.ops.aten.bmm: (0, 1),
}
"""Matrix products, and the positions of their factors among the arguments."""


def _addmm_flops(_: Any, left: Any, right: Any, **options: Any) -> int:
    return 2 * math.prod(left) * right[-1]


IN_PLACE = {torch.ops.aten.addmm_: _addmm_flops}
"""What torch's counter leaves out."""


class LogitsCounter(TorchDispatchMode):
    """Counts products with the head and the bytes of logits alive at a time.

    A product is one with the head if its dimensions are D and one that is larger than any other of the step: V, or
    the part of it that is computed at a time. Logits are tensors with such a dimension that are not ``[V, D]`` as the
    head and its gradient are; views of a storage count once.

    Args:
        bound: Largest of the other dimensions: tokens of the batch, padding included, or width of a layer.
        width: D.

    Attributes:
        multiplications: Floating-point multiplications of the products with the head.
        peak: Largest number of bytes of logits alive at a time.
    """

    def __init__(self, bound: int, width: int) -> None:
        super().__init__()
        self.bound, self.width = bound, width
        self.multiplications, self.peak = 0, 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        places = PRODUCTS.get(function.overloadpacket)
        if places is not None:
            left, right = (args[place].shape for place in places)
            sizes = [*left, right[-1]]
            if max(sizes) > self.bound and self.width in sizes:
                self.multiplications += math.prod(sizes)
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2:
                self._note(value)
        return result

    def _note(self, value: Tensor) -> None:
        if max(value.shape[-2:]) <= self.bound or self.width in value.shape[-2:]:
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        weakref.finalize(storage, self._alive.pop, key, None)
        self.peak = max(self.peak, sum(self._alive.values()))


@contextmanager
def body_tokens(*bodies: nn.Module) -> Iterator[list[int]]:
    """Yields a list of the tokens of every call of the bodies' first layers, padding included."""
    found: list[int] = []
    handles = [
        body.layers[0].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].shape[:-1].numel()))
        for body in bodies
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def counts_of(
    step: Callable[[], object], policy: Any, reference: Any, tokens: int, response_tokens: int
) -> dict[str, float]:
    """Counts one step.

    Args:
        step: The forward and backward.
        policy: A causal language model with ``model.layers``.
        reference: Another one of the same width.
        tokens: Tokens of the batch, padding included.
        response_tokens: N.

    Returns:
        ``head_products``: products with the head per response token, one being V times D multiplications;
        ``body_tokens``: tokens through the layers of both models per response token; ``logits_mebibytes``: the most
        bytes of logits alive; ``gigaflops``: floating-point operations of all products.
    """
    vocab_size, width = policy.lm_head.weight.shape
    bound = max(tokens, policy.config.intermediate_size)
    if vocab_size <= bound or 0 < vocab_size % 32768 <= bound:  # TRL computes 32,768 words at a time
        raise ValueError(f"products with a vocabulary of {vocab_size} look like others, which have up to {bound} rows")
    step()  # what is found out once, such as whether the model takes trees, is not counted
    counter, flops = LogitsCounter(bound, width), FlopCounterMode(display=False, custom_mapping=IN_PLACE)
    with body_tokens(policy.model, reference.model) as passed, flops, counter:
        step()
    return {
        "head_products": counter.multiplications / (response_tokens * vocab_size * width),
        "body_tokens": sum(passed) / response_tokens,
        "logits_mebibytes": counter.peak / MEBIBYTE,
        "gigaflops": flops.get_total_flops() / 1e9,
    }
