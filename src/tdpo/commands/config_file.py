"""A YAML file of options, read as text: a value means in the file what it means on the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tdpo.errors import UserError

SWITCHES = {"on": "true", "off": "false"}
"""Booleans of YAML that are none on a command line."""


class Loader(yaml.SafeLoader):
    """``yaml.SafeLoader`` that reads ``5e-6``, without a point, as a number too."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_options(path: str, option: str) -> dict[str, Any]:
    """Reads the options in a YAML file.

    Args:
        path: The file.
        option: The option that names it, for messages.

    Returns:
        Values by key: a scalar as the text it is in the file, a list or a mapping with typed content, None for null.

    Raises:
        UserError: for a file that cannot be read, holds something else than one mapping, or has a key twice.
    """
    where = f"{option} {path}"
    try:
        loader = Loader(Path(path).expanduser().read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{where}: expected a mapping of options to values")
        repeated = list(_repeated(node, set()))
        if repeated:
            raise UserError(f"{where}: {'; '.join(repeated)}. Remove one of them")
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


def _repeated(node: yaml.Node, seen: set[int]) -> Iterator[str]:
    """Names the keys that stand twice in one mapping, with their lines; PyYAML keeps the last one silently."""
    if id(node) in seen or isinstance(node, yaml.ScalarNode):
        return
    seen.add(id(node))
    lines: dict[str, int] = {}
    for entry in node.value:
        key, value = entry if isinstance(node, yaml.MappingNode) else (None, entry)
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if key.value in lines:
                yield f"{key.value!r} stands twice, in line {lines[key.value]} and in line {line}"
            lines[key.value] = line
        yield from _repeated(value, seen)
