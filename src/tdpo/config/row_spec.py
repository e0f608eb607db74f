"""Specifies the rows of one source: their format, its options, and the records that are taken of them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tdpo.errors import UserError
from tdpo.types import Text

AUTO = "auto"
"""The format that is inferred from the columns."""
PairsFrom = Literal["all", "best_worst", "margin"]
PAIRS_FROM = ("all", "best_worst", "margin")
SHP_SCORE_RATIO = 2.0
"""The filter of the DPO and TDPO authors' code."""


@dataclass(frozen=True)
class Side:
    """One side of a seeded split; a prompt is on one side with all its rows, on every machine and in every order.

    Attributes:
        fraction: Expected share of the test side, over prompts.
        seed: Another seed is another split.
        test: Whether this is the test side.
    """

    fraction: float
    seed: int
    test: bool

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise UserError(f"--test_fraction must be between 0 and 1, got {self.fraction}")

    def holds(self, text: Text) -> bool:
        """Returns whether a prompt is on this side."""
        return (_draw("split", self.seed, _plain(text)) < self.fraction) == self.test


@dataclass(frozen=True)
class RowSpec:
    """Specification of rows of one source: their columns, format and share.

    Attributes:
        format: A name in :data:`tdpo.data.formats.FORMATS`, ``"module:function"``, or ``"auto"``.
        columns: Pairs of a field's name and the column it is found under.
        ignore_columns: Columns that are left out on purpose.
        pairs_from: Pairs that are made of several answers; None is ``"all"``.
        min_margin: Least difference of scores under ``pairs_from: margin``.
        min_score_ratio: Least ratio of scores in SHP; None is 2.
        weight: Times that a record is seen in an epoch; 0.5 takes a seeded half of them.
        seed: Seed of that half.
        side: One side of a split, or None for all of it.
        best_alone: Takes the best of several answers and makes no pair, for supervised training; no option of a user's.
        truncation_mode: The part of a prompt that stays when it is cut; None leaves it to the run.
    """

    format: str = "auto"
    columns: tuple[tuple[str, str], ...] = ()
    pairs_from: PairsFrom | None = None
    min_margin: float | None = None
    min_score_ratio: float | None = None
    weight: float = 1.0
    seed: int = 0
    side: Side | None = None
    best_alone: bool = False
    truncation_mode: Literal["keep_end", "keep_start"] | None = None
    ignore_columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.pairs_from not in (None, *PAIRS_FROM):
            raise UserError(f"--pairs_from {self.pairs_from}: there are {', '.join(PAIRS_FROM)}")
        if (self.min_margin is not None) != (self.pairs_from == "margin"):
            raise UserError("--pairs_from margin and --min_margin belong together: give both or neither")
        for name, value, least in (("min_margin", self.min_margin, 0), ("min_score_ratio", self.min_score_ratio, 1)):
            if value is not None and not (value >= least and math.isfinite(value)):
                raise UserError(f"--{name} must be at least {least}, got {value}")
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise UserError(f"the weight of a dataset must be above 0, got {self.weight}")
        if self.truncation_mode not in (None, "keep_end", "keep_start"):
            raise UserError(f"truncation_mode {self.truncation_mode}: there are keep_end, keep_start")

    def given(self) -> list[str]:
        """Lists the options of single formats that are set."""
        return [name for name in ("pairs_from", "min_margin", "min_score_ratio") if getattr(self, name) is not None]

    def copies(self, index: int, text: Text) -> int:
        """Returns the times that a record is taken in an epoch, by its index in the source and its prompt."""
        whole, rest = divmod(self.weight, 1)
        return int(whole) + (rest > 0 and _draw("weight", self.seed, f"{index} {_plain(text)}") < rest)


def parse_columns(columns: str | Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    """Parses field names with their columns: ``"prompt=question,chosen=good"``, JSON or a mapping.

    Examples:
        >>> parse_columns("prompt=question, chosen=good")
        (('prompt', 'question'), ('chosen', 'good'))

    Raises:
        UserError: for anything else.
    """
    if columns is None:
        return ()
    option, expected = f"--columns {columns}", "field names with column names, e.g. prompt=question,chosen=good"
    content = parse_mapping(columns, option, expected)
    if not all(isinstance(column, str) and column for column in content.values()):
        raise UserError(f"{option}: expected {expected}")
    return tuple(content.items())


def parse_mapping(given: Any, option: str, expected: str, read: Callable[[str], Any] = str) -> dict[str, Any]:
    """Parses a mapping that is written as ``name=value,name=value`` or JSON, or is one already.

    Args:
        given: The mapping.
        option: The option and its value, for messages.
        expected: What is expected, for messages.
        read: Reads a value that is not JSON.

    Raises:
        UserError: for anything else, and for a name that occurs twice.
    """
    content = given
    if isinstance(given, str) and given.lstrip().startswith("{"):
        content = parse_json(given, f"{option}:", UserError)
    elif isinstance(given, str):
        parts = [part.partition("=") for part in given.split(",") if part.strip()]
        content = {name.strip(): read(value.strip()) for name, equals, value in parts if equals and name.strip()}
        if len(content) < len({name.strip() for name, _, _ in parts}):
            raise UserError(f"{option}: expected {expected}")
        if len(content) < len(parts):
            raise UserError(f"{option}: a field is named twice")
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{option}: expected {expected}")
    return dict(content)


def parse_names(names: str | Sequence[str] | None) -> tuple[str, ...]:
    """Parses column names: ``"a,b"``, a JSON list or a list.

    Examples:
        >>> parse_names("system, notes"), parse_names(["system,notes"])
        (('system', 'notes'), ('system', 'notes'))

    Raises:
        UserError: for anything else.
    """
    content: Any = names
    if isinstance(names, str) and names.lstrip().startswith("["):
        content = parse_json(names, f"--ignore_columns {names}:", UserError)
        if isinstance(content, list) and all(isinstance(name, str) for name in content):
            return tuple(content)
    content = [content] if isinstance(content, str) else [] if content is None else content
    if not isinstance(content, list | tuple) or not all(isinstance(name, str) for name in content):
        raise UserError(f"--ignore_columns {names}: expected column names, name,name,...")
    return tuple(name.strip() for part in content for name in part.split(",") if name.strip())


def parse_json(text: str, what: str, error_type: type[Exception]) -> Any:
    """Parses JSON; an error's message is ``what``, followed by "not valid JSON" and the reason."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise error_type(f"{what} not valid JSON: {error}") from error


def _plain(text: Text) -> str:
    """Returns a prompt as one text, of messages their roles and contents."""
    if isinstance(text, str):
        return text
    return "\x1e".join(f"{message['role']}\x1f{message['content']}" for message in text)


def _draw(purpose: str, seed: int, text: str) -> float:
    """Draws a number in [0, 1) that depends on nothing but its arguments."""
    content = f"{purpose}\x1f{seed}\x1f{text}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "big") / 2**56
