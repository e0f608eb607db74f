"""A weight that is embedding and head gets one gradient, the one plain autograd gives it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import make_model
from numeric_worlds import moved, random_pairs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tdpo import objectives
from tdpo.data.pack import pack_padded, pack_trees
from tdpo.models.hidden import sparse_embedding_gradient
from tdpo.score import batch_loss, score_batch

VOCAB = 60


def gradients(policy: Any, total: Tensor) -> dict[str, Tensor]:
    policy.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item(), msg=name)


def world(**changes: Any) -> tuple[Any, Any]:
    reference = make_model(VOCAB)
    for name, value in changes.items():
        setattr(reference.get_input_embeddings(), name, value)
    return moved(reference), reference


@pytest.mark.parametrize("padding", [None, 39])
@pytest.mark.parametrize("pack", [pack_trees, pack_padded])
def test_the_gradient_is_that_of_plain_autograd(pack: Any, padding: int | None) -> None:
    policy, reference = world(padding_idx=padding)
    batch, objective = pack(random_pairs(count=3, vocab=VOCAB)), objectives.tdpo2()
    assert padding is None or (batch.input_ids == padding).any()
    theirs = gradients(policy, score_batch(policy, reference, batch, objective, "naive").loss.sum())
    assert_alike(gradients(policy, batch_loss(policy, reference, batch, objective)[0]), theirs)
    assert_alike(gradients(policy, 0.3 * batch_loss(policy, reference, batch, objective)[0]), {
        name: 0.3 * gradient for name, gradient in theirs.items()
    })  # fmt: skip


class Tables(TorchDispatchMode):
    """Counts the tables ``[V, D]`` made."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        makes = str(function).split(".")[1] in ("zeros", "new_zeros", "empty", "empty_like", "embedding_dense_backward")
        self.count += makes and isinstance(output, Tensor) and output.shape == self.shape
        return output


@pytest.mark.parametrize(("shared", "tables"), [(True, 1), (False, 2)])
def test_one_table_is_made_where_the_weight_is_shared(shared: bool, tables: int) -> None:
    policy, reference = world()
    if not shared:
        policy.lm_head.weight = nn.Parameter(policy.lm_head.weight.detach().clone())
    total = batch_loss(policy, reference, pack_trees(random_pairs(count=3, vocab=VOCAB)), objectives.tdpo2())[0]
    shape = policy.lm_head.weight.shape
    with Tables(shape) as backward:
        total.backward()
    with Tables(shape) as forward:
        batch_loss(policy, reference, pack_trees(random_pairs(count=3, vocab=VOCAB)), objectives.tdpo2())
    assert backward.count + forward.count == tables
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in policy.parameters())


def test_a_table_read_twice_gets_both_shares() -> None:
    policy, reference = world()
    twice = copy.deepcopy(policy)
    body = type(twice.model).forward

    def forward(self: Any, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        again = self.embed_tokens(input_ids) + 0.5 * self.embed_tokens((input_ids + 1) % VOCAB)
        return body(self, **kwargs | {"inputs_embeds": again})

    twice.model.forward = forward.__get__(twice.model)
    batch = pack_padded(random_pairs(count=2, vocab=VOCAB))
    theirs = gradients(twice, score_batch(twice, reference, batch, objectives.tdpo1(), "naive").loss.sum())
    assert_alike(gradients(twice, batch_loss(twice, reference, batch, objectives.tdpo1())[0]), theirs)


def test_only_a_plain_lookup_of_a_trained_tied_weight_gets_a_sparse_gradient() -> None:
    policy, _ = world()
    table = policy.get_input_embeddings()

    def is_sparse() -> bool:
        with sparse_embedding_gradient(policy):
            return policy.get_input_embeddings().sparse

    assert is_sparse() and not table.sparse
    with torch.no_grad():
        assert not is_sparse()
    policy.requires_grad_(False)
    assert not is_sparse()
    policy.requires_grad_(True)
    table.forward = table.forward
    assert not is_sparse()
    del table.forward

    class Scaled(nn.Embedding):
        """An embedding that may do more than look up."""

    scaled = Scaled(*table.weight.shape)
    scaled.weight = table.weight
    policy.set_input_embeddings(scaled)
    assert not is_sparse()
