"""Fields of options, and checks of their values whether a command line parsed them or not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import field
from typing import Any

from tdpo.errors import UserError

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
"""Seconds in the units a duration may have."""


def option(default: Any, help_text: str, choices: Sequence[str] | None = None) -> Any:
    """Returns a dataclass field with the text that ``--help`` prints, and the values it may have.

    A default of ``list`` is an empty list.
    """
    metadata = {"help": help_text} | ({} if choices is None else {"choices": choices})
    return (
        field(default_factory=list, metadata=metadata) if default is list else field(default=default, metadata=metadata)
    )


def check_at_least(options: Any, least: float, *names: str) -> None:
    """Refuses fields below a value; None is no value.

    Raises:
        UserError: naming the field.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= least:
            raise UserError(f"--{name} must be at least {least:g}, got {value}")


def check_choices(options: Any) -> None:
    """Refuses a value outside a field's choices, also where no command line has parsed it.

    Raises:
        UserError: naming the field and its choices.
    """
    for name, spec in options.__dataclass_fields__.items():
        choices = spec.metadata.get("choices")
        value = getattr(options, name)
        if choices and isinstance(value, str) and value not in choices:
            raise UserError(f"--{name} {value}: there are {', '.join(map(str, choices))}")


def seconds(text: str) -> float:
    """Reads a duration: seconds, or numbers with units.

    Example:
        >>> seconds("90"), seconds("1h30m"), seconds("1.5h")
        (90.0, 5400.0, 5400.0)

    Raises:
        UserError: for anything else, and for no time at all.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    if "".join(number + unit for number, unit in parts) == text and parts:
        total = sum(float(number) * UNITS[unit] for number, unit in parts)
    elif re.fullmatch(r"\d+(\.\d+)?", text):
        total = float(text)
    else:
        total = 0.0
    if total <= 0:
        raise UserError(f"--max_time {text}: expected seconds or a duration such as 90s, 45m, 11h30m or 2d")
    return total
