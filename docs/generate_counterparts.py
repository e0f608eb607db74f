"""Writes the tables of docs/coming-from-*.md from ``counterparts.yaml`` and the dataclasses of TRL and of this package.

``other_libraries.yaml`` lists the options of LLaMA-Factory and Axolotl. Run ``python docs/generate_counterparts.py``
with TRL installed after a change of these; a test compares the pages.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments

from tdpo.commands.train import OPTIONS
from tdpo.counterparts import OPTIONS as COUNTERPARTS
from tdpo.counterparts import TABLES, Counterpart

FOLDER = Path(__file__).parent
LIBRARIES = yaml.safe_load((FOLDER / "other_libraries.yaml").read_text(encoding="utf-8"))
NAMES = {"llama-factory": "LLaMA-Factory", "axolotl": "Axolotl"}
TRL_CLASSES = (DPOConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig)
ON_UNLESS_FP16 = "TRL's `None` is true unless `fp16` is on"
REASONS = {
    "beta": "the objective's own, 0.1 in most of them; see [objectives](objectives.md)",
    "learning_rate": "the paper's",
    "max_length": "the paper's",
    "truncation_mode": "the end of a prompt is what the responses answer",
    "bf16": ON_UNLESS_FP16,
    "gradient_checkpointing": "saves memory, costs time",
    "lora_dropout": "policy and reference are compared as they are",
    "logging_nan_inf_filter": "a loss that is not finite stops the run and names the rows",
    "remove_unused_columns": "batches have more than the model's inputs; true is an error",
    "restore_callback_states_from_checkpoint": "a resumed run ends as an uninterrupted one",
    "dataset_num_proc": "both are one process",
    "model_name_or_path": "required",
    "output_dir": "required on the command line",
}
"""Why a default differs, where it is not plain."""


def defaults(dataclass_types: Iterable[Any]) -> dict[str, Any]:
    """The default of every field by its name; of a required one the text ``required``."""
    found: dict[str, Any] = {}
    for kind in dataclass_types:
        for field in dataclasses.fields(kind):
            if not field.init:
                continue
            value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
            found[field.name] = "required" if value is dataclasses.MISSING else getattr(value, "value", value)
    return found


def verdicts(entries: Mapping[str, Counterpart], library: str = "TRL") -> str:
    """A table of counterparts, a line each."""
    lines = [f"| {library} | here | |", "|---|---|---|"]
    for name, entry in entries.items():
        here = "the same" if entry.option == name else f"`{entry.option}`" if entry.option else "-"
        lines.append(f"| `{name}` | {here} | {_cell(entry.note)} |")
    return "\n".join(lines)


def section(library: str, name: str) -> dict[str, Counterpart]:
    """The counterparts of a section of another library's options; raises KeyError where an option has none."""
    different, ours = LIBRARIES[library]["different"], defaults(OPTIONS)
    return {
        option: Counterpart(option, different.get(option, "")) if option in ours else COUNTERPARTS[option]
        for option in LIBRARIES[library]["sections"][name].split()
    }


def different_defaults() -> str:
    """A table of the options of both packages whose defaults differ."""
    theirs, ours = defaults(TRL_CLASSES), defaults(OPTIONS)
    lines = ["| option | TRL | here | |", "|---|---|---|---|"]
    for name, value in theirs.items():
        if name in ours and ours[name] != value:
            lines.append(f"| `{name}` | `{value}` | `{ours[name]}` | {_cell(REASONS.get(name, ''))} |")
    return "\n".join(lines)


def spellings() -> str:
    """A table of the options here with further names, which are not on the pages of other libraries."""
    elsewhere = {
        name for library in LIBRARIES.values() for text in library["sections"].values() for name in text.split()
    }
    names: dict[tuple[str, str], list[str]] = {}
    for name, entry in TABLES["OTHER_SPELLINGS"].items():
        if name in elsewhere:
            continue
        names.setdefault(entry, []).append(f"`{name}`")
    lines = ["| elsewhere | here | |", "|---|---|---|"]
    for (option, note), found in names.items():
        lines.append(f"| {', '.join(found)} | {f'`{option}`' if option else '-'} | {_cell(note)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def tables() -> dict[str, dict[str, str]]:
    """The tables of each page by their names."""
    pages = {
        "coming-from-trl.md": {
            "defaults": different_defaults(),
            "DPOConfig": verdicts(TABLES["DPO_CONFIG"]),
            "ModelConfig": verdicts(TABLES["MODEL_CONFIG"]),
            "ScriptArguments": verdicts(TABLES["SCRIPT_ARGUMENTS"]),
            "DatasetMixtureConfig": verdicts(TABLES["DATASET_MIXTURE_CONFIG"]),
            "DatasetConfig": verdicts(TABLES["DATASET_CONFIG"]),
            "DPOTrainer": verdicts(TABLES["TRAINER"]),
            "spellings": spellings(),
        }
    }
    for library, name in NAMES.items():
        pages[f"coming-from-{library}.md"] = {
            part: verdicts(section(library, part), name) for part in LIBRARIES[library]["sections"]
        }
    return pages


def render(text: str, tables: Mapping[str, str]) -> str:
    """A page with its tables as they should be, between the comments that name them."""
    for name, table in tables.items():
        text, found = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}\n{t}\n\n{m[2]}", text, flags=re.S
        )
        if found != 1:
            raise ValueError(f"the page has {found} places for the table {name}")
    return text


if __name__ == "__main__":
    for page, found in tables().items():
        path = FOLDER / page
        path.write_text(render(path.read_text(encoding="utf-8"), found), encoding="utf-8")
