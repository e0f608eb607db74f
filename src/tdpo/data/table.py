"""Tokenised pairs in Arrow: int32 ids in flat arrays with offsets, in memory or mapped from a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa

from tdpo.types import TokenisedPair

SIDES = ("prompt_ids", "chosen_ids", "rejected_ids")
SCHEMA = pa.schema([*((name, pa.list_(pa.int32())) for name in SIDES), ("row", pa.int64())])


class _Block(NamedTuple):
    """One record batch as numpy arrays: offsets ``[P + 1]`` and values of each side, and the rows ``[P]``."""

    offsets: tuple[np.ndarray, ...]
    values: tuple[np.ndarray, ...]
    rows: np.ndarray


class PairTable(Sequence[TokenisedPair]):
    """A sequence of pairs that keeps four bytes a token and makes a pair when it is asked for.

    Args:
        batches: Record batches of :data:`SCHEMA`.
        path: The file they are mapped from; a copy sent to another process maps it again instead of carrying the ids.

    Example:
        >>> table = PairTable([record_batch([TokenisedPair([5, 6], [7], [8, 9], 3)])])
        >>> table[0]
        TokenisedPair(prompt_ids=[5, 6], chosen_ids=[7], rejected_ids=[8, 9], row=3)
        >>> table.lengths().tolist(), table.largest_id()
        ([[2, 1, 2]], 9)
    """

    def __init__(self, batches: Sequence[Any], path: Path | None = None) -> None:
        self._batches, self._path = [batch for batch in batches if len(batch)], path
        self._blocks = [_block(batch) for batch in self._batches]
        self._starts = np.cumsum([0, *(len(batch) for batch in self._batches)])

    @classmethod
    def mapped(cls, path: Path) -> PairTable:
        """Maps the pairs of an Arrow file into memory.

        Raises:
            OSError: if it cannot be read.
            pyarrow.ArrowInvalid: if it is no such file.
        """
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if reader.schema != SCHEMA:
            raise pa.ArrowInvalid("not a file of tokenised pairs")
        return cls([reader.get_batch(number) for number in range(reader.num_record_batches)], path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (PairTable.mapped, (self._path,)) if self._path else (PairTable, (self._batches,))

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, index: int) -> TokenisedPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenisedPair]: ...
    def __getitem__(self, index: int | slice) -> TokenisedPair | list[TokenisedPair]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        return _pair(self._blocks[number], place - int(self._starts[number]))

    def __iter__(self) -> Iterator[TokenisedPair]:
        for block in self._blocks:
            for place in range(len(block.rows)):
                yield _pair(block, place)

    def lengths(self) -> np.ndarray:
        """Returns ``[P, 3]`` int64: tokens of prompt, chosen and rejected response of each pair."""
        if not self._blocks:
            return np.zeros((0, len(SIDES)), dtype=np.int64)
        return np.concatenate([np.stack([np.diff(o) for o in block.offsets], 1) for block in self._blocks]).astype(int)

    def rows(self) -> np.ndarray:
        """Returns ``[P]`` int64: the source row of each pair."""
        return np.concatenate([block.rows for block in self._blocks] or [np.zeros(0, dtype=np.int64)])

    def largest_id(self) -> int:
        """Returns the largest id of all, -1 without any."""
        return max((int(v.max()) for block in self._blocks for v in block.values if v.size), default=-1)

    def smallest_id(self) -> int:
        """Returns the smallest id of all, 0 without any."""
        return min((int(v.min()) for block in self._blocks for v in block.values if v.size), default=0)


def record_batch(pairs: Sequence[TokenisedPair]) -> Any:
    """Packs pairs into a record batch of :data:`SCHEMA`."""
    columns = []
    for name in SIDES:
        sides: list[list[int]] = [getattr(pair, name) for pair in pairs]
        offsets = np.cumsum([0, *map(len, sides)], dtype=np.int32)
        values = np.fromiter(chain.from_iterable(sides), dtype=np.int32, count=int(offsets[-1]))
        columns.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)))
    rows = pa.array([pair.row for pair in pairs], type=pa.int64())
    return pa.RecordBatch.from_arrays([*columns, rows], schema=SCHEMA)


def _block(batch: Any) -> _Block:
    sides = [batch.column(name) for name in SIDES]
    offsets = tuple(side.offsets.to_numpy() for side in sides)
    return _Block(offsets, tuple(side.values.to_numpy() for side in sides), batch.column("row").to_numpy())


def _pair(block: _Block, place: int) -> TokenisedPair:
    prompt, chosen, rejected = (
        values[offsets[place] : offsets[place + 1]].tolist()
        for offsets, values in zip(block.offsets, block.values, strict=True)
    )
    return TokenisedPair(prompt, chosen, rejected, int(block.rows[place]))
