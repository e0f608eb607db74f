"""Options of a command: dataclasses parsed by ``HfArgumentParser``, from YAML and the command line alike."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from tdpo.commands.config_file import read_options
from tdpo.data.sources import ENTRY_FIELDS
from tdpo.errors import UserError

CONFIG = "--config"
NONE = "none"


class Parser(HfArgumentParser):
    """``HfArgumentParser`` whose errors are :class:`UserError` and whose help is one line an option."""

    def __init__(self, command: str, summary: str, dataclass_types: Sequence[Any], required: Sequence[str]) -> None:
        super().__init__(dataclass_types, prog=f"tdpo {command}", description=summary, allow_abbrev=False)
        self.kinds = {name: kinds for kind in dataclass_types for name, kinds in _kinds(kind).items()}
        for action in list(self._actions):
            self._adapt(action)
            action.required = action.required or action.dest in required

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
        """Adds a field's option, once where several dataclasses have it."""
        if f"--{field.name}" not in parser._option_string_actions:
            HfArgumentParser._parse_dataclass_field(parser, field)

    def _adapt(self, action: argparse.Action) -> None:
        """Lets an option take what its field takes, where ``HfArgumentParser`` reads less."""
        kinds = self.kinds.get(action.dest, set())
        if action.type is string_to_bool:
            action.nargs, action.const = "?", True  # also for optional booleans the bare option means yes
            if not self.knows(f"--no_{action.dest}"):  # transformers adds it only where the default is true
                spellings = (f"--no_{action.dest}", f"--no-{action.dest.replace('_', '-')}")
                self.add_argument(*spellings, action="store_false", dest=action.dest)
        elif {str, list} <= kinds:
            action.nargs = "+"
        elif dict in kinds and str not in kinds:
            action.type = json.loads
        elif NoneType in kinds and (action.type in (int, float) or (action.type is str and action.default is None)):
            action.type = _or_none(action.type)

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parses words; an option that takes one text or a list of them gets a text where it is one."""
        namespace, rest = super().parse_known_args(*args, **kwargs)
        for name, kinds in self.kinds.items():
            value = getattr(namespace, name, None)
            if {str, list} <= kinds and isinstance(value, list) and len(value) == 1:
                setattr(namespace, name, value[0])
        return namespace, rest

    def knows(self, option: str) -> bool:
        """Returns whether there is an option of this spelling."""
        return option in self._option_string_actions

    def error(self, message: str) -> NoReturn:
        """Raises argparse's message instead of printing all usage before it."""
        message = re.sub(r"(--\w+)/--[\w-]+", r"\1", message)  # transformers gives each option a second spelling
        raise UserError(f"{message} (tdpo {self.prog.split()[-1]} --help lists the options)")

    def format_help(self) -> str:
        """Returns every option with its value, meaning and default, in the groups the dataclasses define."""
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
        """Returns options by the class that defines them last, those of transformers after all others."""
        known: set[str] = set()
        for dataclass_type in self.dataclass_types:
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
        dataclass_types: The dataclasses that hold its options; what several of them have goes to the first.
        required: Options that must be given although their fields have defaults.
        argv: The command line after the command's name. ``--config file.yaml`` supplies defaults for the rest of it.

    Returns:
        One instance of each dataclass.

    Raises:
        UserError: for unknown options (all of them, each with its counterpart or the nearest name), a value that does
            not fit, options that contradict.
    """
    parser = Parser(command, summary, dataclass_types, required)
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        raise SystemExit(0)
    files, rest = _split_config(argv)
    given: list[str] = []
    mistakes: list[str] = []
    for path in files:
        words, wrong = _config_words(read_options(path, CONFIG), parser)
        given += words
        mistakes += _listed(f"{CONFIG} {path}: ", wrong)
    mistakes += _listed("", _unknown_options(rest, parser))
    if mistakes:
        raise UserError("\n".join(mistakes))
    try:
        parsed, stray = parser.parse_known_args([*given, *rest])
        options = tuple(_instances(parser.dataclass_types, vars(parsed)))
    except (ValueError, ImportError, TypeError) as error:
        raise UserError(str(error)) from error
    if stray:
        raise UserError(f"a value without an option: {stray[0]}")
    return options


def _instances(dataclass_types: Iterable[Any], values: dict[str, Any]) -> Iterator[Any]:
    """Makes the dataclasses; a value that several of them have goes to the first."""
    for kind in dataclass_types:
        yield kind(**{f.name: values.pop(f.name) for f in dataclasses.fields(kind) if f.init and f.name in values})


def _listed(where: str, mistakes: Sequence[str]) -> list[str]:
    """Lists the mistakes of one source: one in a line, several below their number."""
    if len(mistakes) < 2:
        return [where + mistake for mistake in mistakes]
    return [f"{where or 'command line: '}{len(mistakes)} mistakes", *(f"  {mistake}" for mistake in mistakes)]


def _split_config(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates the files that ``--config`` names from the other words."""
    files: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word == CONFIG or word.startswith(CONFIG + "="):
            files.append(word.partition("=")[2] or next(words, ""))
            if not files[-1]:
                raise UserError(f"{CONFIG} needs a file")
        else:
            rest.append(word)
    return files, rest


def _advice(name: str, known: Iterable[str], entry: bool = False) -> str:
    """Returns what to use instead of an unknown option, or instead of a field in an ``entry`` of ``datasets``."""
    from tdpo.counterparts import ENTRY_SPELLINGS, OPTIONS, hint  # long tables that only a mistake needs

    return hint(name, known, ENTRY_SPELLINGS if entry else OPTIONS)


def _unknown_options(words: Sequence[str], parser: Parser) -> list[str]:
    """Describes each word that argparse would take for an option and does not know."""
    options = [word.partition("=")[0] for word in words if re.match(r"--?[^\W\d]", word)]
    return [
        f"unknown option {option}.{_advice(option.lstrip('-').replace('-', '_'), parser.kinds)}"
        for option in options
        if " " not in option and not parser.knows(option)
    ]


def _config_words(content: Mapping[str, Any], parser: Parser) -> tuple[list[str], list[str]]:
    """Turns the options of a file into words of a command line, and describes those that cannot be."""
    words: list[str] = []
    mistakes: list[str] = []
    for key, value in content.items():
        if key not in parser.kinds:
            mistakes.append(f"unknown key {key!r}.{_advice(key, parser.kinds)}")
        elif (wrong := _wrong_kind(value, parser.kinds[key], parser.get_default(key))) is not None:
            mistakes.append(f"{key!r}: {wrong}")
        else:
            mistakes += _foreign_fields(value) if key == "datasets" else ()
            words += _words(key, value, parser)
    return words, mistakes


def _wrong_kind(value: Any, kinds: set[Any], default: Any) -> str | None:
    """Describes a value whose kind no text on the command line could have; None if it fits."""
    if value is None and default is not None and NoneType not in kinds:
        return f"no value; give one, or leave the key out for the default, {_plain(default)}"
    if isinstance(value, list) and list not in kinds:
        return f"expected one value, found a list of {len(value)}"
    if isinstance(value, dict) and dict not in kinds:
        return "expected a list, found a mapping" if list in kinds else "expected one value, found a mapping"
    return None


def _words(key: str, value: Any, parser: Parser) -> list[str]:
    """Turns one option of a file into words of a command line."""
    if isinstance(value, list):
        items = (json.dumps(item, default=str) if isinstance(item, dict) else str(item) for item in value)
        return [f"--{key}", *items] if value else []
    if value is None:
        return [] if parser.get_default(key) is None else [f"--{key}={NONE}"]
    if str(value).lower() == "false" and key in ("eval_strategy", "save_strategy", "logging_strategy"):
        value = "no"  # YAML's no and false are one value
    if key == "report_to" and str(value).lower() in ("false", "no"):
        value = NONE
    return [f"--{key}={json.dumps(value, default=str) if isinstance(value, dict) else value}"]


def _foreign_fields(entries: Any) -> list[str]:
    """Describes unknown fields in the entries of ``datasets``; their values are checked where they are read."""
    return [
        f"'datasets', entry {number}: unknown field {name!r}.{_advice(name, ENTRY_FIELDS, entry=True)}"
        for number, entry in enumerate(entries, 1)
        if isinstance(entry, dict)
        for name in map(str, entry)
        if name not in ENTRY_FIELDS
    ]


def _kinds(dataclass_type: Any) -> dict[str, set[Any]]:
    """Maps fields to the types they take: ``int | None`` are two, and of ``list[str]`` it is ``list``."""
    hints = get_type_hints(dataclass_type)
    parts = {
        field.name: get_args(kind) if get_origin(kind := hints[field.name]) in (Union, UnionType) else (kind,)
        for field in dataclasses.fields(dataclass_type)
        if field.init
    }
    return {name: {get_origin(part) or part for part in each} for name, each in parts.items()}


def _or_none(kind: Any) -> Callable[[str], Any]:
    """Reads ``none`` and ``null`` as None, as TRL does, and anything else as a number or text."""

    def read(text: str) -> Any:
        return None if text.lower() in (NONE, "null") else kind(text)

    read.__name__ = kind.__name__  # argparse names it in messages
    return read


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
