"""Trees through a transformers model: the mask its attention needs, and the proof that it computes the same.

Whether a model can take trees depends on its attention, its positions and its mixing of tokens, and where it cannot,
most models silently compute something else. So a small probe runs two trees in one row and the same sequences one by
one, and compares hidden states and gradients, before trees are used on a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tdpo.data.pack import pack_padded, pack_trees
from tdpo.errors import first_line
from tdpo.models.policy import body_states
from tdpo.models.probe import evaluating, measured, tolerance
from tdpo.types import PackedBatch, TokenisedPair

UNPROBED = ("window_size", "attention_window", "local_window_size", "attention_chunk_size", "chunk_size", "block_size")
"""Config names of windows and chunks whose masks are the model's own; a probe shorter than them would prove nothing."""
Mask = Tensor | Any
"""A mask tensor, or flex attention's ``BlockMask``."""
Masks = Mask | dict[str, Mask]
LONGEST_PROBED_WINDOW = 48
"""Sliding windows up to this length are crossed by the probe; longer ones follow the same formula."""


@dataclass(frozen=True)
class TreePlan:
    """The way a model takes trees, or the reason why it does not.

    Attributes:
        refusal: Why it takes none; empty if it does.
        masks: Builds the model's ``attention_mask`` for a batch.
    """

    refusal: str
    masks: Callable[[PackedBatch], Masks] | None = None


@measured
def tree_plan(lm: Any) -> TreePlan:
    """Probes how a model takes trees, or why it must not get any."""
    config, dtype = lm.config.get_text_config(), next(lm.parameters()).dtype
    attention = getattr(lm.config, "_attn_implementation", None) or "eager"
    unknown = [name for name in UNPROBED if getattr(config, name, None)]
    if unknown:
        return TreePlan(f"its {unknown[0]} limits attention in a way that short probes cannot show")
    if attention not in ("eager", "sdpa", "flex_attention"):
        return TreePlan(f"its attention implementation {attention} takes no mask of our own")
    additive = None if attention == "sdpa" else dtype
    mask = block_mask if attention == "flex_attention" else partial(dense_mask, additive=additive)
    window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())
    # What the model may need: a mask for each type of layer, one window for all layers, or no window.
    candidates: list[Callable[[PackedBatch], Masks]] = [lambda batch: mask(batch, None)]
    if window is not None:
        candidates.insert(0, lambda batch: mask(batch, window))
    if kinds and kinds <= {"full_attention", "sliding_attention"}:
        windows = {kind: window if kind == "sliding_attention" else None for kind in kinds}
        candidates.insert(0, lambda batch: {kind: mask(batch, size) for kind, size in windows.items()})
    refusal = ""
    for masks in candidates:
        try:
            misfit = _misfit(lm, masks)
        except Exception as error:  # whatever a model may raise
            refusal = refusal or f"{type(error).__name__}: {first_line(error)}"
            continue
        if misfit < tolerance(dtype):
            return TreePlan("", masks)
        refusal = f"trees and separate sequences differ by {misfit:.1e} (relative)"
    return TreePlan(refusal)


def tree_states(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Computes the hidden states ``[R, T, D]`` of a batch of trees.

    Raises:
        ValueError: if the model was refused; ask :func:`tree_plan` first.
    """
    plan = tree_plan(model, latest=True)
    if plan.masks is None:
        raise ValueError(f"this model cannot run trees: {plan.refusal}")
    mask = plan.masks(batch)
    return body_states(model, input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask)


def dense_mask(batch: PackedBatch, window: int | None, additive: torch.dtype | None) -> Tensor:
    """Builds the mask ``[R, 1, T, T]``: bool for sdpa; 0 and the lowest number for eager attention, which adds it."""
    seen = batch.attends()
    if window is not None:
        seen = seen & (batch.position_ids[:, :, None] - batch.position_ids[:, None, :] < window)
    # Padding sees itself: a row that sees nothing would be NaN, and NaN times a zero gradient stays NaN.
    seen = (seen | torch.eye(seen.shape[1], dtype=torch.bool, device=seen.device))[:, None]
    if additive is None:
        return seen
    return torch.zeros(seen.shape, dtype=additive, device=seen.device).masked_fill(~seen, torch.finfo(additive).min)


def block_mask(batch: PackedBatch, window: int | None) -> Any:
    """Builds the tree mask for flex attention, which skips blocks of positions that see nothing of each other."""
    from torch.nn.attention.flex_attention import create_block_mask

    tree, branch, position = batch.tree_ids, batch.branch_ids, batch.position_ids

    def _sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_tree = (tree[row, query] == tree[row, key]) & (tree[row, key] >= 0)
        visible = (branch[row, key] == 0) | (branch[row, query] == branch[row, key])
        seen = (query >= key) & same_tree & visible
        if window is not None:
            seen = seen & (position[row, query] - position[row, key] < window)
        return seen | (query == key)  # padding sees itself, as in dense_mask

    rows, length = batch.input_ids.shape
    return create_block_mask(_sees, rows, None, length, length, device=str(batch.input_ids.device))


def _misfit(lm: Any, masks: Callable[[PackedBatch], Masks]) -> float:
    """Returns the largest relative difference between trees and sequences, of hidden states and embedding gradients."""
    embedding, config = lm.get_input_embeddings(), lm.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    prompt = 7 + (window if window <= LONGEST_PROBED_WINDOW else 0)  # the first pair crosses a short window
    tokens = max(min(config.vocab_size, 50) - 3, 1)
    ids = [3 + (7 * i) % tokens for i in range(prompt + 40)]
    first = TokenisedPair(ids[:prompt], ids[prompt : prompt + 6], ids[prompt + 9 : prompt + 14])
    pairs = [first, TokenisedPair(ids[5:8], ids[20:23], ids[24:31])]
    outcomes: list[tuple[Tensor, Tensor]] = []
    with evaluating(lm), torch.enable_grad():
        for batch in (pack_trees(pairs, capacity=10**6), pack_padded(pairs)):
            batch = batch.to(embedding.weight.device)
            embedded = embedding(batch.input_ids).detach().requires_grad_()
            inputs = {"inputs_embeds": embedded}
            if batch.layout == "tree":
                inputs |= {"position_ids": batch.position_ids, "attention_mask": masks(batch)}
            states = body_states(lm, **inputs).flatten(0, 1)[batch.source_index]
            direction = torch.cos(0.7 * torch.arange(states.numel(), device=states.device)).view_as(states)
            (gradient,) = torch.autograd.grad((states * direction.to(states.dtype)).sum(), embedded)
            # Summed by token, so that both layouts can be compared; what padding has may be NaN (Gemma 3n).
            by_token = torch.zeros(3 + tokens, gradient.shape[-1], device=states.device)
            by_token.index_add_(0, batch.input_ids.flatten(), gradient.flatten(0, 1).float())
            outcomes.append((states.detach().float(), by_token[3:]))
    errors = [
        ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6)).item()
        for ours, theirs in zip(*outcomes, strict=True)
    ]
    return max(error if error == error else float("inf") for error in errors)
