"""Lays tokenised pairs out in rows: padded rows of one sequence each, or trees that hold every prompt once.

A pair is a tree, the prompt and two branches: ``[prompt | chosen | rejected]``; a single sequence is a tree of one
branch. Positions of the rejected branch begin where the prompt ends, and the last prompt token predicts the first token
of both branches. No hidden state is needed at the last token of a branch, so it is not part of the row, unless every
token is asked for: a loss of the model's own may be over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from tdpo.data.token_weights import carried_weights
from tdpo.types import Layout, PackedBatch, TokenisedPair

PADDING_ID = 0
"""Fills the end of padded rows. Attention is causal, so no real token sees it. In trees, where padding sees itself
alone, the row's first token is repeated: a token whose embedding is zero can give NaN gradients (Gemma 3n)."""
Tree = tuple[list[int], Sequence[list[int]]]
"""A prompt and the responses that branch off it: chosen and rejected, or one alone."""


def pack_padded(pairs: Sequence[TokenisedPair]) -> PackedBatch:
    """Packs pairs into two rows each, ``[prompt | chosen]`` and ``[prompt | rejected]``, padded at the end.

    Returns:
        A batch on the CPU with R = 2P rows; see :class:`~tdpo.types.PackedBatch`.

    Examples:
        >>> batch = pack_padded([TokenisedPair([5, 6], [7], [8, 9])])
        >>> batch.input_ids.tolist()
        [[5, 6, 7, 0], [5, 6, 8, 9]]
        >>> batch.source_index.tolist(), batch.labels.tolist(), batch.sequence_ids.tolist()
        ([1, 5, 6], [7, 8, 9], [0, 1, 1])
    """
    trees = [(pair.prompt_ids, (pair.chosen_ids, pair.rejected_ids)) for pair in pairs]
    batch = _pack(trees, [pair.row for pair in pairs], "padded")
    return replace(batch, pair_keys=tuple(pair.key for pair in pairs), weights=carried_weights(pairs))


def pack_trees(pairs: Sequence[TokenisedPair], capacity: int = 0, every_token: bool = False) -> PackedBatch:
    """Packs pairs as trees, several in a row where they fit: first-fit-decreasing up to the row capacity.

    Args:
        pairs: At least one pair.
        capacity: Longest row in tokens; the longest tree of the batch where that is longer. Attention costs the square
            of a row's length, so the default, 0, makes rows as short as the longest tree allows.
        every_token: Puts the last token of a branch, which predicts nothing, in the row too.

    Returns:
        A batch on the CPU whose rows need the mask of :meth:`~tdpo.types.PackedBatch.attends`; tokens of
        ``source_index``, ``labels`` and ``sequence_ids`` are in the order of the pairs.

    Examples:
        >>> batch = pack_trees([TokenisedPair([5, 6], [7], [8, 9]), TokenisedPair([1], [2, 3], [4])])
        >>> batch.input_ids.tolist(), batch.position_ids.tolist()
        ([[5, 6, 8], [1, 2, 1]], [[0, 1, 2], [0, 1, 0]])
        >>> batch.source_index.tolist(), batch.labels.tolist(), batch.sequence_ids.tolist()
        ([1, 1, 2, 3, 4, 3], [7, 8, 9, 2, 3, 4], [0, 1, 1, 2, 2, 3])
    """
    trees = [(pair.prompt_ids, (pair.chosen_ids, pair.rejected_ids)) for pair in pairs]
    batch = _pack(trees, [pair.row for pair in pairs], "tree", capacity, every_token)
    return replace(batch, pair_keys=tuple(pair.key for pair in pairs), weights=carried_weights(pairs))


def pack_sequences(
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    rows: Sequence[int] | None = None,
    layout: Layout = "padded",
    capacity: int = 0,
    every_token: bool = False,
) -> PackedBatch:
    """Packs single sequences: each is a pair that has a chosen side only, and as a tree it has one branch.

    Args:
        prompts: Token ids before each response.
        responses: Token ids of each response.
        rows: Source row of each sequence, 0 by default.
        layout: ``"padded"`` gives each a row, ``"tree"`` lets several share one.
        capacity: Of trees, as in :func:`pack_trees`.
        every_token: Of trees, as in :func:`pack_trees`.

    Returns:
        A batch on the CPU; see :class:`~tdpo.types.PackedBatch`.

    Raises:
        ValueError: for an empty prompt or response.

    Examples:
        >>> batch = pack_sequences([[5, 6], [5]], [[7], [8, 9]])
        >>> batch.input_ids.tolist(), batch.source_index.tolist(), batch.sequence_ids.tolist()
        ([[5, 6, 7], [5, 8, 9]], [1, 3, 4], [0, 2, 2])
        >>> batch = pack_sequences([[5, 6], [5], [3]], [[7, 8, 9], [8, 9], [4, 4]], layout="tree")
        >>> batch.input_ids.tolist(), batch.source_index.tolist()
        ([[5, 6, 7, 8], [5, 8, 3, 4]], [1, 2, 3, 4, 5, 6, 7])
    """
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True), start=1):
        if not len(prompt) or not len(response):
            raise ValueError(f"sequence {number} of the batch: the {'response' if len(prompt) else 'prompt'} is empty")
    trees = [(prompt, (response,)) for prompt, response in zip(prompts, responses, strict=True)]
    return _pack(trees, rows or [0] * len(trees), layout, capacity, every_token)


def as_padded(batch: PackedBatch) -> PackedBatch:
    """Lays the sequences of a batch of trees out in padded rows; its response tokens keep their order.

    Examples:
        >>> batch = as_padded(pack_trees([TokenisedPair([5, 6], [7], [8, 9])]))
        >>> batch.input_ids.tolist(), batch.source_index.tolist()
        ([[5, 6, 7, 0], [5, 6, 8, 9]], [1, 5, 6])
    """
    if batch.layout == "padded":
        return batch
    is_prompt = batch.branch_ids == 0
    prompts = [batch.input_ids[is_prompt & (batch.tree_ids == tree)].tolist() for tree in range(batch.num_pairs)]
    sides = [side.tolist() for side in batch.labels.split(list(batch.lengths))]
    responses = [[side for side in sides[start : start + 2] if side] for start in range(0, len(sides), 2)]
    padded = _pack(list(zip(prompts, responses, strict=True)), batch.pair_rows.tolist(), "padded")
    return replace(padded, pair_keys=batch.pair_keys, weights=batch.weights).to(batch.input_ids.device)


def _pack(
    trees: Sequence[Tree], pair_rows: Sequence[int], layout: Layout, capacity: int = 0, every_token: bool = False
) -> PackedBatch:
    """Lays trees out in rows: each branch in a row of its own behind its prompt, or whole trees in shared rows."""
    if layout == "padded":
        in_row = [branches for _, branches in trees]
        rows = [[(tree, [number])] for tree, parts in enumerate(in_row) for number in range(len(parts))]
    else:
        in_row = [[branch if every_token else branch[:-1] for branch in branches] for _, branches in trees]
        sizes = [len(prompt) + sum(map(len, parts)) for (prompt, _), parts in zip(trees, in_row, strict=True)]
        rows = [[(tree, [*range(len(in_row[tree]))]) for tree in row] for row in _first_fit_decreasing(sizes, capacity)]
    width = max(sum(len(trees[t][0]) + sum(len(in_row[t][n]) for n in numbers) for t, numbers in row) for row in rows)
    shape = len(rows), width
    input_ids, position_ids = np.full(shape, PADDING_ID), np.zeros(shape, np.int64)
    tree_ids, branch_ids = np.full(shape, -1), np.full(shape, -1)
    if layout == "padded":
        position_ids[:] = np.arange(width)
    source = {}
    for row, blocks in enumerate(rows):
        end = 0
        for tree, numbers in blocks:
            prompt = trees[tree][0]
            parts = [(0, prompt, 0), *((number + 1, in_row[tree][number], len(prompt)) for number in numbers)]
            predicting = row * width + end + len(prompt) - 1  # the last prompt token predicts the first of a branch
            for branch, part, position in parts:
                begin, end = end, end + len(part)
                input_ids[row, begin:end] = part
                position_ids[row, begin:end] = np.arange(position, position + len(part))
                tree_ids[row, begin:end] = tree if layout == "tree" else 0
                branch_ids[row, begin:end] = branch
                if branch:
                    first, count = row * width + begin, len(trees[tree][1][branch - 1])
                    source[tree, branch] = [predicting, *range(first, first + count - 1)]
    if layout == "tree":
        input_ids = np.where(tree_ids < 0, input_ids[:, :1], input_ids)
    lengths = [length for _, branches in trees for length in [*map(len, branches), 0][:2]]
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        tree_ids=torch.from_numpy(tree_ids),
        branch_ids=torch.from_numpy(branch_ids),
        source_index=torch.tensor([index for key in sorted(source) for index in source[key]]),
        labels=torch.tensor([token for _, branches in trees for branch in branches for token in branch]),
        sequence_ids=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        pair_rows=torch.tensor(pair_rows),
        lengths=tuple(lengths),
        layout=layout,
    )


def _first_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Places items in rows, the longest first, each in the first row with room for it; returns the items of a row."""
    capacity = max(capacity, *sizes)
    rows: list[list[int]] = []
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        fitting = (row for row in rows if sum(sizes[other] for other in row) + sizes[item] <= capacity)
        row = next(fitting, None)
        if row is None:
            rows.append([item])
        else:
            row.append(item)
    return rows
