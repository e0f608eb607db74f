"""Lays tokenised pairs out in rows: padded rows of one sequence each, or trees that hold every prompt once.

A pair is a tree, the prompt and two branches: ``[prompt | chosen | rejected]``; a single sequence is a tree of one
branch. Positions of the rejected branch begin where the prompt ends, and the last prompt token predicts the first token
of both branches. No hidden state is needed at the last token of a branch, so it is not part of the row, unless every
token is asked for: a loss of the model's own may be over all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from tdpo.types import PackedBatch, TokenisedPair

PADDING_ID = 0
"""Fills the end of padded rows. Attention is causal, so no real token sees it. In trees, where padding sees itself
alone, the row's first token is repeated: a token whose embedding is zero can give NaN gradients (Gemma 3n)."""
Tree = tuple[list[int], Sequence[list[int]]]
"""A prompt and the responses that branch off it: chosen and rejected, or one alone."""


def pack_padded(pairs: Sequence[TokenisedPair]) -> PackedBatch:
    """Packs pairs into two rows each, ``[prompt | chosen]`` and ``[prompt | rejected]``, padded at the end.

    Returns:
        A batch on the CPU with R = 2P rows; see :class:`~tdpo.types.PackedBatch`.

    Example:
        >>> batch = pack_padded([TokenisedPair([5, 6], [7], [8, 9])])
        >>> batch.input_ids.tolist()
        [[5, 6, 7, 0], [5, 6, 8, 9]]
        >>> batch.source_index.tolist(), batch.labels.tolist(), batch.sequence_ids.tolist()
        ([1, 5, 6], [7, 8, 9], [0, 1, 1])
    """
    batch = _pad([(pair.prompt_ids, (pair.chosen_ids, pair.rejected_ids)) for pair in pairs], [p.row for p in pairs])
    return replace(batch, pair_keys=tuple(pair.key for pair in pairs))


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

    Example:
        >>> batch = pack_trees([TokenisedPair([5, 6], [7], [8, 9]), TokenisedPair([1], [2, 3], [4])])
        >>> batch.input_ids.tolist(), batch.position_ids.tolist()
        ([[5, 6, 8], [1, 2, 1]], [[0, 1, 2], [0, 1, 0]])
        >>> batch.source_index.tolist(), batch.labels.tolist(), batch.sequence_ids.tolist()
        ([1, 1, 2, 3, 4, 3], [7, 8, 9, 2, 3, 4], [0, 1, 1, 2, 2, 3])
    """
    trees = [(pair.prompt_ids, (pair.chosen_ids, pair.rejected_ids)) for pair in pairs]
    batch = _pack(trees, [pair.row for pair in pairs], capacity, every_token)
    return replace(batch, pair_keys=tuple(pair.key for pair in pairs))


def pack_sequences(
    prompts: Sequence[list[int]], responses: Sequence[list[int]], rows: Sequence[int] | None = None
) -> PackedBatch:
    """Packs single sequences into padded rows: every row is a pair that has a chosen side only.

    Args:
        prompts: Token ids before each response.
        responses: Token ids of each response.
        rows: Source row of each sequence, 0 by default.

    Returns:
        A batch on the CPU with R = P rows; see :class:`~tdpo.types.PackedBatch`.

    Raises:
        ValueError: for an empty prompt or response.

    Example:
        >>> batch = pack_sequences([[5, 6], [5]], [[7], [8, 9]])
        >>> batch.input_ids.tolist(), batch.source_index.tolist(), batch.sequence_ids.tolist()
        ([[5, 6, 7], [5, 8, 9]], [1, 3, 4], [0, 2, 2])
    """
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True), start=1):
        if not len(prompt) or not len(response):
            raise ValueError(f"sequence {number} of the batch: the {'response' if len(prompt) else 'prompt'} is empty")
    return _pad([(prompt, (response,)) for prompt, response in zip(prompts, responses, strict=True)], rows)


def pack_sequence_trees(
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    rows: Sequence[int] | None = None,
    capacity: int = 0,
    every_token: bool = False,
) -> PackedBatch:
    """Packs single sequences as trees of one branch, several in a row; otherwise as :func:`pack_sequences`.

    Example:
        >>> batch = pack_sequence_trees([[5, 6], [5], [3]], [[7, 8, 9], [8, 9], [4, 4]])
        >>> batch.input_ids.tolist(), batch.source_index.tolist()
        ([[5, 6, 7, 8], [5, 8, 3, 4]], [1, 2, 3, 4, 5, 6, 7])
    """
    trees = [(prompt, (response,)) for prompt, response in zip(prompts, responses, strict=True)]
    return _pack(trees, rows, capacity, every_token)


def as_padded(batch: PackedBatch) -> PackedBatch:
    """Lays the sequences of a batch of trees out in padded rows; its response tokens keep their order.

    Example:
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
    padded = _pad(list(zip(prompts, responses, strict=True)), batch.pair_rows.tolist())
    return replace(padded, pair_keys=batch.pair_keys).to(batch.input_ids.device)


def _pad(trees: Sequence[Tree], rows: Sequence[int] | None) -> PackedBatch:
    """Lays every branch out in a row of its own, behind its prompt."""
    prompt_lengths = torch.tensor([len(prompt) for prompt, branches in trees for _ in branches])[:, None]
    sequences = [torch.tensor([*prompt, *branch]) for prompt, branches in trees for branch in branches]
    input_ids = pad_sequence(sequences, batch_first=True, padding_value=PADDING_ID)
    row_lengths = torch.tensor([len(sequence) for sequence in sequences])[:, None]
    branch_ids = torch.tensor([number for _, branches in trees for number, _ in enumerate(branches, 1)])[:, None]
    column = torch.arange(input_ids.shape[1])[None, :]
    real = column < row_lengths
    # The hidden state at column c predicts the token at column c + 1.
    predicts = (column >= prompt_lengths - 1) & (column < row_lengths - 1)
    return PackedBatch(
        input_ids=input_ids,
        position_ids=column.expand_as(input_ids).contiguous(),
        tree_ids=torch.where(real, 0, -1),
        branch_ids=torch.where(real, torch.where(column < prompt_lengths, 0, branch_ids), -1),
        source_index=predicts.flatten().nonzero()[:, 0],
        **_targets(trees, rows),
    )


def _pack(trees: Sequence[Tree], rows: Sequence[int] | None, capacity: int, every_token: bool) -> PackedBatch:
    """Lays whole trees out in rows, first-fit-decreasing."""
    in_row = [[branch if every_token else branch[:-1] for branch in branches] for _, branches in trees]
    lengths = [len(prompt) + sum(map(len, parts)) for (prompt, _), parts in zip(trees, in_row, strict=True)]
    locations, filled = _first_fit_decreasing(lengths, max(capacity, *lengths))
    shape = len(filled), max(filled)
    input_ids, position_ids = torch.full(shape, PADDING_ID), torch.zeros(shape, dtype=torch.int64)
    tree_ids, branch_ids = torch.full(shape, -1), torch.full(shape, -1)
    source: list[int] = []
    for number, ((prompt, responses), (row, start)) in enumerate(zip(trees, locations, strict=True)):
        ids, positions, branches = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        offset = row * shape[1] + start
        for branch, (response, part) in enumerate(zip(responses, in_row[number], strict=True), 1):
            first = offset + len(ids)
            source += [offset + len(prompt) - 1, *range(first, first + len(response) - 1)]
            ids += part
            positions += range(len(prompt), len(prompt) + len(part))
            branches += [branch] * len(part)
        for field, values in ((input_ids, ids), (position_ids, positions), (branch_ids, branches)):
            field[row, start : start + len(ids)] = torch.tensor(values)
        tree_ids[row, start : start + len(ids)] = number
    return PackedBatch(
        input_ids=torch.where(tree_ids < 0, input_ids[:, :1], input_ids),
        position_ids=position_ids,
        tree_ids=tree_ids,
        branch_ids=branch_ids,
        source_index=torch.tensor(source),
        layout="tree",
        **_targets(trees, rows),
    )


def _first_fit_decreasing(lengths: Sequence[int], capacity: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Returns row and start of each item, and how full each row is; the longest items come first."""
    locations = [(0, 0)] * len(lengths)
    filled: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, used in enumerate(filled) if used + lengths[item] <= capacity), len(filled))
        if row == len(filled):
            filled.append(0)
        locations[item] = (row, filled[row])
        filled[row] += lengths[item]
    return locations, filled


def _targets(trees: Sequence[Tree], rows: Sequence[int] | None) -> dict[str, Any]:
    """Returns the fields of a batch that no layout changes: labels, their sequences, and the rows of the source."""
    lengths = [[*map(len, branches), 0][:2] for _, branches in trees]
    counts = torch.tensor(lengths).flatten()
    return {
        "labels": torch.tensor([token for _, branches in trees for branch in branches for token in branch]),
        "sequence_ids": torch.repeat_interleave(torch.arange(len(counts)), counts),
        "pair_rows": torch.tensor(rows or [0] * len(trees)),
        "lengths": tuple(itertools.chain(*lengths)),
    }
