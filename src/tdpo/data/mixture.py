"""Opens several datasets as one source, as the option ``datasets`` lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tdpo.config.row_spec import RowSpec, Side, parse_columns, parse_json, parse_names
from tdpo.counterparts import ENTRY_SPELLINGS, hint
from tdpo.data.sources import ENTRY_FIELDS, Source, describe, open_source
from tdpo.errors import UserError


def open_mixture(
    datasets: Sequence[Any], split: str, seed: int, side: Side | None = None, config: str | None = None
) -> Source:
    """Opens several datasets as one source, each with its own specification.

    Args:
        datasets: Entries as :func:`parse_entry` reads them.
        split: Split of those that name none.
        seed: Seed of weights that are not whole numbers.
        side: The side of a split to take of each.
        config: Configuration of hub datasets that name none.

    Raises:
        UserError: naming the entry and what is wrong with it.
    """
    if not datasets:
        raise UserError("--datasets names no dataset")
    sources = []
    for number, entry in enumerate(datasets, 1):
        fields = parse_entry(entry, number)
        name, own_split, own_config = (fields.pop(key, None) for key in ("name", "split", "config"))
        try:
            spec = RowSpec(**fields, seed=seed, side=side)
        except UserError as error:
            raise UserError(f"--datasets, entry {number} ({name}): {error}") from error
        sources.append(open_source(name, own_split or split, own_config or config, spec))
    return Source(" + ".join(source.name for source in sources), [part for one in sources for part in one.parts])


def parse_entry(entry: Any, number: int) -> dict[str, Any]:
    """Parses one entry of the option ``datasets``: a mapping, a JSON object, or ``name,field=value,...``.

    Examples:
        >>> parse_entry("pairs.jsonl,weight=0.5,format=hh", 1)
        {'name': 'pairs.jsonl', 'weight': 0.5, 'format': 'hh'}

    Raises:
        UserError: naming the entry, the unknown field and the nearest known one.
    """
    where = f"--datasets, entry {number}"
    if isinstance(entry, Mapping):
        content = dict(entry)
    elif not isinstance(entry, str):
        raise UserError(f"{where}: expected an object or a text, found {describe(entry)}")
    elif entry.lstrip().startswith("{"):
        content = parse_json(entry, f"{where}:", UserError)
    else:
        content = _parse_text(entry, where)
    for key, value in content.items():
        if key not in ENTRY_FIELDS:
            raise UserError(f"{where}: unknown field {key!r}.{hint(str(key), ENTRY_FIELDS, ENTRY_SPELLINGS)}")
        if key == "columns":
            content[key] = parse_columns(value)
        elif key == "ignore_columns":
            content[key] = parse_names(value)
        elif key in ("weight", "min_margin", "min_score_ratio") and value is not None:
            try:
                content[key] = float("none" if isinstance(value, bool) else value)
            except (TypeError, ValueError, OverflowError) as error:
                raise UserError(f"{where}: {key} must be a number, found {describe(value)}") from error
        elif not isinstance(value, str | None):
            raise UserError(f"{where}: {key} must be a text, found {describe(value)}")
    if not content.get("name"):
        raise UserError(f"{where}: no name; expected a file, folder, glob or hub name in its field 'name'")
    return {key: value for key, value in content.items() if value is not None}


def _parse_text(entry: str, where: str) -> dict[str, str]:
    name, *rest = entry.split(",")
    content = {"name": name}
    for part in rest:
        key, equals, value = (text.strip() for text in part.partition("="))
        if not equals:
            raise UserError(f"{where}: expected name,field=value,..., found {part!r} without a value")
        if key in content:
            raise UserError(f"{where}: {key} stands twice")
        content[key] = value
    return content
