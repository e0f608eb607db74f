"""One gradient for a tied weight: what the embedding adds to the head's, without a second ``[V, D]``.

A weight that is both embedding and head gets two gradients, and autograd makes the embedding's a full table of zeros
with a few rows filled, to add it to the head's. Here the fused loss leaves the head's gradient with a
:class:`TiedGradient`, and the lookup, whose backward comes last, adds its rows to it and hands the one table on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from tdpo.models.policy import causal_lm


class TiedGradient:
    """Where the head's gradient waits for the embedding's rows.

    Attributes:
        lookups: Lookups that will come for it in their backward.
    """

    def __init__(self) -> None:
        self.lookups = 0
        self._waiting: Tensor | None = None

    def leave(self, gradient_VD: Tensor) -> Tensor | None:
        """Leaves the head's gradient for a lookup to collect; gives it back where none will."""
        if not self.lookups:
            return gradient_VD
        self._waiting = gradient_VD
        return None

    def collect(self) -> Tensor | None:
        """The head's gradient, once."""
        gradient, self._waiting = self._waiting, None
        return gradient


@contextmanager
def tied_gradient(model: nn.Module, device: torch.device) -> Iterator[TiedGradient | None]:
    """Inside, the embedding of a model that ties it to its head keeps company with the gradient that is yielded.

    None, and nothing is changed, where there is nothing to gain or the embedding is more than a plain lookup: an untied
    or frozen weight, one that DeepSpeed takes away after each module, a patched forward, autocast (the head is a cast
    copy then), no gradients. Hooks on the embedding receive the rows as they would without.

    Args:
        model: The model.
        device: Where it computes, which offloaded weights do not tell.
    """
    lm: Any = causal_lm(model)
    table, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    if not (_plainly_tied(table, head) and torch.is_grad_enabled()) or torch.is_autocast_enabled(device.type):
        yield None
        return
    gradient = TiedGradient()

    def look_up(layer: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if type(output.grad_fn).__name__ != "EmbeddingBackward0":
            return None  # something changed the rows already, hooks on all modules say; autograd adds up then
        gradient.lookups += 1
        return _Lookup.apply(layer.weight, inputs[0], layer.padding_idx, gradient)

    # Other hooks run after it: they add noise to the rows (NEFTune) or change them in some other way.
    handle = table.register_forward_hook(look_up, prepend=True)
    try:
        yield gradient
    finally:
        handle.remove()


def _plainly_tied(table: Any, head: Any) -> bool:
    """Whether an embedding does nothing but look up rows of a weight that is the head's too, and is trained."""
    if type(table) is not nn.Embedding or table.max_norm is not None or table.scale_grad_by_freq:
        return False
    if "forward" in vars(table):  # patched, as accelerate does to offload weights
        return False
    weight = table.weight
    return getattr(head, "weight", None) is weight and weight.requires_grad and not hasattr(weight, "ds_id")


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, ids: Tensor, padding: int | None, gradient: TiedGradient) -> Tensor:
        """Rows of the table."""
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding, ctx.gradient = weight_VD.shape, padding, gradient
        return embedding(ids, weight_VD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The head's gradient with the rows added; alone where the head's was collected already or never came."""
        (ids,) = ctx.saved_tensors
        table = ctx.gradient.collect()
        table = grad.new_zeros(ctx.shape) if table is None else table
        if ctx.padding is not None:
            grad = grad.masked_fill((ids == ctx.padding)[..., None], 0)
        table.index_add_(0, ids.flatten(), grad.flatten(0, -2).to(table.dtype))
        return table, None, None, None
