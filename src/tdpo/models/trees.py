"""Trees through a transformers model: the mask its attention needs, and the proof that it computes the same.

Whether a model can take trees depends on its attention, its positions and its mixing of tokens, and where it cannot,
most models silently compute something else. So a small probe runs two trees in one row and the same sequences one by
one, and compares hidden states and gradients, before trees are used on a model.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tdpo.data.pack import pack_padded, pack_trees
from tdpo.models.policy import body_states, causal_lm
from tdpo.models.probe import evaluating
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


_plans: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[Any, TreePlan]]] = weakref.WeakKeyDictionary()


def tree_plan(model: nn.Module) -> TreePlan:
    """Probes how the model takes trees, or why it must not get any.

    Once per model, attention implementation, dtype and windows: the mask depends on all of them.
    """
    lm = causal_lm(model)
    implementation, text = _implementation(lm), lm.config.get_text_config()
    windows = [str(getattr(text, name, None)) for name in ("sliding_window", "layer_types")]
    state = next(lm.parameters()).dtype, *windows
    plans = _plans.setdefault(lm, {})
    if implementation not in plans or plans[implementation][0] != state:
        plans[implementation] = state, _probe(lm, implementation)
    return plans[implementation][1]


def _implementation(lm: Any) -> str:
    return getattr(lm.config, "_attn_implementation", None) or "eager"


def tree_states(model: nn.Module, batch: PackedBatch, **inputs: Any) -> Tensor:
    """Computes the hidden states ``[R, T, D]`` of a batch of trees.

    Raises:
        ValueError: if the model was refused; ask :func:`tree_plan` first.
    """
    lm = causal_lm(model)
    # The plan that was proven stays: within a forward, wrappers may have put weights of fewer bits in place.
    _, plan = _plans.get(lm, {}).get(_implementation(lm)) or (None, tree_plan(model))
    if plan.masks is None:
        raise ValueError(f"this model cannot run trees: {plan.refusal}")
    inputs = inputs or {"input_ids": batch.input_ids}
    return body_states(model, position_ids=batch.position_ids, attention_mask=plan.masks(batch), **inputs)


def _probe(lm: Any, implementation: str) -> TreePlan:
    text = lm.config.get_text_config()
    unknown = [name for name in UNPROBED if getattr(text, name, None)]
    if unknown:
        return TreePlan(f"its {unknown[0]} limits attention in a way that short probes cannot show")
    if implementation not in ("eager", "sdpa", "flex_attention"):
        return TreePlan(f"its attention implementation {implementation} takes no mask of our own")
    refusal = ""
    for masks in _candidates(lm, implementation):
        try:
            misfit = _misfit(lm, masks)
        except Exception as error:  # whatever a model may raise
            refusal = refusal or f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        tolerance = 1e-3 if next(lm.parameters()).dtype in (torch.float32, torch.float64) else 5e-2
        if misfit < tolerance:
            return TreePlan("", masks)
        refusal = f"trees and separate sequences differ by {misfit:.1e} (relative)"
    return TreePlan(refusal)


def _candidates(lm: Any, implementation: str) -> list[Callable[[PackedBatch], Masks]]:
    """Returns mask builders the model may need: one per layer type, one window for all layers, or no window."""
    config = lm.config.get_text_config()
    dtype = next(lm.parameters()).dtype
    window = getattr(config, "sliding_window", None)

    additive = None if implementation == "sdpa" else dtype
    mask = block_mask if implementation == "flex_attention" else partial(dense_mask, additive=additive)
    candidates: list[Callable[[PackedBatch], Masks]] = []
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds and kinds <= {"full_attention", "sliding_attention"}:
        windows = {kind: window if kind == "sliding_attention" else None for kind in kinds}
        candidates.append(lambda batch: {kind: mask(batch, size) for kind, size in windows.items()})
    if window is not None:
        candidates.append(lambda batch: mask(batch, window))
    return [*candidates, lambda batch: mask(batch, None)]


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
    embedding = lm.get_input_embeddings()
    pairs = _probe_pairs(lm)
    states, gradients = [], []
    with evaluating(lm), torch.enable_grad():
        for batch in (pack_trees(pairs, capacity=10**6), pack_padded(pairs)):
            batch = batch.to(embedding.weight.device)
            embedded = embedding(batch.input_ids).detach().requires_grad_()
            if batch.layout == "tree":
                layout = {"position_ids": batch.position_ids, "attention_mask": masks(batch)}
                hidden = body_states(lm, inputs_embeds=embedded, **layout)
            else:
                hidden = body_states(lm, inputs_embeds=embedded)
            wanted = hidden.flatten(0, 1)[batch.source_index]
            direction = torch.cos(0.7 * torch.arange(wanted.numel(), device=wanted.device)).view_as(wanted)
            (gradient,) = torch.autograd.grad((wanted * direction.to(wanted.dtype)).sum(), embedded)
            states.append(wanted.detach().float())
            gradients.append(_sum_by_position(gradient.float(), batch, len(pairs)))
    errors = [
        ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6)).item()
        for ours, theirs in (states, gradients)
    ]
    return max(float("inf") if math.isnan(error) else error for error in errors)


def _probe_pairs(lm: Any) -> list[TokenisedPair]:
    """Builds two pairs of different shapes, the first longer than a short sliding window."""
    config = lm.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    prompt = 7 + (window if window <= LONGEST_PROBED_WINDOW else 0)
    ids = [3 + (7 * i) % max(min(config.vocab_size, 50) - 3, 1) for i in range(prompt + 40)]
    first = TokenisedPair(ids[:prompt], ids[prompt : prompt + 6], ids[prompt + 9 : prompt + 14])
    return [first, TokenisedPair(ids[5:8], ids[20:23], ids[24:31])]


def _sum_by_position(gradient_RTD: Tensor, batch: PackedBatch, pairs: int) -> Tensor:
    """Sums gradients per pair, branch and position, so that the two layouts can be compared."""
    row = torch.arange(batch.input_ids.shape[0], device=gradient_RTD.device)[:, None]
    pair = batch.tree_ids if batch.layout == "tree" else (row // 2).expand_as(batch.tree_ids)
    real = batch.tree_ids >= 0
    width = 128
    sums = torch.zeros(pairs * 3 * width, gradient_RTD.shape[-1], device=gradient_RTD.device)
    index = (pair * 3 + batch.branch_ids) * width + batch.position_ids
    return sums.index_add(0, index[real], gradient_RTD[real])
