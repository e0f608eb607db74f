"""Fields of options, and checks of their values whether a command line parsed them or not."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, TypeVar

from tdpo.errors import UserError

Options = TypeVar("Options")

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
"""Seconds in the units a duration may have."""


def option(default: Any, help_text: str = "", choices: Sequence[str] = ()) -> Any:
    """Returns a dataclass field with the text that ``--help`` prints, and the values it may have.

    A default of ``list`` is an empty list. The text may stand in the docstring instead; see :func:`documented`.
    """
    metadata = ({"help": help_text} if help_text else {}) | ({"choices": choices} if choices else {})
    value: Any = {"default_factory": list} if default is list else {"default": default}
    return dataclasses.field(metadata=metadata, **value)


def documented(cls: type[Options]) -> type[Options]:
    """Gives the fields of a dataclass the help texts of its docstring's ``Attributes``, for ``--help``."""
    for name, text in re.findall(r"^    (\w+): (.*(?:\n {6,}.*)*)", inspect.getdoc(cls) or "", re.M):
        if name in cls.__annotations__:
            field = cls.__dataclass_fields__[name]  # type: ignore[attr-defined]
            field.metadata = MappingProxyType({"help": " ".join(text.split()), **field.metadata})
    return cls


def check_values(options: Any, **least: float) -> None:
    """Refuses a value outside a field's choices or below the least one, whether a command line parsed it or not.

    Args:
        options: A dataclass of options.
        **least: The least value by the name of the field; None is no value.

    Raises:
        UserError: naming the field.
    """
    for name, spec in options.__dataclass_fields__.items():
        choices, value = spec.metadata.get("choices"), getattr(options, name)
        if choices and isinstance(value, str) and value not in choices:
            raise UserError(f"--{name} {value}: there are {', '.join(map(str, choices))}")
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and not value >= bound:
            raise UserError(f"--{name} must be at least {bound:g}, got {value}")


def check_used(options: Any, switch: str, *beginnings: str) -> None:
    """Refuses options that are set, have one of these beginnings and no effect, since the switch is off.

    Raises:
        UserError: naming the first of them.
    """
    for name, spec in options.__dataclass_fields__.items():
        if name.startswith(beginnings) and getattr(options, name) != spec.default and not getattr(options, switch):
            raise UserError(f"--{name} has no effect without --{switch}")


def check_defaults(switch: str, *options: Any) -> None:
    """Refuses any option that is not at its default, since the switch that they all need is off.

    Raises:
        UserError: naming the first of them.
    """
    for part in options:
        for name, spec in part.__dataclass_fields__.items():
            default = spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()
            if getattr(part, name) != default:
                raise UserError(f"--{name} has no effect without --{switch}")


def seconds(text: str) -> float:
    """Reads a duration: seconds, or numbers with units.

    Examples:
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
