"""What can be checked of a step on a GPU without one: it never waits for the device, and half precision stays."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from numeric_worlds import head_problem, random_pairs, tiny_llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tdpo import objectives, ops
from tdpo.data.pack import pack_trees
from tdpo.models.reference import FrozenCopy
from tdpo.ops import heads, rows
from tdpo.score import LogitsBudget, batch_loss
from tdpo.types import Hidden

WAITS = ("item", "_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


class Waits(TorchDispatchMode):
    """Counts operations that wait for the device: values the host reads, shapes that depend on values, copies."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if any(word in name for word in WAITS):
            self.found[name] += 1
        result = function(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor) and value.dim()]
        if {"cpu", "meta"} <= {value.device.type for value in tensors}:
            self.found[f"{name} between devices"] += 1
        return result


def step_on_meta(dtype: torch.dtype, objective: Any, weighted: bool, budget: int | None) -> Counter[str]:
    """Runs forward and backward of a loss on the meta device, in trees, and returns what waited.

    Padded rows are left out: transformers reads their attention mask on the host, once a forward.
    """
    policy, model = tiny_llama(dtype=dtype), tiny_llama(seed=1, dtype=dtype)
    pairs = random_pairs(count=3)
    if weighted:
        sizes = {"chosen_weights": "chosen_ids", "rejected_kl_weights": "rejected_ids"}
        pairs = [
            replace(pair, **{name: [0.0, *[2.0] * (len(getattr(pair, ids)) - 1)] for name, ids in sizes.items()})
            for pair in pairs
        ]
    batch = pack_trees(pairs)
    reference = FrozenCopy(model)
    batch_loss(policy.train(), reference, batch, objective, "chunked")  # finds out once what the models do
    batch = batch.to("meta")
    policy.to("meta")
    model.to("meta")
    # The meta device has no autocast.
    autocast = mock.patch("torch.autocast", lambda *args, **options: nullcontext())
    with autocast, mock.patch("torch.is_autocast_enabled", lambda device: False), Waits() as waits:
        total, _ = batch_loss(policy, reference, batch, objective, "chunked", LogitsBudget(budget))
        (total / 3).backward()
    assert all(weight.grad is not None for weight in policy.parameters())
    return waits.found


@pytest.mark.parametrize("budget", [None, 5 * 50 * 4 * 2], ids=["one block", "a pair in several blocks"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("objective", [objectives.tdpo2(), objectives.tbpo(), objectives.simpo()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_in_a_step_waits_for_the_device(
    dtype: torch.dtype, objective: Any, weighted: bool, budget: int | None
) -> None:
    assert step_on_meta(dtype, objective, weighted, budget) == {}


def test_waiting_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = rows.row_stats_

    def waiting(logits_nV: Tensor, *rest: Any) -> Tensor:
        torch.tensor([1.0, 2.0]).to(logits_nV.device)
        return kernel(logits_nV, *rest)

    monkeypatch.setattr(rows, "row_stats_", waiting)
    found = step_on_meta(torch.float32, objectives.tdpo2(), False, None)
    assert found == {"_to_copy between devices": 1}
    with pytest.raises(RuntimeError), Waits():
        torch.ones(3, device="meta").sum().item()


def with_out_dtype(function: Any) -> Any:
    """Products as on a GPU: factors in half precision, sums and result in ``out_dtype``."""

    def product(*args: Any, out_dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        if out_dtype is not None:
            assert all(factor.dtype in (torch.bfloat16, torch.float16) for factor in args[-2:])
            args = (*args[:-2], *(factor.to(out_dtype) for factor in args[-2:]))
        return function(*args, **options)

    return product


@pytest.mark.parametrize("budget", [None, 3 * 23 * 4 * 2], ids=["one block", "a pair in several blocks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [{}, {"bias": True, "soft_cap": 4.0, "scale": 0.5}])
def test_half_precision_multiplies_in_its_dtype_and_sums_in_float32(
    shape: dict[str, Any], dtype: torch.dtype, budget: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = head_problem(tokens=12, width=6, vocab=23, dtype=dtype, **shape)
    lengths, objective = [4, 3, 2, 3], objectives.tdpo2(0.5, 0.5)

    def gradients(policy: Hidden, reference: Hidden, backend: str) -> tuple[Tensor, list[Tensor]]:
        sources = [part for part in (policy.states, policy.head.weight, policy.head.bias) if part is not None]
        loss, *_ = ops.pair_loss(policy, reference, problem.labels, lengths, objective, budget, backend)
        return loss, list(torch.autograd.grad(loss, sources))

    wide = [
        Hidden(
            side.states.detach().double().requires_grad_(),
            replace(
                side.head,
                weight=side.head.weight.detach().double().requires_grad_(),
                bias=None if side.head.bias is None else side.head.bias.detach().double().requires_grad_(),
            ),
        )
        for side in (problem.policy, problem.reference)
    ]
    truth, expected = gradients(wide[0], wide[1], "naive")
    monkeypatch.setattr(heads, "HALF_DEVICES", ("cpu",))
    monkeypatch.setattr(torch, "mm", with_out_dtype(torch.mm))
    monkeypatch.setattr(torch, "addmm", with_out_dtype(torch.addmm))
    loss, found = gradients(problem.policy, problem.reference, "chunked")
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)  # the logits are never rounded
    precision = {torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).norm() < precision * theirs.norm()
