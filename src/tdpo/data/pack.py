"""Lays tokenised pairs out in rows. Padded rows, one sequence each; the batch type can carry trees as well."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
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
    prompts = [len(pair.prompt_ids) for pair in pairs for _ in range(2)]
    responses = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    rows = [torch.tensor([*pair.prompt_ids, *ids]) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=PADDING_ID)
    length = input_ids.shape[1]
    column = torch.arange(length)[None, :]
    prompt_length, row_length = torch.tensor(prompts)[:, None], torch.tensor([len(row) for row in rows])[:, None]
    branch = 1 + torch.arange(len(rows))[:, None] % 2
    real = column < row_length
    # The hidden state at column c predicts the token at column c + 1.
    predicts = (column >= prompt_length - 1) & (column < row_length - 1)
    return PackedBatch(
        input_ids=input_ids,
        position_ids=column.expand_as(input_ids).contiguous(),
        tree_ids=torch.where(real, 0, -1),
        branch_ids=torch.where(real, torch.where(column < prompt_length, 0, branch), -1),
        source_index=predicts.flatten().nonzero()[:, 0],
        labels=torch.cat([torch.tensor(ids) for ids in responses]),
        sequence_ids=_repeat_ids([len(ids) for ids in responses]),
        pair_rows=torch.tensor([pair.row for pair in pairs]),
    )


def _repeat_ids(lengths: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
