"""Tokenised pairs in Arrow: int32 ids, four bytes a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from tdpo.types import WEIGHTS, TokenisedPair

SIDES = ("prompt_ids", "chosen_ids", "rejected_ids")
SCHEMA = pa.schema(
    [
        *((name, pa.list_(pa.int32())) for name in SIDES),
        ("row", pa.int64()),
        *((name, pa.list_(pa.float32())) for name in WEIGHTS),
    ]
)
"""A column for each field of a :class:`~tdpo.types.TokenisedPair`."""


def record_batch(pairs: Sequence[TokenisedPair]) -> Any:
    """Packs pairs into a record batch of :data:`SCHEMA`."""
    columns = [pa.array([getattr(pair, column.name) for pair in pairs], column.type) for column in SCHEMA]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
