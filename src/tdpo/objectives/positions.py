"""Weights of response tokens by their position, without data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tdpo.errors import UserError
from tdpo.types import PackedBatch, TokenisedPair

Pack = Callable[[Sequence[TokenisedPair]], PackedBatch]
SCHEDULES = {
    "ld": "tokens past the length of the pair's shorter response count A, as in LD-DPO",
    "decay": "token t counts A to the power of t, from 0",
}
"""Schedules by name, in words with A for their number."""


@dataclass(frozen=True)
class PositionWeights:
    """Weights by position, on log-ratio and KL alike: ``ld:0.5`` or ``decay:0.98``.

    Attributes:
        name: A key of :data:`SCHEDULES`.
        factor: Its number.

    Source of ``ld``: Liu et al. 2024 (arXiv 2409.06411); TRL's ``ld_alpha``.

    Examples:
        >>> PositionWeights.parse("ld:0.5").of_lengths([3, 1]).tolist()
        [1.0, 0.5, 0.5, 1.0]
        >>> PositionWeights.parse("decay:0.5").of_lengths([3, 1]).tolist()
        [1.0, 0.5, 0.25, 1.0]
    """

    name: str
    factor: float

    @classmethod
    def parse(cls, text: str) -> PositionWeights:
        """Reads ``name:number``.

        Raises:
            UserError: for an unknown name or a number outside [0, 1].
        """
        name, _, number = text.partition(":")
        try:
            factor = float(number)
        except ValueError:
            factor = -1.0
        if name not in SCHEDULES or not 0 <= factor <= 1:
            raise UserError(f"--token_weights {text}: expected ld:A or decay:A with a number A from 0 to 1")
        return cls(name, factor)

    def of_lengths(self, lengths: Sequence[int]) -> Tensor:
        """Computes the weights ``[N]`` of responses with these lengths: chosen 0, rejected 0, chosen 1, ..."""
        parts = []
        for chosen, rejected in zip(lengths[::2], lengths[1::2], strict=True):
            for length in (chosen, rejected):
                position = torch.arange(length)
                if self.name == "decay":
                    parts.append(self.factor**position)
                else:
                    parts.append(torch.where(position < min(chosen, rejected), 1.0, self.factor))
        return torch.cat(parts).to(torch.float32)

    def weigh(self, batch: PackedBatch) -> PackedBatch:
        """Returns the batch with these weights, times those that it has."""
        weights_N = self.of_lengths(batch.lengths)
        weights = weights_N.expand(2, -1) if batch.weights is None else batch.weights * weights_N
        return replace(batch, weights=weights.contiguous())


def weighted(pack: Pack, token_weights: str | None) -> Pack:
    """Returns the function that lays pairs out with weights by position; None adds none."""
    if token_weights is None:
        return pack
    return partial(_pack_weighted, PositionWeights.parse(token_weights), pack)


def _pack_weighted(schedule: PositionWeights, pack: Pack, pairs: Sequence[TokenisedPair]) -> PackedBatch:
    return schedule.weigh(pack(pairs))
