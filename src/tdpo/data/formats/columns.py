"""Finds columns that a format does not use: metadata, repeated texts, and texts that would be lost."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tdpo.data.formats.answers import ANSWER_KEYS, LISTS
from tdpo.data.formats.fields import CHAT_AS_TEXT, parsed_chat
from tdpo.data.formats.pairs import common_prefix
from tdpo.data.formats.prompts import holds_turns
from tdpo.data.formats.report import REASONS_KEPT, DataReport
from tdpo.data.sources import SourceRow
from tdpo.errors import UserError

METADATA = re.compile(
    "q?ids?|idx|index|uuid|guid|hash|sha256|md5|scores?|ratings?|rewards?|ranks?|ranking|margin|confidence|log_?probs?|"
    "logps|models?|engine|generator|annotators?|worker|author|judge|date|time|tstamp|timestamp|created|updated|modified|"
    "languages?|lang|locale|country|license|ur[li]s?|link|version|split|subset|datasets?|sources?|origin|provenance|"
    "category|categories|domain|topics?|tags?|labels?|type|difficulty|level|status|name|seed|temperature|counts?|"
    "lengths?|num|tokens|metadata|meta|winner|preference|choice|unnamed"
)
"""Last words of the names of columns that describe a row and are not a part of its texts."""
SIDES = re.compile("[ab01234]|chosen|rejected|better|worse|safer|preferred|utc")
"""Words at the end of such names that distinguish the columns of two responses."""
DESCRIPTIVE = 200
"""Longest text that can be metadata; a name such as ``source`` may also be that of an article."""
CONTEXT = re.compile(
    "(user|system)?(prompt|input|query|message|instruction)|system|user|question|context|(chat)?history|document|passage|"
    "article|post|problem|trajectory|conversation|dialog(ue)?|chat|turn|tool|chattemplatekwarg|image|video|audio"
)
"""Names of columns that may be the prompt or its context, without underscores and a plural's s."""
ANNOTATION = re.compile(
    "label(l?ing|l?er)|judge?(ment)?|annotat(ion|or)|critique|critic|feedback|grad(er|ing)|evaluat(ion|or)"
)
"""Words in the names of columns that hold instructions to annotators, or their words."""
MEDIA = ("image", "video", "audio")
ANSWERS = re.compile(r"(chosen|rejected|response|completion|answer|generation|output|candidate|preferred)")
UNSAID = ("role", "from", "type")
"""Keys of messages whose values are not text."""
MODEL = "model"
"""Key of an answer in a list, for the model that wrote it."""


@dataclass
class UnusedColumns:
    """Finds columns of a source that no record uses.

    Attributes:
        name: Name of the format.
        uses: The columns that the format declares; of a tuple the first that is there, ``a+b`` are used together.
        report: Names columns that hold text and are left out.
        named: Columns that it names already, and keys of answers.
    """

    name: str
    uses: Sequence[str | tuple[str, ...]]
    report: DataReport
    named: set[str] = field(default_factory=set)

    def check(self, rows: Iterable[SourceRow], answers: bool = False) -> None:
        """Checks the columns of rows, and if asked to the keys of the answers that they list.

        Raises:
            UserError: naming all columns among them that may be the prompt, each with its first row.
        """
        stopping: dict[str, tuple[SourceRow, str]] = {}
        for row in rows:
            used = {use for use in self.uses if isinstance(use, str)}
            for uses in (use for use in self.uses if not isinstance(use, str)):
                there = next((names for names in uses if row.fields.get(names.partition("+")[0]) is not None), "")
                used.update(there.split("+") if there else ())
            for name, value in row.fields.items():
                if answers and name in LISTS and name in used and isinstance(value, list):
                    self._check_answers(row, name, value)
                if value is None or name in used or name in self.named or (is_metadata(name) and _is_short(value)):
                    continue
                if isinstance(value, str | list) and value in map(row.fields.get, used):  # as in ultrafeedback
                    continue
                kind = self._lost(row, used, name, value)
                if kind == "text":
                    shown = f"{name} ({row.source})" if row.source != self.report.source else name
                    shown = shown if len(self.report.unused) < REASONS_KEPT else "other columns"
                    self.report.unused.setdefault(shown, row.row)
                    self.named.add(name)
                elif kind:
                    stopping.setdefault(name, (row, kind))
        if stopping:
            raise UserError(self._message(stopping))

    def _check_answers(self, row: SourceRow, column: str, answers: list[Any]) -> None:
        """Reports keys of listed answers that hold text and are not used, such as a critique, once for each."""
        objects = [answer for answer in answers if isinstance(answer, dict) and not holds_turns([answer])]
        for key, value in (item for answer in objects for item in answer.items()):
            known = key in ANSWER_KEYS or is_metadata(key) or f"{column}.{key}" in self.named
            if not known and any(_is_binary(part) or _is_said(part) for part in parts_in(value)):
                self.named.add(f"{column}.{key}")
                self.report.notice(row, f"{key!r} of the answers in {column!r} is text that is not used, first")

    def _lost(self, row: SourceRow, used: set[str], name: str, value: Any) -> str:
        """Returns what would be lost without a column: ``"media"``, a ``"prompt"``, another ``"text"``, or nothing."""
        parts = list(parts_in(value))
        texts = [part.strip() for part in parts if _is_said(part)]
        plain_name = re.sub(r"[^a-z0-9]", "", str(name).lower()).removesuffix("s")
        if any(map(_is_binary, parts)) or (plain_name in MEDIA and value != "" and any(map(_is_single, parts))):
            return "media"
        turns = any(holds_turns(part if isinstance(part, list) else [part]) for part in parts)
        if not texts or (is_metadata(name) and not turns and all(map(_is_short, texts))):
            return ""
        annotation = any(map(ANNOTATION.fullmatch, _words(name)))
        # The prompt of the format implicit is guessed from texts, and any column beside them may be the real one.
        guessed = self.name == "implicit" and isinstance(row.fields.get("chosen"), str)
        prompts, answers = _texts_of(row.fields, used)
        if guessed or CONTEXT.fullmatch(plain_name) or (turns and not annotation):
            whole = {text.strip() for text in (*prompts, *answers)}
            repeated = all(text in whole or any(text in prompt for prompt in prompts) for text in texts)
            return "" if repeated else "prompt"
        return "" if all(any(text in other for other in (*prompts, *answers)) for text in texts) else "text"

    def _message(self, stopping: dict[str, tuple[SourceRow, str]]) -> str:
        media = [name for name, (_, kind) in stopping.items() if kind == "media"]
        names = media or list(stopping)
        name, (first, _) = names[0], stopping[names[0]]
        where, holds, them = f"the column {name!r}", "holds", "it"
        if len(names) > 1:
            where = "the columns " + ", ".join(f"{name!r} (row {stopping[name][0].row})" for name in names)
            holds, them = "hold", "them"
        where = f"{first.location}: {where} {holds}"
        ignored = f"--ignore_columns {','.join(names)}"
        function = "--dataset_format module:function converts rows in any other way"
        if media:
            return (
                f"{where} images, video or audio, and training is on text alone; {ignored} trains on the texts without "
                f"them, {function}"
            )
        field_name = "input" if self.name == "alpaca" and not first.fields.get("input") else "prompt"
        instead = " instead" if first.fields.get(field_name) else ""
        return (
            f"{where} what the format {self.name} does not use, and it may be the prompt or a part of it; --columns "
            f"{field_name}={name} takes {name!r} as the {field_name}{instead}, {ignored} leaves {them} out, {function}"
        )


@functools.lru_cache(1 << 14)
def is_metadata(name: str) -> bool:
    """Returns whether a name is known to be that of metadata.

    Examples:
        >>> [is_metadata(name) for name in ("prompt_id", "score_chosen", "chosen-model", "c_root_id_A", "num_turns")]
        [True, True, True, True, True]
        >>> [is_metadata(name) for name in ("prompt", "source_text", "notes", "model_response")]
        [False, False, False, False]
    """
    if not str(name).strip():  # the index of a table
        return True
    words = _words(name) or [""]
    if words[0] in ("num", "n", "is", "has") and len(words) > 1:
        return True
    while len(words) > 1 and SIDES.fullmatch(words[-1]):
        words.pop()
    return METADATA.fullmatch(words[-1]) is not None


def texts_in(value: Any) -> Iterator[str]:
    """Yields the texts in a value that are not white space, without roles of messages; of JSON of a chat its texts."""
    return filter(_is_said, parts_in(value))


def parts_in(value: Any) -> Iterator[Any]:
    """Yields a value and all that it holds."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str) and CHAT_AS_TEXT.match(part):
            try:
                part = parsed_chat(part)
            except (ValueError, RecursionError):
                yield [{"role": "unknown"}]  # a chat as NumPy prints it
        yield part
        if isinstance(part, dict):
            said = holds_turns([part])
            waiting += [inner for key, inner in part.items() if key != MODEL and not (said and key in UNSAID)]
        elif isinstance(part, list | tuple):
            waiting += part


def _is_short(value: Any) -> bool:
    """Returns whether a value is a number, a text as short as metadata is and no chat, or a list of these."""
    return all(
        len(part) <= DESCRIPTIVE and not CHAT_AS_TEXT.match(part)
        if isinstance(part, str)
        else isinstance(part, float | int)
        for part in (value if isinstance(value, list) else [value])
    )


def _is_said(part: Any) -> bool:
    return isinstance(part, str) and bool(part.strip())


def _is_single(part: Any) -> bool:
    return part is not None and not isinstance(part, list | dict)


def _is_binary(part: Any) -> bool:
    """Returns whether this is what an image is decoded to, or its bytes."""
    return bool(part) if isinstance(part, bytes) else hasattr(part, "mode") and hasattr(part, "size")


def _texts_of(fields: dict[str, Any], used: set[str]) -> tuple[list[str], list[str]]:
    """Collects the texts of the columns that are used: those of the prompt, and those of the answers."""
    prompts: list[str] = []
    answers: list[str] = []
    for name in used:
        (answers if ANSWERS.search(name) else prompts).extend(texts_in(fields.get(name)))
    pair = [fields.get(name) for name in ("chosen", "rejected")]
    if all(isinstance(text, str) and not CHAT_AS_TEXT.match(text) for text in pair):
        prompts.append(pair[0][: common_prefix(*pair)])  # type: ignore[index, arg-type]
    return prompts, answers


def _words(name: object) -> list[str]:
    words = re.split(r"[^a-zA-Z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(name)).lower())
    return [word for word in words if word]
