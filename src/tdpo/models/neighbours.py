"""Measures on the loaded model whether hidden states depend on the other sequences of a batch.

Rotary embeddings with two sets of frequencies (LongRoPE) take the long set for a whole batch as soon as one sequence in
it is long. The states of the short ones change then, so that a reference read from a cache, which ran in other batches,
differs from an equal policy. Here each sequence gets the frequencies of its own length. What depends on neighbours in
another way is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tdpo.data.pack import as_padded
from tdpo.models.policy import body_states, causal_lm, position_limit
from tdpo.models.probe import (
    MODEL_ERRORS,
    last_result,
    measured,
    probe_ids,
    probing,
    relative_difference,
    tolerance,
)
from tdpo.types import PackedBatch

PROBED_TOKENS = 8
LONGEST = 1 << 20
"""The longest sequence tried where the config does not say how many positions there are."""


@dataclass(frozen=True)
class NeighbourPlan:
    """Describes how the states of a sequence depend on more than the sequence.

    Attributes:
        switch: Sequences longer than this have other rotary frequencies, None where all have the same.
        of_each_length: True where every longer length has its own (dynamic NTK), not all of them the same (LongRoPE).
        rotaries: The modules that compute them.
        reason: Reason why states depend on other sequences all the same; empty if they do not.
    """

    switch: int | None = None
    of_each_length: bool = False
    rotaries: tuple[nn.Module, ...] = ()
    reason: str = ""


def neighbour_plan(model: nn.Module) -> NeighbourPlan:
    """Measures how a model's states depend on more than their own sequence, once for each model and dtype.

    Call it before a model is wrapped or sharded; :func:`sequence_states` uses that measurement.
    """
    lm = causal_lm(model)
    return measured(lm, "neighbours", next(lm.parameters()).dtype, lambda: _measure(lm))


def sequence_states(model: nn.Module, batch: PackedBatch, run: Callable[[PackedBatch], Tensor]) -> Tensor:
    """Computes the hidden states ``[N, D]`` that predict a batch's response tokens, each sequence as if alone.

    Args:
        model: The model.
        batch: The batch.
        run: Computes the hidden states ``[R, T, D]`` of a batch.
    """
    rows = laid_out(model, batch)
    plan = last_result(causal_lm(model), "neighbours")
    if (rows is batch and batch.layout == "tree") or plan.switch is None:
        return run(batch).flatten(0, 1)[batch.source_index]
    with own_frequencies(plan, (rows.tree_ids >= 0).sum(1)):
        return run(rows).flatten(0, 1)[rows.source_index]


def laid_out(model: nn.Module, batch: PackedBatch) -> PackedBatch:
    """Returns the batch in the layout in which :func:`sequence_states` runs it.

    One branch of a tree may be longer than the switch, the other one shorter: such batches run in padded rows.
    """
    # A plan made while the weights were whole stays: wrappers may have put weights of fewer bits in place.
    plan = last_result(causal_lm(model), "neighbours") or neighbour_plan(model)
    if batch.layout == "padded" or plan.switch is None or int(batch.position_ids.max()) + 2 <= plan.switch:
        return batch
    rows = as_padded(batch)
    shortest = int((rows.tree_ids >= 0).sum(1).min())
    return rows if plan.of_each_length or shortest <= plan.switch + 1 else batch


@contextmanager
def own_frequencies(plan: NeighbourPlan, lengths_R: Tensor) -> Iterator[None]:
    """Computes the rotary frequencies of every row for the length of that row.

    Args:
        plan: The model's plan, with a switch.
        lengths_R: Tokens of each row without padding.
    """
    switch = plan.switch or 0
    longer = sorted({length for length in lengths_R.tolist() if length > switch})
    if not plan.of_each_length:
        longer = longer[-1:]
    patched = [(module, vars(module).get("forward")) for module in plan.rotaries]
    for module, _ in patched:
        module.forward = partial(_row_frequencies, module.forward, switch, longer, lengths_R[:, None, None])
    try:
        yield
    finally:
        for module, own in patched:
            if own is None:
                del module.forward
            else:
                module.forward = own


def _row_frequencies(
    forward: Any, switch: int, longer: list[int], lengths_R11: Tensor, x: Tensor, position_ids: Tensor, *args: Any,
    **kwargs: Any,
) -> Any:  # fmt: skip
    """Computes frequencies once for each length and picks each row's: a rotary module's forward."""
    outputs: tuple[Tensor, ...] = ()
    shorter = 1
    # Dynamic NTK keeps the frequencies of the longest sequence so far until a short one comes, so length 1 is first.
    for length in (1, switch, *longer):
        last = position_ids.new_full((*position_ids.shape[:-1], 1), length - 1)  # the largest position decides
        positions = torch.cat([position_ids.clamp(max=length - 1), last], -1)
        found = tuple(output[..., :-1, :] for output in _tensors(forward(x, positions, *args, **kwargs)))
        if length > switch:
            is_longer = lengths_R11 > shorter
            found = tuple(torch.where(is_longer, new, old) for new, old in zip(found, outputs, strict=True))
        outputs, shorter = found, length
    return outputs if len(outputs) > 1 else outputs[0]


def _tensors(output: Any) -> tuple[Tensor, ...]:
    """Returns the outputs as a tuple; some models return one complex tensor instead of cosines and sines."""
    return (output,) if isinstance(output, Tensor) else tuple(output)


Rotary = tuple[str, nn.Module, Callable[[Tensor], tuple[Tensor, ...]]]
"""Name and module of a rotary embedding, and its frequencies ``[R, T, ...]`` as a function of positions ``[R, T]``."""


def _measure(lm: Any) -> NeighbourPlan:
    ids = probe_ids(lm, 2, PROBED_TOKENS)
    others = torch.stack([ids[0], ids[1, :1].expand_as(ids[1])])  # one token again and again fills an expert
    rotaries: list[Rotary] = []
    handles = [
        module.register_forward_pre_hook(partial(_record, rotaries, name), with_kwargs=True)
        for name, module in lm.named_modules()
        if name and next(module.parameters(), None) is None
    ]
    with probing(lm):
        try:
            states = body_states(lm, input_ids=ids)
        finally:
            for handle in handles:
                handle.remove()
        limit = tolerance(states.dtype)
        misfit = relative_difference(body_states(lm, input_ids=others)[:1], states[:1])
        if misfit > limit:
            return NeighbourPlan(reason=f"its hidden states change by {misfit:.1e} with the other sequences of a batch")
        near = torch.arange(PROBED_TOKENS, device=ids.device)[None]
        longest = position_limit(lm) or LONGEST
        switching = [(rotary, switch) for rotary in rotaries if (switch := _switch(rotary[2], near, longest))]
        if not switching:
            return NeighbourPlan()
        switches = {switch for _, switch in switching}
        modules = tuple({id(module): module for (_, module, _), _ in switching}.values())
        of_each_length = any(
            _differs(frequencies, near, switch + 1, switch + PROBED_TOKENS) for (_, _, frequencies), switch in switching
        )
        plan = NeighbourPlan(min(switches), of_each_length, modules)
        # Checkpointing runs a module within a layer again in the backward, where rows have no frequencies of their own.
        in_layer = any(part.isdigit() for (name, _, _), _ in switching for part in name.split("."))
        if not in_layer and len(switches) == 1 and _mixed_lengths_differ(lm, plan, ids, near) < limit:
            return plan
    return NeighbourPlan(
        reason=f"a sequence of more than {plan.switch} tokens changes the positions of the others in its batch"
    )


def _record(rotaries: list[Rotary], name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Records a call with integer positions, as a pre-hook of a module without weights."""
    kwargs = dict(kwargs)
    if len(args) == 1 and "position_ids" in kwargs:
        args = (*args, kwargs.pop("position_ids"))
    if len(args) > 1 and isinstance(args[1], Tensor) and not args[1].is_floating_point():
        rotaries.append((name, module, lambda positions: _tensors(module(args[0], positions, *args[2:], **kwargs))))


def _differs(frequencies: Callable[[Tensor], tuple[Tensor, ...]], near: Tensor, length: int, other: int) -> bool:
    """Compares the frequencies of a short row beside a sequence of one length and beside one of another length."""
    rows = []
    for longest in (length, other):
        frequencies(near)
        rows.append(frequencies(torch.cat([near, near + longest - near.shape[1]])))
    return any(not torch.equal(one[0], two[0]) for one, two in zip(*rows, strict=True))


def _switch(frequencies: Callable[[Tensor], tuple[Tensor, ...]], near: Tensor, limit: int) -> int | None:
    """Finds the longest sequence that does not change the frequencies of a short one beside it; None if none does."""
    low, high = near.shape[1], limit
    try:
        if high <= low or not _differs(frequencies, near, low, high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if _differs(frequencies, near, near.shape[1], middle) else (middle, high)
    except MODEL_ERRORS:  # a module that uses its second argument for something else
        return None
    return low


def _mixed_lengths_differ(lm: Any, plan: NeighbourPlan, ids: Tensor, near: Tensor) -> float:
    """Compares a short and a long sequence in one batch with each of them alone."""
    length = (plan.switch or 0) + 1
    positions = torch.cat([near, near + length - near.shape[1]])
    alone = [body_states(lm, input_ids=ids[i : i + 1], position_ids=positions[i : i + 1]) for i in range(2)]
    with own_frequencies(plan, torch.tensor([near.shape[1], length], device=ids.device)):
        together = body_states(lm, input_ids=ids, position_ids=positions)
    return relative_difference(together, torch.cat(alone))
