"""From a packed batch to the hidden states of its response tokens, in either layout."""

from __future__ import annotations

from torch import nn

from tdpo.models.policy import body_states, head_of
from tdpo.models.trees import tree_states
from tdpo.types import Hidden, PackedBatch


def response_hidden(model: nn.Module, batch: PackedBatch) -> Hidden:
    """The hidden states ``[N, D]`` that predict the response tokens of a batch, and the model's head.

    Differentiable in the model's parameters when gradients are on.
    """
    # Padded rows are padded at the end and attention is causal: no mask is needed, and the fastest path stays.
    states = tree_states(model, batch) if batch.layout == "tree" else body_states(model, input_ids=batch.input_ids)
    return Hidden(states.flatten(0, 1)[batch.source_index], head_of(model))
