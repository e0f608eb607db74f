"""Finds the rows in a JSON value: a list, lists by split or beside other fields, or columns as pandas writes them."""

from __future__ import annotations

from typing import Any

from tdpo.errors import UserError

SPLITS = ("train", "test", "eval", "validation", "dev")
"""Names of splits: of a file or a list that has one, the rows are of that split alone."""
ROW_COLUMNS = {
    "prompt", "chosen", "rejected", "messages", "conversations", "instruction", "question", "query", "text", "input",
}  # fmt: skip
"""An object with one of these columns is a row, and lists in it are its values."""


def rows_of_json(value: Any, split: str | None, shown: str) -> list[Any]:
    """Returns the rows of a JSON file.

    A list is of rows. An object is one row, unless it holds a list of rows for each split, a list of rows beside other
    fields, or columns as pandas writes them.

    Args:
        value: Content of the file.
        split: The split to take where there are several; None takes an object for a row, whatever it holds.
        shown: Name of the file for messages.

    Raises:
        UserError: if the object has no list of rows for the split, or several lists and none is of a split.
    """
    if not isinstance(value, dict) or split is None:
        return value if isinstance(value, list) else [value]
    table = _table(value, shown)
    if table is not None or ROW_COLUMNS & value.keys():
        return [value] if table is None else table
    parts = {
        name: part
        for name, part in value.items()
        if _are_rows(part) or (name in SPLITS and isinstance(part, list | dict))
    }
    if split in parts:
        return rows_of_json(parts[split], split, shown)
    if any(name in SPLITS for name in parts):
        raise UserError(f"{shown}: no split {split!r}; there are: {', '.join(parts)}")
    if len(parts) > 1:
        raise UserError(
            f"{shown}: it holds several lists of rows: {', '.join(parts)}; name the one to read as the split "
            "(--dataset_train_split, --dataset_test_split)"
        )
    return next(iter(parts.values()), [value])


def _table(value: dict[str, Any], shown: str) -> list[Any] | None:
    """Returns the rows of a table as pandas writes it (each ``orient`` that is an object), None for other objects."""
    parts, is_row = list(value.values()), bool(ROW_COLUMNS & value.keys())
    if parts and all(isinstance(part, dict) and part for part in parts):
        if all(name.isdecimal() for part in parts for name in part):  # columns of cells by row number
            if any(part.keys() != parts[0].keys() for part in parts):
                raise UserError(f"{shown}: its columns {', '.join(value)} do not have the same rows")
            return [{name: cells[row] for name, cells in value.items()} for row in parts[0]]
        are_rows = all(ROW_COLUMNS & part.keys() for part in parts) and not is_row and not value.keys() & {*SPLITS}
        return parts if are_rows or all(map(str.isdecimal, value)) else None
    if not all(isinstance(part, list) and not _are_turns(part) for part in parts):
        return None
    if value.keys() == {"columns", "index", "data"} and all(isinstance(cells, list) for cells in value["data"]):
        return [dict(zip(map(str, value["columns"]), cells, strict=True)) for cells in value["data"]]
    lengths = {name: len(column) for name, column in value.items()}
    if not is_row and (any(map(_are_rows, parts)) or len(set(lengths.values())) > 1):
        return None
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise UserError(f"{shown}: its columns have different lengths: {found}")
    return [dict(zip(value, cells, strict=True)) for cells in zip(*parts, strict=True)]


def _are_rows(value: Any) -> bool:
    """Returns whether a value is a list of objects other than the turns of a chat."""
    objects = isinstance(value, list) and bool(value) and all(isinstance(entry, dict) for entry in value)
    return objects and not _are_turns(value)


def _are_turns(value: list[Any]) -> bool:
    return any(isinstance(entry, dict) and ("role" in entry or "from" in entry) for entry in value)
