"""The only list of formats. Recognition tries them in this order."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tdpo.config.row_spec import AUTO, RowSpec
from tdpo.data.formats import answers, labelled, preference, turns
from tdpo.data.formats.prompts import CHAT_OPTIONS, CHAT_USES, PROMPT_USES, TURNS
from tdpo.data.formats.report import DataReport, RowError
from tdpo.data.sources import SourceRow, describe
from tdpo.errors import UserError, nearest
from tdpo.types import PreferenceRecord


@dataclass(frozen=True)
class Format:
    """One shape of data.

    Attributes:
        columns: Its columns in words, for messages.
        convert: Makes records of a row, or what ``join`` takes; raises :class:`RowError` or :class:`RowDropped`.
        uses: Columns that it reads: of a tuple the first that is there, and ``a+b`` are read together. All others are
            compared with them (see :mod:`tdpo.data.formats.columns`); nothing is where this is empty.
        needs: Columns that a row of this format has.
        lacks: Columns that it does not have.
        matches: Decides about rows that have the columns.
        options: Fields of :class:`~tdpo.config.row_spec.RowSpec` that it uses, of those that belong to single formats.
        join: Makes records of what all rows gave, where rows belong together.
    """

    columns: str
    convert: Callable[[SourceRow, RowSpec], Sequence[Any]]
    uses: tuple[str | tuple[str, ...], ...] = ()
    needs: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    matches: Callable[[dict[str, Any]], bool] | None = None
    options: tuple[str, ...] = ()
    join: Callable[[Sequence[Any], RowSpec, DataReport], Iterable[Any]] | None = None

    def recognises(self, fields: dict[str, Any]) -> bool:
        """Returns whether a row of these columns is of this format."""
        if any(name not in fields for name in self.needs) or any(name in fields for name in self.lacks):
            return False
        return self.matches is None or self.matches(fields)


PAIR = ("chosen", "rejected")
PAIRING = ("pairs_from", "min_margin")
FORMATS: dict[str, Format] = {
    "preference": Format(
        "prompt, chosen, rejected: texts or lists of chat messages", preference.preference, (*PROMPT_USES, *PAIR),
        needs=PAIR, matches=preference.has_explicit_prompt,
    ),
    "swift": Format(
        "messages with rejected_response or rejected_messages; query, response, rejected_response", turns.swift,
        (
            ("messages", "query+history+response", "instruction+input+history+response", "prompt+response",
             "question+response"),
            ("rejected_response", "rejected_messages"), *CHAT_USES,
        ),
        lacks=("chosen",), matches=turns.has_rejected,
    ),
    "openai": Format(
        "input with messages, preferred_output, non_preferred_output", turns.openai,
        ("input", "preferred_output", "non_preferred_output"),
        needs=("input", "preferred_output", "non_preferred_output"),
    ),
    "sharegpt": Format(
        "conversations, chosen, rejected: ShareGPT turns", turns.sharegpt, (TURNS, *PAIR, *CHAT_USES),
        needs=PAIR, lacks=("prompt",), matches=turns.has_turns,
    ),
    "alpaca": Format(
        "instruction with chosen, rejected or output", turns.alpaca,
        ("instruction", "input", "history", ("chosen+rejected", "output"), *CHAT_USES),
        needs=("instruction",), matches=turns.has_outputs,
    ),
    "hh": Format(
        "chosen, rejected: whole dialogues with Human: and Assistant: turns", preference.hh, PAIR,
        needs=PAIR, lacks=("prompt",), matches=preference.has_dialogues,
    ),
    "implicit": Format(
        "chosen, rejected: texts or lists of chat messages that begin with the prompt", preference.implicit,
        (*PAIR, *CHAT_USES), needs=PAIR, lacks=("prompt",),
        matches=lambda fields: all(isinstance(fields[name], str | list) for name in PAIR),
    ),
    "shp": Format(
        "history, human_ref_A, human_ref_B, score_A, score_B", answers.shp, answers.SHP_USES,
        needs=answers.SHP_USES[:5], options=("min_score_ratio",),
    ),
    "stackexchange": Format(
        "question, answers: posts in HTML with pm_score", answers.stackexchange, ("question", "answers"),
        needs=("question", "answers"), matches=answers.has_posts, options=PAIRING,
    ),
    "answers": Format(
        "prompt, completions: answers with scores", partial(answers.listed, names=answers.SCORES), answers.ANSWERS_USES,
        matches=partial(answers.has_list, names=answers.SCORES), options=PAIRING,
    ),
    "ranked": Format(
        "prompt, responses: answers with ranks", partial(answers.listed, names=answers.RANKS), answers.RANKED_USES,
        matches=partial(answers.has_list, names=answers.RANKS), options=PAIRING,
    ),
    "labelled": Format(
        "prompt, response_0, response_1 and which is better: better_response_id, preference, winner, two ratings",
        labelled.labelled, labelled.LABELLED_USES, matches=labelled.has_labelled_pair,
    ),
    "scored": Format(
        "prompt, completion, reward: one a row", answers.completion, answers.COMPLETION_USES,
        matches=answers.has_completion, options=PAIRING, join=answers.completion_pairs,
    ),
}  # fmt: skip


def find_format(name: str, formats: Mapping[str, Format]) -> Format:
    """Returns the format of a name, or of ``module:function``.

    Raises:
        UserError: naming the nearest one, or the reason why there is no such function.
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
    """Names the format whose columns a row has, or None.

    Null is as if missing, because tables have it for that, except in a pair that lacks only one of its columns.
    """
    kept = {"instruction"} if fields.get("input") is not None else set()
    pair = {name: fields.get(name) for name in PAIR}
    if any(value is not None for value in pair.values()):
        kept |= {*pair}
        if fields.get("prompt") is None and not all(isinstance(value, list) for value in pair.values()):
            kept |= set() if preference.has_dialogues(pair) else {"prompt"}
    fields = {name: value for name, value in fields.items() if value is not None or name in kept}
    return next((name for name, known in formats.items() if known.recognises(fields)), None)


def _format_of_function(name: str, formats: Mapping[str, Format]) -> Format:
    """Makes a format of a user's function, which returns rows of other formats."""
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except AttributeError as error:
        raise UserError(f"--dataset_format {name}: module {module_name} has no {function_name}") from error
    except Exception as error:  # importing a user's module can raise anything
        raise UserError(f"--dataset_format {name}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise UserError(f"--dataset_format {name}: {describe(function)} is not a function")

    def convert(row: SourceRow, spec: RowSpec) -> list[Any]:
        """Converts all that the function returns for a row."""
        try:
            made = function(dict(row.fields))
            many = list(made) if isinstance(made, list | tuple | Iterator) else [] if made is None else [made]
        except Exception as error:  # a user's function, called with one row, which the message names
            raise RowError(f"{name} raised {type(error).__name__}: {error}") from error
        return [record for one in many for record in _records_of(one, row, spec, name, formats)]

    return Format("what the function takes", convert, options=(*PAIRING, "min_score_ratio"))


def _records_of(made: Any, row: SourceRow, spec: RowSpec, name: str, formats: Mapping[str, Format]) -> Sequence[Any]:
    """Converts what a user's function returned: a row of any other format that stands alone."""
    if isinstance(made, PreferenceRecord):
        options = [name for name in CHAT_OPTIONS if getattr(made, name) is not None]
        made = {field: getattr(made, field) for field in ("prompt", *PAIR, *options)}
    wanted = f"{name} must return an object with prompt, chosen and rejected, found"
    if not isinstance(made, dict):
        raise RowError(f"{wanted} {describe(made)}")
    alone = {key: known for key, known in formats.items() if known.join is None}
    found = recognise(made, alone)
    if found is None:
        raise RowError(f"{wanted} the fields {', '.join(map(repr, made)) or 'none'}")
    return alone[found].convert(SourceRow(row.source, row.row, made), spec)
