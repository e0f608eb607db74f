"""Lays tokenised pairs out in rows. Padded rows, one sequence each; the batch type can carry trees as well."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from tdpo.types import PackedBatch, TokenisedPair

PADDING_ID = 0
"""Fills the end of short rows. Attention is causal, so no real token ever sees it and any valid id would do."""


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
    return _padded_rows(prompts, responses, list(range(2 * len(pairs))), [pair.row for pair in pairs])


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
    )
