"""Finds out whether hidden states depend on the other sequences of a batch, and where possible undoes it.

Rotary embeddings with two sets of frequencies (LongRoPE) take the long set for a whole batch as soon as one sequence in
it is long. The states of the short ones change then, so that a reference read from a cache, which ran in other batches,
differs from an equal policy. Here each sequence gets the frequencies of its own length. What depends on neighbours in
another way is reported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tdpo.data.pack import as_padded
from tdpo.models.policy import body_states, position_limit
from tdpo.models.probe import measured, probe_ids, probing, relative_difference, tolerance
from tdpo.models.redirect import redirect_forward
from tdpo.types import PackedBatch

PROBED_TOKENS = 8


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


@measured
def neighbour_plan(lm: Any) -> NeighbourPlan:
    """Measures how a model's states depend on more than their own sequence.

    The config says at which length rotary frequencies change; a short and a long sequence in one batch prove it.
    Call it before a model is wrapped or sharded; :func:`laid_out` uses that measurement.
    """
    ids = probe_ids(lm, 2, PROBED_TOKENS)
    others = torch.stack([ids[0], ids[1, :1].expand_as(ids[1])])  # one token again and again fills an expert
    with probing(lm):
        states = body_states(lm, input_ids=ids)
        limit = tolerance(states.dtype)
        misfit = relative_difference(body_states(lm, input_ids=others)[:1], states[:1])
        if misfit > limit:
            return NeighbourPlan(reason=f"its hidden states change by {misfit:.1e} with the other sequences of a batch")
        switches = _switches(lm)
        if not switches:
            return NeighbourPlan()
        rotaries = {name: module for name, module in lm.named_modules() if "inv_freq" in "".join(module._buffers)}
        plan = NeighbourPlan(*switches[0], tuple(rotaries.values()))
        # Checkpointing runs a module within a layer again in the backward, where rows have no frequencies of their own.
        in_layer = any(part.isdigit() for name in rotaries for part in name.split("."))
        if not in_layer and len(switches) == 1:
            near, length = torch.arange(PROBED_TOKENS, device=ids.device)[None], switches[0][0] + 1
            positions = torch.cat([near, near + length - PROBED_TOKENS])
            alone = [body_states(lm, input_ids=ids[i : i + 1], position_ids=positions[i : i + 1]) for i in range(2)]
            with own_frequencies(plan, torch.tensor([PROBED_TOKENS, length], device=ids.device)):
                together = body_states(lm, input_ids=ids, position_ids=positions)
            if relative_difference(together, torch.cat(alone)) < limit:
                return plan
    return NeighbourPlan(
        reason=f"a sequence of more than {plan.switch} tokens changes the positions of the others in its batch"
    )


def _switches(lm: Any) -> list[tuple[int, bool]]:
    """Returns the lengths at which rotary frequencies change, and whether every longer length has its own."""
    text = lm.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # layers may be of several kinds
    limit = position_limit(lm) or sys.maxsize
    switches = set()
    for kind in kinds:
        if kind.get("rope_type") == "dynamic":
            switches.add((text.max_position_embeddings, True))
        elif kind.get("rope_type") == "longrope":
            switches.add((kind["original_max_position_embeddings"], False))
    return sorted(switch for switch in switches if switch[0] < limit)


def laid_out(model: nn.Module, batch: PackedBatch) -> PackedBatch:
    """Returns the batch in the layout in which :func:`~tdpo.models.hidden.response_states` runs it.

    One branch of a tree may be longer than the switch, the other one shorter: such batches run in padded rows.
    """
    plan = neighbour_plan(model, latest=True)
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
    # Dynamic NTK keeps the frequencies of the longest sequence so far until a short one comes, so length 1 is first.
    steps = (1, switch, *(longer if plan.of_each_length else longer[-1:]))

    def _frequencies(forward: Any, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Computes frequencies once for each length and picks each row's."""
        outputs: tuple[Tensor, ...] = ()
        for shorter, length in pairwise((0, *steps)):
            last = position_ids.new_full((*position_ids.shape[:-1], 1), length - 1)  # the largest position decides
            positions = torch.cat([position_ids.clamp(max=length - 1), last], -1)
            found = forward(x, positions, *args, **kwargs)  # cosines and sines, or one complex tensor
            found = tuple(part[..., :-1, :] for part in ((found,) if isinstance(found, Tensor) else found))
            if length > switch:
                is_longer = lengths_R[:, None, None] > shorter
                found = tuple(torch.where(is_longer, new, old) for new, old in zip(found, outputs, strict=True))
            outputs = found
        return outputs if len(outputs) > 1 else outputs[0]

    with ExitStack() as redirections:
        for module in plan.rotaries:
            redirections.enter_context(redirect_forward(module, partial(_frequencies, module.forward)))
        yield
