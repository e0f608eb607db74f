"""Options of a command: dataclasses parsed by ``HfArgumentParser``, from YAML and the command line alike."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial, update_wrapper
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool
from typing_extensions import override

from tdpo.cli import COMMANDS
from tdpo.errors import UserError

CONFIG = "--config"
NONE = "none"
VALUE_NAMES = {bool: "[BOOL]", int: "INT", float: "FLOAT", list: "X ...", str: "TEXT", dict: "JSON"}
TEXTS = ("prompt", "chosen", "rejected")
"""Options whose value is never a path."""
LONGEST_CHOICES = 60
"""Characters beyond which help leaves out the choices of an option, such as the names of all optimizers."""


class Parser(HfArgumentParser):
    """``HfArgumentParser`` whose errors are :class:`UserError` and whose help is grouped by the options' dataclasses.

    Attributes:
        kinds: The types each option takes: of ``int | None`` both, of ``list[str]`` ``list``.
    """

    def __init__(self, command: str, dataclass_types: Sequence[Any], required: Sequence[str]) -> None:
        # An option that several dataclasses have is the same in all of them.
        super().__init__(dataclass_types, prog=f"tdpo {command}", allow_abbrev=False, conflict_handler="resolve")
        self.kinds: dict[str, set[Any]] = {}
        actions = {action.dest: action for action in reversed(self._actions)}  # --x where there is a --no_x too
        hints = [hint for kind in dataclass_types for hint in get_type_hints(kind).items() if hint[0] in actions]
        for name, hint in hints:
            parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            action, kinds = actions[name], {get_origin(part) or part for part in parts}
            self.kinds[name] = kinds
            action.required = action.required or name in required
            if action.type is string_to_bool:
                action.nargs, action.const = "?", True  # also for optional booleans the bare option means yes
                if f"--no_{name}" not in self._option_string_actions:  # transformers adds it if the default is true
                    self.add_argument(f"--no_{name}", f"--no-{name.replace('_', '-')}", action="store_false", dest=name)
            elif {str, list} <= kinds:
                action.nargs = "+"
            elif dict in kinds and str not in kinds:
                action.type = json.loads
            elif NoneType in kinds and (action.type in (int, float) or (action.type is str and action.default is None)):
                # With the type's name, which argparse puts in messages.
                action.type = update_wrapper(partial(_or_none, action.type), action.type, updated=())

    @override
    def error(self, message: str) -> NoReturn:
        message = re.sub(r"(--\w+)/--[\w-]+", r"\1", message)  # transformers gives each option a second spelling
        raise UserError(f"{message} ({self.prog} --help lists the options)")

    @override
    def format_help(self) -> str:
        width = min(shutil.get_terminal_size((110, 20)).columns, 140)
        formatter = argparse.HelpFormatter(self.prog, max_help_position=36, width=width)
        formatter.add_text(f"{self.prog}: {COMMANDS[self.prog.split()[-1]]}")
        formatter.add_usage(f"{self.prog} [{CONFIG} file.yaml] [--option value ...]", (), ())
        known: set[str] = set()
        for dataclass_type in self.dataclass_types:
            fields = {field.name: field for field in dataclasses.fields(dataclass_type)}
            for owner in dataclass_type.__mro__:  # each option under the class that defines it last
                own = [name for name in vars(owner).get("__annotations__", {}) if name in fields and name not in known]
                known |= set(own)
                title = re.split(r"[:;\n]", (owner.__doc__ or "").strip())[0].rstrip(".")
                formatter.start_section(
                    title if owner.__module__.startswith("tdpo") else f"transformers.{owner.__name__}"
                )
                formatter.add_arguments(self._help_entry(fields[name]) for name in own)
                formatter.end_section()
        return formatter.format_help()

    def _help_entry(self, field: dataclasses.Field[Any]) -> argparse.Action:
        """Returns an action that displays an option with one spelling, its values, meaning and default."""
        action = self._option_string_actions[f"--{field.name}"]
        kinds, default = self.kinds[field.name], getattr(action.default, "value", action.default)
        note = " (required)" if action.required else "" if default in (None, "", []) else f" (default: {default})"
        value = next((value for kind, value in VALUE_NAMES.items() if kind in kinds), "TEXT")
        choices = "|".join(map(str, action.choices or ()))
        value = choices if 0 < len(choices) <= LONGEST_CHOICES else value
        return argparse.Action([f"--{field.name}"], field.name, metavar=value, help=(action.help or field.name) + note)


def parse(command: str, dataclass_types: Sequence[Any], argv: Sequence[str], required: Sequence[str] = ()) -> Any:
    """Parses a command's options.

    Args:
        command: Its name.
        dataclass_types: The dataclasses that hold its options; what several of them have goes to the first.
        argv: The words after the command's name. ``--config FILE.yaml`` supplies defaults for the rest of it.
        required: Options that have a default in their dataclass and must be given here.

    Returns:
        A list of one instance of each dataclass.

    Raises:
        UserError: for unknown options (all of them, each with its counterpart or the nearest name), a value that does
            not fit, options that contradict.
    """
    parser = Parser(command, dataclass_types, required)
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        raise SystemExit(0)
    config = Parser(command, (), ())
    config.add_argument(CONFIG, action="append", default=[])
    files, words = config.parse_known_args(argv)
    mistakes: dict[str, list[str]] = {}
    given: list[str] = []
    for path in files.config:
        from tdpo.commands.config_file import read_words

        found, mistakes[f"{CONFIG} {path}: "] = read_words(path, parser)
        given += found
    options = [word.partition("=")[0] for word in words if re.match(r"--?[^\W\d]", word)]
    mistakes[""] = [
        f"unknown option {option}.{advice(option.lstrip('-').replace('-', '_'), parser.kinds)}"
        for option in options
        if " " not in option and option not in parser._option_string_actions
    ]
    lines: list[str] = []
    for where, found in mistakes.items():  # one mistake in a line, several below their number
        several = [f"{where or 'command line: '}{len(found)} mistakes", *(f"  {mistake}" for mistake in found)]
        lines += [where + mistake for mistake in found] if len(found) < 2 else several
    if lines:
        raise UserError("\n".join(lines))
    try:
        namespace, stray = parser.parse_known_args([*given, *words])
        values = vars(namespace)
        for name, value in values.items():
            if {str, list} <= parser.kinds[name] and isinstance(value, list) and len(value) == 1:
                value = value[0]  # an option that takes one text or a list of them
            values[name] = value if name in TEXTS else _from_home(value)
        parsed = [
            kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(kind) if field.name in values})
            for kind in dataclass_types
        ]
    except (ValueError, ImportError, TypeError) as error:
        raise UserError(str(error)) from error
    if stray:
        raise UserError(f"a value without an option: {stray[0]}")
    return parsed


def advice(name: str, known: Iterable[str], entry: bool = False) -> str:
    """Returns what to use instead of an unknown option, or instead of a field in an ``entry`` of ``datasets``."""
    from tdpo.counterparts import ENTRY_SPELLINGS, OPTIONS, hint  # long tables that only a mistake needs

    return hint(name, known, ENTRY_SPELLINGS if entry else OPTIONS)


def _from_home(value: Any) -> Any:
    """Returns a value with ``~/`` at its beginning, or at that of a list's entries, as the home folder.

    A shell does so only for words of their own: neither for ``--option=~/x`` nor in a file of options.
    """
    if isinstance(value, list):
        return [_from_home(entry) for entry in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _or_none(kind: Callable[[str], Any], text: str) -> Any:
    """Reads ``none`` and ``null`` as None, as TRL does, and anything else as a number or text."""
    return None if text.lower() in (NONE, "null") else kind(text)
