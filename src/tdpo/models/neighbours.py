"""Measures on the loaded model whether hidden states depend on the other sequences of a batch.

Rotary embeddings with two sets of frequencies (LongRoPE) take the long set for a whole batch as soon as one sequence in
it is long. The states of the short ones change then, so that a reference read from a cache, which ran in other batches,
differs from an equal policy. Here each sequence gets the frequencies of its own length. What depends on neighbours in
another way is reported.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdpo.data.pack import as_padded
from tdpo.models.policy import (
    HALF,
    body_states,
    causal_lm,
    evaluating,
    position_limit,
    probing,
    relative_difference,
)
from tdpo.types import PackedBatch

PROBED_TOKENS = 8
LONGEST = 1 << 20
"""The longest sequence tried where the config does not say how many positions there are."""


@dataclass(frozen=True)
class NeighbourPlan:
    """How the states of a sequence depend on more than the sequence.

    Attributes:
        switch: Sequences longer than this have other rotary frequencies, None where all have the same.
        of_each_length: Whether every longer length has its own (dynamic NTK), not all of them the same (LongRoPE).
        rotaries: The modules that compute them.
        reason: Why states depend on other sequences all the same, in words; empty if they do not.
    """

    switch: int | None = None
    of_each_length: bool = False
    rotaries: tuple[nn.Module, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class _Call:
    """One call of a module that turns positions into frequencies, to be repeated with other positions."""

    name: str
    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def first_row(self, positions: Tensor) -> list[Tensor]:
        """Repeats the call with other positions and returns the outputs of their first row."""
        return [output[0] for output in _tensors(self.module(self.args[0], positions, *self.args[2:], **self.kwargs))]


def _tensors(output: Any) -> tuple[Tensor, ...]:
    """Returns the outputs as a tuple; some models return one complex tensor instead of cosines and sines."""
    return (output,) if isinstance(output, Tensor) else tuple(output)


_plans: weakref.WeakKeyDictionary[nn.Module, tuple[torch.dtype, NeighbourPlan]] = weakref.WeakKeyDictionary()


def neighbour_plan(model: nn.Module) -> NeighbourPlan:
    """Measures how a model's states depend on more than their own sequence, once for each model and dtype.

    Call it before a model is wrapped or sharded; :func:`sequence_states` uses that measurement.
    """
    lm = causal_lm(model)
    dtype = next(lm.parameters()).dtype
    if lm not in _plans or _plans[lm][0] != dtype:
        device = next(lm.parameters()).device.type
        with probing(lm), evaluating(lm), torch.no_grad(), torch.autocast(device, enabled=False):
            _plans[lm] = dtype, _measure(lm)
    return _plans[lm][1]


def sequence_states(model: nn.Module, batch: PackedBatch, run: Callable[[PackedBatch], Tensor]) -> Tensor:
    """Computes the hidden states ``[N, D]`` that predict a batch's response tokens, each sequence as if alone.

    Args:
        model: The model.
        batch: The batch.
        run: Computes the hidden states ``[R, T, D]`` of a batch.
    """
    plan, rows = _plan(model), laid_out(model, batch)
    if (rows is batch and batch.layout == "tree") or plan.switch is None:
        return run(batch).flatten(0, 1)[batch.source_index]
    with own_frequencies(plan, (rows.tree_ids >= 0).sum(1)):
        return run(rows).flatten(0, 1)[rows.source_index]


def laid_out(model: nn.Module, batch: PackedBatch) -> PackedBatch:
    """Returns the batch in the layout in which :func:`sequence_states` runs it.

    One branch of a tree may be longer than the switch, the other one shorter: such batches run in padded rows.
    """
    plan = _plan(model)
    if batch.layout == "padded" or plan.switch is None or int(batch.position_ids.max()) + 2 <= plan.switch:
        return batch
    rows = as_padded(batch)
    shortest = int((rows.tree_ids >= 0).sum(1).min())
    return rows if plan.of_each_length or shortest <= plan.switch + 1 else batch


def _plan(model: nn.Module) -> NeighbourPlan:
    _, plan = _plans.get(causal_lm(model)) or (None, neighbour_plan(model))
    return plan


@contextmanager
def own_frequencies(plan: NeighbourPlan, lengths_R: Tensor) -> Iterator[None]:
    """Gives every row the rotary frequencies of its own length.

    Args:
        plan: The model's plan, with a switch.
        lengths_R: Tokens of each row without padding.
    """
    switch = plan.switch or 0
    longer = sorted({length for length in lengths_R.tolist() if length > switch})
    if not plan.of_each_length:
        longer = longer[-1:]

    def of_each_row(own: Any) -> Any:
        def forward(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            def of_length(length: int) -> tuple[Tensor, ...]:
                last = position_ids.new_full(
                    (*position_ids.shape[:-1], 1), length - 1
                )  # it looks at the largest position
                positions = torch.cat([position_ids.clamp(max=length - 1), last], -1)
                return tuple(output[..., :-1, :] for output in _tensors(own(x, positions, *args, **kwargs)))

            of_length(1)  # dynamic NTK keeps the frequencies of the longest sequence so far until a short one comes
            outputs, shorter = of_length(switch), switch
            for length in longer:
                is_longer = (lengths_R > shorter)[:, None, None]
                outputs = tuple(torch.where(is_longer, a, b) for a, b in zip(of_length(length), outputs, strict=True))
                shorter = length
            return outputs if len(outputs) > 1 else outputs[0]

        return forward

    patched = [(module, vars(module).get("forward")) for module in plan.rotaries]
    for module, _ in patched:
        module.forward = of_each_row(module.forward)
    try:
        yield
    finally:
        for module, own in patched:
            if own is None:
                del module.forward
            else:
                module.forward = own


def _measure(lm: Any) -> NeighbourPlan:
    embedding = lm.get_input_embeddings().weight
    ids = (torch.arange(2 * PROBED_TOKENS, device=embedding.device).view(2, -1) * 7 + 3) % embedding.shape[0]
    others = torch.stack([ids[0], ids[1, :1].expand_as(ids[1])])  # one token again and again fills an expert
    with _recorded(lm) as calls:
        states = body_states(lm, input_ids=ids)
    tolerance = 5e-2 if states.dtype in HALF else 1e-3
    misfit = relative_difference(body_states(lm, input_ids=others)[:1], states[:1])
    if misfit > tolerance:
        return NeighbourPlan(reason=f"its hidden states change by {misfit:.1e} with the other sequences of a batch")
    near = torch.arange(PROBED_TOKENS, device=ids.device)[None]
    switching = [(call, switch) for call in calls if (switch := _switch(call, near, position_limit(lm) or LONGEST))]
    if not switching:
        return NeighbourPlan()
    switches = {switch for _, switch in switching}
    modules = tuple({id(call.module): call.module for call, _ in switching}.values())
    of_each_length = any(_differs(call, near, switch + 1, switch + PROBED_TOKENS) for call, switch in switching)
    plan = NeighbourPlan(min(switches), of_each_length, modules)
    in_layer = any(part.isdigit() for call, _ in switching for part in call.name.split("."))
    # Checkpointing runs a module within a layer again in the backward, where rows have no frequencies of their own.
    if in_layer or len(switches) > 1 or not _is_proven(lm, plan, ids, near, tolerance):
        return NeighbourPlan(
            reason=f"a sequence of more than {plan.switch} tokens changes the positions of the others in its batch"
        )
    return plan


@contextmanager
def _recorded(lm: Any) -> Iterator[list[_Call]]:
    """Records the calls of modules without weights that are given positions."""
    calls: list[_Call] = []

    def record(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            others = dict(kwargs)
            if len(args) == 1 and "position_ids" in others:
                args = (*args, others.pop("position_ids"))
            if len(args) > 1 and isinstance(args[1], Tensor) and not args[1].is_floating_point():
                calls.append(_Call(name, module, args, others))

        return hook

    handles = [
        module.register_forward_pre_hook(record(name), with_kwargs=True)
        for name, module in lm.named_modules()
        if name and next(module.parameters(), None) is None
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _differs(call: _Call, near: Tensor, length: int, other: int) -> bool:
    """Compares the frequencies of a short row beside a sequence of one length and beside one of another length."""
    rows = []
    for longest in (length, other):
        call.first_row(near)
        rows.append(call.first_row(torch.cat([near, near + longest - near.shape[1]])))
    return any(not torch.equal(one, two) for one, two in zip(*rows, strict=True))


def _switch(call: _Call, near: Tensor, limit: int) -> int | None:
    """Finds the longest sequence that does not change the frequencies of a short one beside it; None if none does."""
    low, high = near.shape[1], limit
    try:
        if high <= low or not _differs(call, near, low, high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if _differs(call, near, near.shape[1], middle) else (middle, high)
    except Exception:  # it does something else with its second argument
        return None
    return low


def _is_proven(lm: Any, plan: NeighbourPlan, ids: Tensor, near: Tensor, tolerance: float) -> bool:
    """Compares a short and a long sequence in one batch with each of them alone."""
    length = (plan.switch or 0) + 1
    positions = torch.cat([near, near + length - near.shape[1]])
    alone = [body_states(lm, input_ids=ids[i : i + 1], position_ids=positions[i : i + 1]) for i in range(2)]
    with own_frequencies(plan, torch.tensor([near.shape[1], length], device=ids.device)):
        together = body_states(lm, input_ids=ids, position_ids=positions)
    return relative_difference(together, torch.cat(alone)) < tolerance
