"""Lays tokenised pairs out in rows: padded rows of one sequence each, or trees that hold every prompt once.

A pair is a tree, the prompt and two branches: ``[prompt | chosen | rejected]``. Positions of the rejected branch begin
where the prompt ends, and the last prompt token predicts the first token of both branches. No hidden state is wanted
at the last token of a branch, so it is not part of the row, unless every token is asked for: a loss of the model's own
may be over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.utils.rnn import pad_sequence

from tdpo.types import PackedBatch, TokenisedPair

PADDING_ID = 0
"""Fills the end of padded rows. Attention is causal, so no real token sees it. In trees, where padding sees itself
alone, the row's first token is repeated: a token whose embedding is zero can give NaN gradients (Gemma 3n)."""


def pack_padded(pairs: Sequence[TokenisedPair]) -> PackedBatch:
    """Two rows a pair, ``[prompt | chosen]`` and ``[prompt | rejected]``, padded at the end.

    Returns:
        A batch on the CPU with R = 2P rows; see :class:`~tdpo.types.PackedBatch`.

    Example:
        >>> batch = pack_padded([TokenisedPair([5, 6], [7], [8, 9])])
        >>> batch.input_ids.tolist()
        [[5, 6, 7, 0], [5, 6, 8, 9]]
        >>> batch.source_index.tolist(), batch.labels.tolist(), batch.sequence_ids.tolist()
        ([1, 5, 6], [7, 8, 9], [0, 1, 1])
    """
    prompts = [pair.prompt_ids for pair in pairs for _ in range(2)]
    responses = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    batch = _padded_rows(prompts, responses, list(range(2 * len(pairs))), [pair.row for pair in pairs])
    return replace(batch, pair_keys=tuple(pair.key for pair in pairs))


def pack_trees(pairs: Sequence[TokenisedPair], capacity: int = 0, every_token: bool = False) -> PackedBatch:
    """Every prompt once, several trees a row where they fit: first-fit-decreasing up to the row capacity.

    Args:
        pairs: At least one pair.
        capacity: Longest row in tokens; the longest tree of the batch where that is longer. Attention costs the square
            of a row's length, so the default, 0, makes rows as short as the longest tree allows.
        every_token: Whether the last token of a branch, which predicts nothing, is in the row too.

    Returns:
        A batch on the CPU whose rows need the mask of :meth:`~tdpo.types.PackedBatch.attends`; tokens of
        ``source_index``, ``labels`` and ``sequence_ids`` stand in the order of the pairs.

    Example:
        >>> batch = pack_trees([TokenisedPair([5, 6], [7], [8, 9]), TokenisedPair([1], [2, 3], [4])])
        >>> batch.input_ids.tolist(), batch.position_ids.tolist()
        ([[5, 6, 8], [1, 2, 1]], [[0, 1, 2], [0, 1, 0]])
        >>> batch.source_index.tolist(), batch.labels.tolist(), batch.sequence_ids.tolist()
        ([1, 1, 2, 3, 4, 3], [7, 8, 9, 2, 3, 4], [0, 1, 1, 2, 2, 3])
    """
    trees = [Tree(pair.prompt_ids, (pair.chosen_ids, pair.rejected_ids), every_token) for pair in pairs]
    batch = _forest(trees, list(range(2 * len(pairs))), [pair.row for pair in pairs], capacity)
    return replace(batch, pair_keys=tuple(pair.key for pair in pairs))


def pack_sequence_trees(
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    rows: Sequence[int] | None = None,
    capacity: int = 0,
    every_token: bool = False,
) -> PackedBatch:
    """Single sequences as trees of one branch, several a row; otherwise as :func:`pack_sequences`.

    Example:
        >>> batch = pack_sequence_trees([[5, 6], [5], [3]], [[7, 8, 9], [8, 9], [4, 4]])
        >>> batch.input_ids.tolist(), batch.source_index.tolist()
        ([[5, 6, 7, 8], [5, 8, 3, 4]], [1, 2, 3, 4, 5, 6, 7])
    """
    trees = [Tree(prompt, (response,), every_token) for prompt, response in zip(prompts, responses, strict=True)]
    return _forest(trees, list(range(0, 2 * len(trees), 2)), list(rows or [0] * len(trees)), capacity)


@dataclass(frozen=True)
class Tree:
    """A prompt and the responses that branch off it."""

    prompt: list[int]
    branches: tuple[list[int], ...]
    every_token: bool = False

    def __len__(self) -> int:
        """Tokens it takes in a row."""
        return len(self.prompt) + sum(map(len, self.placed))

    @property
    def placed(self) -> list[list[int]]:
        """The tokens of each branch that are in the row; the last one predicts nothing and stays out by default."""
        return [branch if self.every_token else branch[:-1] for branch in self.branches]


def _forest(trees: Sequence[Tree], sequence_ids: list[int], pair_rows: list[int], capacity: int) -> PackedBatch:
    """Trees in rows; ``sequence_ids`` says which sequence each branch is, in the order of trees and branches."""
    lengths = [len(tree) for tree in trees]
    places, filled = _first_fit_decreasing(lengths, max(capacity, *lengths))
    shape = len(filled), max(filled)
    input_ids, position_ids = torch.full(shape, PADDING_ID), torch.zeros(shape, dtype=torch.int64)
    tree_ids, branch_ids = torch.full(shape, -1), torch.full(shape, -1)
    source: list[int] = []
    for number, (tree, (row, start)) in enumerate(zip(trees, places, strict=True)):
        fork, stop = start + len(tree.prompt) - 1, start + lengths[number]
        ids, positions, branches = list(tree.prompt), list(range(len(tree.prompt))), [0] * len(tree.prompt)
        for branch, (response, placed) in enumerate(zip(tree.branches, tree.placed, strict=True), 1):
            first = row * shape[1] + start + len(ids)
            source += [row * shape[1] + fork, *range(first, first + len(response) - 1)]
            ids += placed
            positions += range(len(tree.prompt), len(tree.prompt) + len(placed))
            branches += [branch] * len(placed)
        for field, values in ((input_ids, ids), (position_ids, positions), (branch_ids, branches)):
            field[row, start:stop] = torch.tensor(values)
        tree_ids[row, start:stop] = number
    responses = [branch for tree in trees for branch in tree.branches]
    counts = [len(response) for response in responses]
    return PackedBatch(
        input_ids=torch.where(tree_ids < 0, input_ids[:, :1], input_ids),
        position_ids=position_ids,
        tree_ids=tree_ids,
        branch_ids=branch_ids,
        source_index=torch.tensor(source),
        labels=torch.cat([torch.tensor(response) for response in responses]),
        sequence_ids=torch.repeat_interleave(torch.tensor(sequence_ids), torch.tensor(counts)),
        pair_rows=torch.tensor(pair_rows),
        lengths=_both_sides(sequence_ids, counts),
        layout="tree",
    )


def _first_fit_decreasing(lengths: Sequence[int], capacity: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Row and start of each item, and how full each row is; the longest items are placed first."""
    places = [(0, 0)] * len(lengths)
    filled: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, used in enumerate(filled) if used + lengths[item] <= capacity), len(filled))
        if row == len(filled):
            filled.append(0)
        places[item] = (row, filled[row])
        filled[row] += lengths[item]
    return places, filled


def pack_sequences(
    prompts: Sequence[list[int]], responses: Sequence[list[int]], rows: Sequence[int] | None = None
) -> PackedBatch:
    """Single sequences in padded rows: every row is a pair that has a chosen side only.

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
    return _padded_rows(prompts, responses, list(range(0, 2 * len(prompts), 2)), list(rows or [0] * len(prompts)))


def _padded_rows(
    prompts: Sequence[list[int]], responses: Sequence[list[int]], sequence_ids: list[int], pair_rows: list[int]
) -> PackedBatch:
    """One sequence a row; ``sequence_ids`` says which sequence each row is."""
    rows = [torch.tensor([*prompt, *response]) for prompt, response in zip(prompts, responses, strict=True)]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=PADDING_ID)
    column = torch.arange(input_ids.shape[1])[None, :]
    prompt_length = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    row_length = torch.tensor([len(row) for row in rows])[:, None]
    response_length = torch.tensor([len(response) for response in responses])
    sequence_id = torch.tensor(sequence_ids)
    real = column < row_length
    # The hidden state at column c predicts the token at column c + 1.
    predicts = (column >= prompt_length - 1) & (column < row_length - 1)
    return PackedBatch(
        input_ids=input_ids,
        position_ids=column.expand_as(input_ids).contiguous(),
        tree_ids=torch.where(real, 0, -1),
        branch_ids=torch.where(real, torch.where(column < prompt_length, 0, 1 + sequence_id[:, None] % 2), -1),
        source_index=predicts.flatten().nonzero()[:, 0],
        labels=torch.cat([torch.tensor(response) for response in responses]),
        sequence_ids=torch.repeat_interleave(sequence_id, response_length),
        pair_rows=torch.tensor(pair_rows),
        lengths=_both_sides(sequence_ids, [len(response) for response in responses]),
    )


def _both_sides(sequence_ids: list[int], counts: list[int]) -> tuple[int, ...]:
    """Token counts of chosen and rejected side in turn, 0 for a side that is not there."""
    lengths = [0] * (2 * (max(sequence_ids) // 2 + 1))
    for sequence, count in zip(sequence_ids, counts, strict=True):
        lengths[sequence] = count
    return tuple(lengths)
