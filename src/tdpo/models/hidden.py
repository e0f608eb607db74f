"""From a packed batch to the hidden states of its response tokens, in either layout."""

from __future__ import annotations

from torch import Tensor, nn

from tdpo.models.modes import policy_mode
from tdpo.models.neighbours import sequence_states
from tdpo.models.policy import body_states, head_of
from tdpo.models.trees import tree_states
from tdpo.types import Hidden, PackedBatch


def response_states(model: nn.Module, batch: PackedBatch) -> Tensor:
    """The hidden states ``[N, D]`` that predict the response tokens of a batch.

    Differentiable in the parameters of the model's body when gradients are on.
    """

    def run(rows: PackedBatch) -> Tensor:
        # Padded rows are padded at the end and attention is causal: no mask is needed, and the fastest path stays.
        return tree_states(model, rows) if rows.layout == "tree" else body_states(model, input_ids=rows.input_ids)

    with policy_mode(model):
        return sequence_states(model, batch, run)


def response_hidden(model: nn.Module, batch: PackedBatch) -> Hidden:
    """:func:`response_states` with the model's head, for a model whose weights are whole; see :mod:`.inside`."""
    return Hidden(response_states(model, batch), head_of(model))
