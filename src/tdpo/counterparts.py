"""Finds what to use here instead of an option of another library; the tables are in ``counterparts.yaml``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from typing import NamedTuple

import yaml

from tdpo.errors import nearest


class Counterpart(NamedTuple):
    """What to use here instead of an option of another library.

    Attributes:
        option: The option to use, of the same name where it means the same; empty where there is none.
        note: What differs; where there is no option, the reason and what to do instead.
    """

    option: str = ""
    note: str = ""


def _read_tables() -> dict[str, dict[str, Counterpart]]:
    """Reads ``counterparts.yaml``, whose keys are one name or several."""
    text = resources.files("tdpo").joinpath("counterparts.yaml").read_text(encoding="utf-8")
    tables: dict[str, dict[str, Counterpart]] = {}
    for table, entries in yaml.safe_load(text).items():
        tables[table] = {}
        for names, value in entries.items():
            for name in names.split():
                fields = value if isinstance(value, dict) else {"option": value or name}
                tables[table][name] = Counterpart(**fields)
    return tables


TABLES = _read_tables()
OPTIONS: Mapping[str, Counterpart] = {
    name: entry
    for table in ("OTHER_SPELLINGS", "DPO_CONFIG", "MODEL_CONFIG", "SCRIPT_ARGUMENTS", "DATASET_MIXTURE_CONFIG")
    for name, entry in TABLES[table].items()
}
"""What to use instead of options of any other library."""
ENTRY_SPELLINGS: Mapping[str, Counterpart] = TABLES["ENTRY_SPELLINGS"]
"""The same of fields in an entry of ``datasets``."""


def hint(name: str, known: Iterable[str], counterparts: Mapping[str, Counterpart] = OPTIONS) -> str:
    """Returns what to use instead of an unknown option: its counterpart, or the nearest known name, or nothing.

    Args:
        name: The unknown option.
        known: The options there are.
        counterparts: What to use instead of options of other libraries.

    Examples:
        >>> hint("torch_dtype", ["dtype", "beta"]), hint("bta", ["dtype", "beta"])
        (" Use 'dtype'.", " Did you mean 'beta'?")
        >>> hint("discopop_tau", ["dtype", "beta"])
        ' It is not available: it belongs to a loss that is not available either; leave it out.'
    """
    known = list(known)
    found = counterparts.get(name)
    if found is None or (found.option and found.option not in known):
        return nearest(name, known)
    if found.option:
        return f" Use {found.option!r}{': ' if found.note else ''}{found.note}."
    return f" It is {found.note}."
