"""The formats of preference data. :func:`recognise` takes the first that matches, so special ones come before general.

What a user names as ``module:function`` becomes a format too.
"""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tdpo.config.row_spec import AUTO, RowSpec
from tdpo.data.formats import answers, pairs
from tdpo.data.formats.pairs import PAIR
from tdpo.data.formats.prompts import CHAT_OPTIONS, CHAT_USES, PROMPT_USES, TURNS
from tdpo.data.formats.report import DataReport, RowError
from tdpo.data.sources import SourceRow, describe
from tdpo.errors import UserError, nearest
from tdpo.types import WEIGHTS, PreferenceRecord

PAIRING_OPTIONS = ("pairs_from", "min_margin")


@dataclass(frozen=True)
class Format:
    """One shape of data.

    Attributes:
        columns: Its columns in words, for messages.
        convert: Converts one row to records, or to the input of ``join`` where that is set; raises :class:`RowError` or
            :class:`RowDropped`.
        uses: Columns that the format reads: a tuple lists alternatives, of which the first that is there is read, and
            ``a+b`` means both. Columns not listed are compared with these (:mod:`tdpo.data.formats.columns`), unless
            none are.
        needs: Columns that a row must have.
        lacks: Columns that a row must not have.
        matches: Further test of a row that passed ``needs`` and ``lacks``; None for no test.
        options: The fields of :class:`~tdpo.config.row_spec.RowSpec` for single formats that this format has.
        join: Makes records of what all rows of the dataset were converted to, where several rows make a pair.
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
        """Returns whether a row with these fields has this format."""
        if any(name not in fields for name in self.needs) or any(name in fields for name in self.lacks):
            return False
        return self.matches is None or self.matches(fields)


FORMATS: dict[str, Format] = {
    "preference": Format(
        "prompt, chosen, rejected: texts or lists of chat messages", pairs.preference, uses=(*PROMPT_USES, *PAIR),
        needs=PAIR, matches=pairs.has_explicit_prompt,
    ),
    "swift": Format(
        "messages, or query and response, with rejected_response or rejected_messages", pairs.swift,
        uses=(
            ("messages", "query+history+response", "instruction+input+history+response", "prompt+response",
             "question+response"),
            ("rejected_response", "rejected_messages"), *CHAT_USES,
        ),
        lacks=("chosen",), matches=pairs.has_rejected,
    ),
    "openai": Format(
        "input with messages, preferred_output, non_preferred_output", pairs.openai, uses=("input", *pairs.OUTPUTS),
        needs=("input", *pairs.OUTPUTS),
    ),
    "sharegpt": Format(
        "conversations, chosen, rejected: ShareGPT turns", pairs.sharegpt, uses=(TURNS, *PAIR, *CHAT_USES),
        needs=PAIR, lacks=("prompt",), matches=pairs.has_turns,
    ),
    "alpaca": Format(
        "instruction with chosen, rejected or output", pairs.alpaca,
        uses=("instruction", "input", "history", ("chosen+rejected", "output"), *CHAT_USES),
        needs=("instruction",), matches=pairs.has_outputs,
    ),
    "hh": Format(
        "chosen, rejected: whole dialogues with Human: and Assistant: turns", pairs.hh, uses=PAIR,
        needs=PAIR, lacks=("prompt",), matches=pairs.has_dialogues,
    ),
    "implicit": Format(
        "chosen, rejected: texts or lists of chat messages that begin with the prompt", pairs.implicit,
        uses=(*PAIR, *CHAT_USES), needs=PAIR, lacks=("prompt",),
        matches=lambda fields: all(isinstance(fields[name], str | list) for name in PAIR),
    ),
    "shp": Format(
        "history, human_ref_A, human_ref_B, score_A, score_B", answers.shp, uses=(*answers.SHP_COLUMNS, "labels"),
        needs=answers.SHP_COLUMNS, options=("min_score_ratio",),
    ),
    "stackexchange": Format(
        "question, answers: posts in HTML with pm_score", answers.stackexchange, uses=("question", "answers"),
        needs=("question", "answers"), matches=answers.has_posts, options=PAIRING_OPTIONS,
    ),
    **{
        name: Format(
            columns, partial(answers.listed, names=names),
            uses=(*PROMPT_USES, answers.LISTS, answers.BESIDE[names]),
            matches=partial(answers.has_list, names=names), options=PAIRING_OPTIONS,
        )
        for name, columns, names in (
            ("answers", "prompt, completions: answers with scores", answers.SCORES),
            ("ranked", "prompt, responses: answers with ranks", answers.RANKS),
        )
    },
    "labelled": Format(
        "prompt, response_0, response_1 and the better one by better_response_id, preference, winner or two ratings",
        pairs.labelled, uses=pairs.LABELLED_USES, matches=pairs.has_labelled_pair,
    ),
    "scored": Format(
        "prompt, completion, reward: one completion a row", answers.completion,
        uses=(*PROMPT_USES, *answers.COMPLETION_COLUMNS), matches=answers.has_completion, options=PAIRING_OPTIONS,
        join=answers.completion_pairs,
    ),
}  # fmt: skip


def find_format(name: str, formats: Mapping[str, Format]) -> Format:
    """Returns a format by its name, or makes one of a user's ``module:function``; ``"auto"`` is for the caller.

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

    A null counts as a missing column, since tables fill missing values with null. So that a damaged row is an error of
    its own format, these are kept in spite of it: chosen and rejected if one of them has a value, prompt beside such
    texts unless they are dialogues, and instruction if input has a value.
    """
    kept = {"instruction"} if fields.get("input") is not None else set()
    pair = {name: fields.get(name) for name in PAIR}
    if any(value is not None for value in pair.values()):
        kept |= {*PAIR}
        lists = all(isinstance(value, list) for value in pair.values())
        if fields.get("prompt") is None and not (lists or pairs.has_dialogues(pair)):
            kept.add("prompt")
    fields = {name: value for name, value in fields.items() if value is not None or name in kept}
    return next((name for name, known in formats.items() if known.recognises(fields)), None)


def with_weights(records: Sequence[Any], row: SourceRow) -> Sequence[Any]:
    """Adds the token weights in a row's columns to the pair that it holds."""
    weights = {name: row.fields[name] for name in WEIGHTS if row.fields.get(name) is not None}
    if not weights or not all(isinstance(record, PreferenceRecord) and record.rejected for record in records):
        return records
    if len(records) != 1:
        raise RowError(f"{next(iter(weights))!r} needs one pair per row, and this row gives {len(records)}")
    return [replace(records[0], weights=weights)]


def _format_of_function(name: str, formats: Mapping[str, Format]) -> Format:
    """Makes a format of a user's function, which may be in the current folder.

    It is called with a row's columns and returns None, a :class:`~tdpo.types.PreferenceRecord`, an object in any format
    without ``join``, or several of these.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = pkgutil.resolve_name(name)
    except Exception as error:  # importing a user's module can raise anything
        raise UserError(f"--dataset_format {name}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise UserError(f"--dataset_format {name}: {describe(function)} is not a function")
    single_row_formats = {key: known for key, known in formats.items() if known.join is None}
    wanted = f"{name} must return a row of a known format, such as an object with prompt, chosen and rejected, found"

    def convert(row: SourceRow, spec: RowSpec) -> list[Any]:
        """Converts all that the function returns for a row."""
        try:
            returned = function(dict(row.fields))
            several = isinstance(returned, list | tuple | Iterator)
            items = list(returned) if several else [] if returned is None else [returned]
        except Exception as error:  # a user's function can raise anything; the caller adds the row's location
            raise RowError(f"{name} raised {type(error).__name__}: {error}") from error
        records: list[Any] = []
        for item in items:
            fields = item
            if isinstance(item, PreferenceRecord):
                columns = ("prompt", *PAIR, *CHAT_OPTIONS)
                fields = {key: value for key in columns if (value := getattr(item, key)) is not None}
                fields |= item.weights or {}
            if not isinstance(fields, dict):
                raise RowError(f"{wanted} {describe(fields)}")
            found = recognise(fields, single_row_formats)
            if found is None:
                raise RowError(f"{wanted} the fields {', '.join(map(repr, fields)) or 'none'}")
            made = replace(row, fields=fields)
            mode = getattr(item, "truncation_mode", None)
            converted = with_weights(single_row_formats[found].convert(made, spec), made)
            records += [replace(record, truncation_mode=mode) for record in converted]
        return records

    return Format("the columns that your function reads", convert, options=(*PAIRING_OPTIONS, "min_score_ratio"))
