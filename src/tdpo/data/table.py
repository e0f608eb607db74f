"""Tokenised pairs in Arrow: int32 ids, four bytes a token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from tdpo.types import TokenisedPair

SIDES = ("prompt_ids", "chosen_ids", "rejected_ids")
SCHEMA = pa.schema([*((name, pa.list_(pa.int32())) for name in SIDES), ("row", pa.int64())])


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
