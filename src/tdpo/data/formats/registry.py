"""The only list of formats: a line each. Recognition tries them in this order."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tdpo.data.formats import answers, labelled, preference, turns
from tdpo.data.formats.report import DataReport, RowError
from tdpo.data.row_spec import RowSpec
from tdpo.data.sources import SourceRow, describe
from tdpo.errors import UserError, nearest
from tdpo.types import PreferenceRecord

AUTO = "auto"


@dataclass(frozen=True)
class Format:
    """One shape of data.

    Attributes:
        columns: Its columns in words, for messages.
        recognises: Whether a row of these columns is of this format.
        convert: What a row gives; raises :class:`RowError` or :class:`RowDropped`. Records, unless there is a ``join``.
        options: Names of the fields of :class:`~tdpo.data.row_spec.RowSpec` that it looks at, of those that belong to
            single formats.
        join: Makes records of what all rows gave, where rows belong together.
        uses: Columns that it reads: of a tuple the first that is there, and ``a+b`` are read together. All others are
            compared with them (see :mod:`tdpo.data.formats.columns`); nothing is where this is empty.
    """

    columns: str
    recognises: Callable[[dict[str, Any]], bool]
    convert: Callable[[SourceRow, RowSpec], Sequence[Any]]
    options: tuple[str, ...] = ()
    join: Callable[[Sequence[Any], RowSpec, DataReport], Iterable[Any]] | None = None
    uses: tuple[str | tuple[str, ...], ...] = ()


PAIRING = ("pairs_from", "min_margin")
FORMATS: dict[str, Format] = {
    "preference": Format(
        "prompt, chosen, rejected: texts or lists of chat messages",
        preference.has_explicit_prompt,
        preference.preference,
        uses=preference.PREFERENCE_USES,
    ),
    "swift": Format(
        "messages with rejected_response or rejected_messages; query, response, rejected_response",
        turns.has_rejected,
        turns.swift,
        uses=turns.SWIFT_USES,
    ),
    "openai": Format(
        "input with messages, preferred_output, non_preferred_output", turns.has_outputs, turns.openai,
        uses=turns.OPENAI_USES,
    ),
    "sharegpt": Format(
        "conversations, chosen, rejected: ShareGPT turns", turns.has_turns, turns.sharegpt, uses=turns.SHAREGPT_USES
    ),
    "alpaca": Format(
        "instruction with chosen, rejected or output", turns.has_instruction, turns.alpaca, uses=turns.ALPACA_USES
    ),
    "hh": Format(
        "chosen, rejected: whole dialogues with Human: and Assistant: turns", preference.has_dialogues, preference.hh,
        uses=("chosen", "rejected"),
    ),
    "implicit": Format(
        "chosen, rejected: texts or lists of chat messages that begin with the prompt",
        preference.has_implicit_prompt,
        preference.implicit,
        uses=preference.IMPLICIT_USES,
    ),
    "shp": Format(
        "history, human_ref_A, human_ref_B, score_A, score_B", answers.has_comments, answers.shp, ("min_score_ratio",),
        uses=answers.SHP_USES,
    ),
    "stackexchange": Format(
        "question, answers: posts in HTML with pm_score", answers.has_posts, answers.stackexchange, PAIRING,
        uses=("question", "answers"),
    ),
    "answers": Format(
        "prompt, completions: answers with scores", answers.has_scored_list, answers.answers, PAIRING,
        uses=answers.ANSWERS_USES,
    ),
    "ranked": Format(
        "prompt, responses: answers with ranks", answers.has_ranked_list, answers.ranked, PAIRING,
        uses=answers.RANKED_USES,
    ),
    "labelled": Format(
        "prompt, response_0, response_1 and which is better: better_response_id, preference, winner, two ratings",
        labelled.has_labelled_pair, labelled.labelled, uses=labelled.LABELLED_USES,
    ),
    "scored": Format(
        "prompt, completion, reward: one a row", answers.has_completion, answers.completion, PAIRING,
        answers.completion_pairs, answers.COMPLETION_USES,
    ),
}  # fmt: skip


def find_format(name: str, formats: Mapping[str, Format]) -> Format:
    """The format of a name, or of ``module:function``.

    Raises:
        UserError: naming the nearest one, or why the function cannot be had.
    """
    if name in formats:
        return formats[name]
    if ":" in name:
        return _format_of_function(name, formats)
    raise UserError(
        f"unknown dataset format {name!r}; there are: {AUTO}, {', '.join(formats)}, and module:function."
        f"{nearest(name, formats)}"
    )


def recognise(fields: dict[str, Any], formats: Mapping[str, Format]) -> str | None:
    """Names the format whose columns a row has, or None. Null is as if missing, because tables have it for that."""
    fields = _without_nulls(fields)
    return next((name for name, known in formats.items() if known.recognises(fields)), None)


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    """Leaves out columns that are null, except those of a pair where it lacks only one of them."""
    kept = {"instruction"} if fields.get("input") is not None else set()
    pair = {name: fields.get(name) for name in ("chosen", "rejected")}
    if any(value is not None for value in pair.values()):
        hold_prompt = all(isinstance(value, list) for value in pair.values()) or preference.has_dialogues(pair)
        kept |= {*pair} if hold_prompt else {*pair, "prompt"}
    return {name: value for name, value in fields.items() if value is not None or name in kept}


def _format_of_function(name: str, formats: Mapping[str, Format]) -> Format:
    """Makes a format of a user's function, which returns rows of other formats."""
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except AttributeError as error:
        raise UserError(f"--dataset_format {name}: module {module_name} has no {function_name}") from error
    except Exception as error:  # whatever the user's module does when it is imported
        raise UserError(f"--dataset_format {name}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise UserError(f"--dataset_format {name}: {describe(function)} is no function")

    def convert(row: SourceRow, reading: RowSpec) -> list[Any]:
        try:
            made = function(dict(row.fields))
            many = list(made) if isinstance(made, list | tuple | Iterator) else [] if made is None else [made]
        except Exception as error:  # a user's function, called with one row: the row is what they have to look at
            raise RowError(f"{name} raised {type(error).__name__}: {error}") from error
        return [record for one in many for record in _records_of(one, row, reading, name, formats)]

    return Format("what the function takes", lambda fields: True, convert, (*PAIRING, "min_score_ratio"))


def _records_of(made: Any, row: SourceRow, reading: RowSpec, name: str, formats: Mapping[str, Format]) -> Sequence[Any]:
    """What a user's function returned, as records: it may be a row of any other format that stands alone."""
    if isinstance(made, PreferenceRecord):
        made = {field: getattr(made, field) for field in ("prompt", "chosen", "rejected", *_options_of(made))}
    if not isinstance(made, dict):
        raise RowError(f"{name} must return an object with prompt, chosen and rejected, found {describe(made)}")
    alone = {key: known for key, known in formats.items() if known.join is None}
    found = recognise(made, alone)
    if found is None:
        columns = ", ".join(map(repr, made)) or "none"
        raise RowError(f"{name} must return an object with prompt, chosen and rejected, found the fields {columns}")
    return alone[found].convert(SourceRow(row.source, row.row, made), reading)


def _options_of(record: PreferenceRecord) -> list[str]:
    return [name for name in ("tools", "chat_template_kwargs") if getattr(record, name) is not None]
