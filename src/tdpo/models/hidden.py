"""From a packed batch to the hidden states of its response tokens, in either layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tdpo.models.modes import policy_mode
from tdpo.models.neighbours import laid_out, neighbour_plan, own_frequencies
from tdpo.models.policy import body_states, causal_lm, head_of
from tdpo.models.trees import tree_states
from tdpo.types import Hidden, PackedBatch


def response_states(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Computes the hidden states ``[N, D]`` that predict the response tokens of a batch.

    Differentiable in the parameters of the model's body when gradients are on.
    """
    rows, plan = laid_out(model, batch), neighbour_plan(model, latest=True)
    alike = rows.layout == "tree" or plan.switch is None  # all rows have the same rotary frequencies
    with policy_mode(model), nullcontext() if alike else own_frequencies(plan, (rows.tree_ids >= 0).sum(1)):
        # Padded rows are padded at the end and attention is causal: no mask is needed, and the fastest path stays.
        states = tree_states(model, rows) if rows.layout == "tree" else body_states(model, input_ids=rows.input_ids)
    return states.flatten(0, 1)[rows.source_index]


def response_hidden(model: nn.Module, batch: PackedBatch) -> Hidden:
    """Computes :func:`response_states` and adds the model's head, for a model whose weights are whole."""
    return Hidden(response_states(model, batch), head_of(model))


@contextmanager
def sparse_embedding_gradient(model: nn.Module) -> Iterator[None]:
    """Makes the gradient of an embedding that is also the trained head sparse.

    Autograd adds its few rows to the head's gradient then, without a second table ``[V, D]``, which would raise the
    peak memory of a step. Everything but a plain lookup is left alone: subclasses, patched forwards, ZeRO's weights.
    """
    lm: Any = causal_lm(model)
    table, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    plain = type(table) is nn.Embedding and not table.scale_grad_by_freq and "forward" not in vars(table)
    tied = plain and getattr(head, "weight", None) is table.weight and not hasattr(table.weight, "ds_id")
    trained = tied and table.weight.requires_grad and torch.is_grad_enabled()
    if not (trained and table.weight.device.type in ("cpu", "cuda")):
        yield
        return
    sparse, table.sparse = table.sparse, True
    try:
        yield
    finally:
        table.sparse = sparse
