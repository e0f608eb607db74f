"""Options of a command: dataclasses parsed by ``HfArgumentParser``, from YAML and the command line alike."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from tdpo.errors import UserError, nearest

CONFIG = "--config"


class Parser(HfArgumentParser):
    """``HfArgumentParser`` whose errors are :class:`UserError` and whose help is one line an option."""

    def __init__(self, command: str, summary: str, dataclass_types: Sequence[Any], required: Sequence[str]) -> None:
        super().__init__(dataclass_types, prog=f"tdpo {command}", description=summary, allow_abbrev=False)
        for action in self._actions:
            if action.type is string_to_bool:  # also for optional booleans the bare option means yes
                action.nargs, action.const = "?", True
            action.required = action.required or action.dest in required

    def error(self, message: str) -> NoReturn:
        """Raises argparse's message instead of printing all usage before it."""
        message = re.sub(r"(--\w+)/--[\w-]+", r"\1", message)  # transformers gives each option a second spelling
        raise UserError(f"{message} (tdpo {self.prog.split()[-1]} --help lists the options)")

    def format_help(self) -> str:
        """Every option with its value, meaning and default, in the groups the dataclasses define."""
        width = min(shutil.get_terminal_size((110, 20)).columns, 140)
        lines = [
            f"{self.prog}: {self.description}",
            "",
            f"usage: {self.prog} [{CONFIG} file.yaml] [--option value ...]",
        ]
        for title, fields in self._groups():
            lines += ["", title]
            for field in fields:
                lines += _option_lines(field, width)
        return "\n".join(lines) + "\n"

    def _groups(self) -> Iterator[tuple[str, list[dataclasses.Field[Any]]]]:
        """Options by the class that defines them last; the user's own questions before transformers' many."""
        for dataclass_type in self.dataclass_types:
            known: set[str] = set()
            fields = {field.name: field for field in dataclasses.fields(dataclass_type)}
            for owner in dataclass_type.__mro__:
                own = [name for name in vars(owner).get("__annotations__", {}) if name in fields and name not in known]
                known |= set(own)
                if own:
                    yield _title(owner), [fields[name] for name in own]


def parse(
    command: str, summary: str, dataclass_types: Sequence[Any], argv: Sequence[str], required: Sequence[str] = ()
) -> tuple[Any, ...]:
    """Parses a command's options.

    Args:
        command: Its name.
        summary: One line for its help.
        dataclass_types: The dataclasses that hold its options; no field name twice.
        required: Options that must be given although their fields have defaults.
        argv: The command line after the command's name. ``--config file.yaml`` supplies defaults for the rest of it.

    Returns:
        One instance of each dataclass.

    Raises:
        UserError: for an unknown option (naming the nearest), a value that does not fit, options that contradict.
    """
    parser = Parser(command, summary, dataclass_types, required)
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        raise SystemExit(0)
    names = {field.name for kind in dataclass_types for field in dataclasses.fields(kind) if field.init}
    given, rest = _split_config(argv, names)
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            [*given, *rest], return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, ImportError, TypeError) as error:
        raise UserError(str(error)) from error
    if unknown:
        name = unknown[0].split("=")[0]
        hint = nearest(name.lstrip("-").replace("-", "_"), names)
        what = "unknown option" if name.startswith("-") else "a value without an option:"
        raise UserError(f"{what} {name}.{hint}")
    return tuple(parsed)


def _split_config(argv: Sequence[str], names: set[str]) -> tuple[list[str], list[str]]:
    """The options of ``--config`` files as command-line words, and the words that remain."""
    given: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word == CONFIG or word.startswith(CONFIG + "="):
            path = word.partition("=")[2] or next(words, "")
            if not path:
                raise UserError(f"{CONFIG} needs a file")
            given += _config_words(path, names)
        else:
            rest.append(word)
    return given, rest


def _config_words(path: str, names: set[str]) -> list[str]:
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{CONFIG} {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{CONFIG} {path}: not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return []
    if not isinstance(content, dict):
        raise UserError(f"{CONFIG} {path}: expected a mapping of options to values")
    words: list[str] = []
    for key, value in content.items():
        if key not in names:
            raise UserError(f"{CONFIG} {path}: unknown key {key!r}.{nearest(str(key), names)}")
        if isinstance(value, list):
            words += [f"--{key}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in value)]
        elif value is False and key in ("eval_strategy", "save_strategy", "logging_strategy", "report_to"):
            words.append(f"--{key}=no" if key != "report_to" else "--report_to=none")  # YAML reads a bare no as false
        elif value is not None:
            words.append(f"--{key}={json.dumps(value) if isinstance(value, dict | bool) else value}")
    return words


def _title(owner: Any) -> str:
    first = (owner.__doc__ or "").strip().split("\n")[0].split(":")[0].split(";")[0].rstrip(".")
    return "transformers.TrainingArguments" if owner.__name__ == "TrainingArguments" else first


def _option_lines(field: dataclasses.Field[Any], width: int) -> list[str]:
    missing = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    default = field.default if field.default is not dataclasses.MISSING else None
    note = " (required)" if missing else "" if default in (None, "") else f" (default: {_plain(default)})"
    choices = field.metadata.get("choices")
    value = "|".join(map(str, choices)) if choices else _value_name(field)
    meaning = " ".join((field.metadata.get("help") or field.name.replace("_", " ")).split())
    head = f"  --{field.name} {value}".rstrip()
    body = textwrap.wrap(meaning + note, max(width - 36, 40))
    if len(head) > 34:
        return [head, *(" " * 36 + line for line in body)]
    return [f"{head:<36}{body[0]}", *(" " * 36 + line for line in body[1:])]


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _value_name(field: dataclasses.Field[Any]) -> str:
    kind = str(field.type)
    for part, name in (
        ("bool", "[BOOL]"),
        ("Literal", ""),
        ("int", "INT"),
        ("float", "FLOAT"),
        ("list", "X ..."),
        ("dict", "JSON"),
    ):
        if part in kind:
            return name or "|".join(map(str, getattr(field.type, "__args__", ())))
    return "TEXT"
