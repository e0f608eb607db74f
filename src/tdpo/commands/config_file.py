"""A YAML file of options, read as text: a value means in the file what it means on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import NoneType
from typing import Any

import yaml
from typing_extensions import override

from tdpo.commands.options import CONFIG, NONE, Parser, advice
from tdpo.data.sources import ENTRY_FIELDS
from tdpo.errors import UserError

SWITCHES = {"on": "true", "off": "false"}
"""Booleans of YAML that are none on a command line."""


class Loader(yaml.SafeLoader):
    """``yaml.SafeLoader`` that reads ``5e-6``, without a point, as a number too, and notes repeated keys.

    Attributes:
        repeated: The keys that stand twice in one mapping, with their lines; PyYAML keeps the last one silently.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[str] = []

    @override
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            line = key.start_mark.line + 1
            if key.value in lines:
                self.repeated.append(f"{key.value!r} stands twice, in line {lines[key.value]} and in line {line}")
            lines[key.value] = line
        return node


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_words(path: str, parser: Parser) -> tuple[list[str], list[str]]:
    """Reads the options in a YAML file.

    Args:
        path: The file.
        parser: The parser of the command's options.

    Returns:
        The options as words of a command line, and the mistakes in those that cannot be.

    Raises:
        UserError: for a file that cannot be read, holds something else than one mapping, or has a key twice.
    """
    words: list[str] = []
    mistakes: list[str] = []
    for key, value in _read_mapping(path).items():
        try:
            words += _words(key, value, parser)
        except ValueError as error:
            mistakes.append(str(error))
        for number, entry in enumerate(value if key == "datasets" and isinstance(value, list) else [], 1):
            unknown = [name for name in map(str, entry) if name not in ENTRY_FIELDS] if isinstance(entry, dict) else []
            where = f"'datasets', entry {number}: unknown field"
            mistakes += [f"{where} {name!r}.{advice(name, ENTRY_FIELDS, entry=True)}" for name in unknown]
    return words, mistakes


def _words(key: str, value: Any, parser: Parser) -> list[str]:
    """Turns one option of a file into words of a command line.

    Raises:
        ValueError: for an unknown option, or a value whose kind no text on the command line could have.
    """
    if isinstance(value, list) and list not in parser.kinds.get(key, {list}) and f"{key}s" in parser.kinds:
        key = f"{key}s"  # of a sweep: beta: [0.1, 0.3] is betas
    if key not in parser.kinds:
        raise ValueError(f"unknown key {key!r}.{advice(key, parser.kinds)}")
    kinds, default = parser.kinds[key], parser.get_default(key)
    if value is None:
        if default is not None and NoneType not in kinds:
            default = getattr(default, "value", default)
            raise ValueError(f"{key!r}: no value; give one, or leave the key out for the default, {default}")
        return [] if default is None else [f"--{key}={NONE}"]
    if isinstance(value, list | dict) and type(value) not in kinds:
        found = "a mapping" if isinstance(value, dict) else f"a list of {len(value)}"
        raise ValueError(f"{key!r}: expected {'a list' if list in kinds else 'one value'}, found {found}")
    if isinstance(value, list):
        items = (json.dumps(item, default=str) if isinstance(item, dict) else str(item) for item in value)
        return [f"--{key}", *items] if value else []
    if str(value).lower() == "false" and key in ("eval_strategy", "save_strategy", "logging_strategy"):
        value = "no"  # YAML's no and false are one value
    if key == "report_to" and str(value).lower() in ("false", "no"):
        value = NONE
    return [f"--{key}={json.dumps(value, default=str) if isinstance(value, dict) else value}"]


def _read_mapping(path: str) -> dict[str, Any]:
    """Reads a file: values by key, a scalar as the text it is, a list or a mapping typed, None for null."""
    where = f"{CONFIG} {path}"
    try:
        loader = Loader(Path(path).expanduser().read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{where}: expected a mapping of options to values")
        if loader.repeated:
            raise UserError(f"{where}: {'; '.join(loader.repeated)}. Remove one of them")
        loader.flatten_mapping(node)
        return {str(key.value): _value(loader, value) for key, value in node.value}
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error


def _value(loader: Loader, node: yaml.Node) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        return loader.construct_object(node, deep=True)
    kind = node.tag.rpartition(":")[2]
    if kind == "null":
        return None
    return SWITCHES.get(node.value.lower(), node.value) if kind == "bool" else str(node.value)
