"""Columns that a format does not use: known metadata, contents that a used column repeats, and what would be lost."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from tdpo.data.formats.answers import ANSWER_KEYS, LISTS
from tdpo.data.formats.fields import CHAT_AS_TEXT, first_of, parsed_chat
from tdpo.data.formats.preference import common_prefix
from tdpo.data.formats.prompts import PROMPTS, SYSTEMS, holds_turns
from tdpo.data.formats.report import REASONS_KEPT, DataReport
from tdpo.data.sources import SourceRow
from tdpo.errors import UserError

Uses = Sequence[str | tuple[str, ...]]
METADATA = re.compile(
    "q?ids?|idx|index|uuid|guid|hash|sha256|md5|scores?|ratings?|rewards?|ranks?|ranking|margin|confidence|log_?probs?|"
    "logps|models?|engine|generator|annotators?|worker|author|judge|date|time|tstamp|timestamp|created|updated|modified|"
    "languages?|lang|locale|country|license|ur[li]s?|link|version|split|subset|datasets?|sources?|origin|provenance|"
    "category|categories|domain|topics?|tags?|labels?|type|difficulty|level|status|name|seed|temperature|counts?|"
    "lengths?|num|tokens|metadata|meta|winner|preference|choice|unnamed"
)
"""Last words of the names of columns that describe a row and are no part of its texts."""
SIDES = re.compile("[ab01234]|chosen|rejected|better|worse|safer|preferred|utc")
"""Words that tell such columns of two responses apart, before or behind."""
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
"""Words in the names of columns that hold what was said to or by those who compared the responses."""
SCALARS = (type(None), bool, int, float)
MEDIA = ("image", "video", "audio")
ANSWERS = re.compile(r"(chosen|rejected|response|completion|answer|generation|output|candidate|preferred)")
UNSAID = ("role", "from", "type")
"""Keys of messages whose values are no text."""
MODEL = "model"
"""Key of an answer in a list, for the name of who wrote it."""


class UnusedColumns:
    """Finds columns of a source whose contents no record has.

    Args:
        name: Name of the format.
        uses: The columns that the format declares; of a tuple the first that is there, ``a+b`` are used together.
        report: Where columns are named that hold text and are left out.
    """

    def __init__(self, name: str, uses: Uses, report: DataReport) -> None:
        self.name, self.report = name, report
        self._always = {use for use in uses if isinstance(use, str)}
        self._groups = [[alternative.split("+") for alternative in use] for use in uses if not isinstance(use, str)]
        self._named: set[str] = set()

    def check_head(self, head: Sequence[SourceRow]) -> None:
        """Looks at every column of the first rows.

        Raises:
            UserError: naming all columns among them that may be the prompt, each with its first row.
        """
        stopping: dict[str, SourceRow] = {}
        for row in head:
            self._notice_keys(row)
            for column in self._stopping(row, row.fields):
                stopping.setdefault(column, row)
        if stopping:
            raise UserError(self._message(stopping))

    def check(self, row: SourceRow) -> None:
        """Looks at the columns of a later row that were empty so far, or are not known as metadata.

        Raises:
            UserError: naming a column that may be the prompt.
        """
        values = [(name, value) for name, value in row.fields.items() if not isinstance(value, SCALARS)]
        suspects = [(name, value) for name, value in values if not self._settled(name)]
        used = [row.fields.get(name) for name in self._used(row.fields)] if suspects else []
        stopping = self._stopping(row, [name for name, value in suspects if value not in used])
        if stopping:
            raise UserError(self._message(dict.fromkeys(stopping, row)))

    def _notice_keys(self, row: SourceRow) -> None:
        """Reports keys of listed answers that hold text and are not used, such as a critique, once for each."""
        lists = [name for name in LISTS if name in self._used(row.fields) and isinstance(row.fields.get(name), list)]
        for column in lists:
            answers = [answer for answer in row.fields[column] if isinstance(answer, dict) and not _is_turns(answer)]
            for key, value in (item for answer in answers for item in answer.items()):
                place = f"{column}.{key}"
                known = key in ANSWER_KEYS or place in self._named or is_metadata(key)
                if not known and has_content(key, value):
                    self._named.add(place)
                    self.report.notice(row, f"{key!r} of the answers in {column!r} is text that is not used, first")

    def _settled(self, name: str) -> bool:
        return name in self._always or name in self._named or is_metadata(name)

    def _stopping(self, row: SourceRow, names: Iterable[str]) -> list[str]:
        """Names columns that must not be left out, and reports those that are."""
        used = self._used(row.fields)
        left = [name for name in names if not (name in used or name in self._named)]
        left = [name for name in left if has_content(name, row.fields[name])]
        left = [name for name in left if not (is_metadata(name) and is_descriptive(row.fields[name]))]
        if not left:
            return []
        contents = _Contents(row.fields, used)
        stopping = []
        for name in left:
            value = row.fields[name]
            if may_be_prompt(name, value) or self._guesses(row.fields):
                if holds_media(name, value) or not contents.of_prompt(value):
                    stopping.append(name)
            elif not contents.anywhere(value):
                shown = f"{name} ({row.source})" if row.source != self.report.source else name
                shown = shown if len(self.report.unused) < REASONS_KEPT else "other columns"
                self.report.unused.setdefault(shown, row.row)
                self._named.add(name)
        return stopping

    def _used(self, fields: dict[str, Any]) -> set[str]:
        used = set(self._always)
        for group in self._groups:
            there = [names for names in group if fields.get(names[0]) is not None]
            used.update(there[0] if there else ())
        return used

    def _guesses(self, fields: dict[str, Any]) -> bool:
        """Returns whether the prompt is guessed from texts; any column beside them may be the real one."""
        return self.name == "implicit" and isinstance(fields.get("chosen"), str)

    def _message(self, stopping: dict[str, SourceRow]) -> str:
        media = [name for name, row in stopping.items() if holds_media(name, row.fields[name])]
        names = media or list(stopping)
        first = stopping[names[0]]
        listed = ", ".join(f"{name!r}" + (f" (row {stopping[name].row})" if len(names) > 1 else "") for name in names)
        columns, hold = ("columns", "hold") if len(names) > 1 else ("column", "holds")
        where = f"{first.source}, row {first.row}: the {columns} {listed} {hold}"
        ignored = f"--ignore_columns {','.join(names)}"
        function = "--dataset_format module:function converts rows in any other way"
        if media:
            return (
                f"{where} images, video or audio, and training is on text alone; {ignored} trains on the texts without "
                f"them, {function}"
            )
        name, them = names[0], "them" if names[1:] else "it"
        field = "input" if self.name == "alpaca" and not first.fields.get("input") else "prompt"
        instead = " instead" if first.fields.get(field) else ""
        return (
            f"{where} what the format {self.name} does not use, and it may be the prompt or a part of it; --columns "
            f"{field}={name} takes {name!r} as the {field}{instead}, {ignored} leaves {them} out, {function}"
        )


class SystemColumn:
    """Makes all rows of a source chats, or all texts, whichever of them have a system prompt.

    Args:
        head: The first rows.
    """

    def __init__(self, head: Sequence[SourceRow]) -> None:
        self.chats = any(row.fields.get(name) is not None for row in head for name in SYSTEMS)
        self._count = len(head)

    def fill(self, row: SourceRow) -> SourceRow:
        """Returns the row, with an empty system prompt if it has none and other rows have.

        Raises:
            UserError: if a row has one and the first rows, which had none, were read as texts.
        """
        if self.chats:
            filled = any(map(row.fields.get, SYSTEMS))
            return row if filled else replace(row, fields={**row.fields, SYSTEMS[0]: ""})
        if any(map(row.fields.get, SYSTEMS)) and self._is_text(row.fields):
            name = next(name for name in SYSTEMS if row.fields.get(name))
            raise UserError(
                f"{row.source}, row {row.row}: field {name!r} holds a system prompt, and none of the first "
                f"{self._count} rows does, which were read as plain texts; give {name!r} there too (an empty text will "
                f"do), or leave it out with --ignore_columns {name}"
            )
        return row

    def _is_text(self, fields: dict[str, Any]) -> bool:
        """Returns whether the prompt would be a plain text without the system prompt."""
        name = first_of(fields, ("prompt", "instruction", *PROMPTS))
        value = fields.get(name)
        return name == "prompt" and isinstance(value, str) and not CHAT_AS_TEXT.match(value)


class _Contents:
    """Holds all texts of the columns of a row that are used.

    Args:
        fields: The row.
        used: Names of the columns.
    """

    def __init__(self, fields: dict[str, Any], used: set[str]) -> None:
        self._answers = [text for name in used if _is_answer(name) for text in texts_in(fields.get(name))]
        self._prompts = [text for name in used if not _is_answer(name) for text in texts_in(fields.get(name))]
        self._all = {text.strip() for text in (*self._answers, *self._prompts)}
        pair = [fields.get(name) for name in ("chosen", "rejected")]
        if all(isinstance(text, str) and not CHAT_AS_TEXT.match(text) for text in pair):
            self._prompts.append(pair[0][: common_prefix(*pair)])  # type: ignore[index, arg-type]

    def of_prompt(self, value: Any) -> bool:
        """Returns whether each text of a value is a text of the row, or a part of its prompt."""
        return all(text.strip() in self._all or _within(text, self._prompts) for text in texts_in(value))

    def anywhere(self, value: Any) -> bool:
        """Returns whether each text of a value is a part of some text of the row."""
        return self.of_prompt(value) or all(
            _within(text, self._prompts) or _within(text, self._answers) for text in texts_in(value)
        )


@functools.lru_cache(1 << 14)
def is_metadata(name: str) -> bool:
    """Returns whether a name is known to be that of metadata.

    Example:
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
    while len(words) > 1 and SIDES.fullmatch(words[0]):
        words.pop(0)
    return METADATA.fullmatch(words[-1]) is not None


def may_be_prompt(name: str, value: Any) -> bool:
    """Returns whether a column may be the prompt or its context, by its name or because it holds turns or images."""
    if CONTEXT.fullmatch(_plain_name(name)) or holds_media(name, value):
        return True
    annotation = any(map(ANNOTATION.fullmatch, _words(name)))
    return not annotation and any(map(_is_turns, parts_in(value)))


def holds_media(name: str, value: Any) -> bool:
    """Returns whether a column holds images, video or audio, or references to them."""
    return _plain_name(name) in MEDIA or any(_is_binary(part) for part in parts_in(value))


def has_content(name: str, value: Any) -> bool:
    """Returns whether a column holds text or an image; in one named after images or sounds anything is one."""
    if _plain_name(name) in MEDIA and any(
        part is not None and not isinstance(part, list | dict) for part in parts_in(value)
    ):
        return value != ""
    return any(_is_binary(part) or (isinstance(part, str) and bool(part.strip())) for part in parts_in(value))


def is_descriptive(value: Any) -> bool:
    """Returns whether a value is as short as metadata is, and no chat or image."""
    return all(
        not _is_turns(part) and not _is_binary(part) and not (isinstance(part, str) and len(part) > DESCRIPTIVE)
        for part in parts_in(value)
    )


def texts_in(value: Any) -> Iterator[str]:
    """Yields the texts in a value that are not white space, without roles of messages; of JSON of a chat its texts."""
    return (part for part in parts_in(value) if isinstance(part, str) and part.strip())


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


def _is_turns(part: Any) -> bool:
    return holds_turns(part) or (isinstance(part, dict) and holds_turns([part]))


def _is_binary(part: Any) -> bool:
    """Returns whether this is what an image is decoded to, or its bytes."""
    return bool(part) if isinstance(part, bytes) else hasattr(part, "mode") and hasattr(part, "size")


@functools.lru_cache(1 << 14)
def _is_answer(name: str) -> bool:
    return ANSWERS.search(name) is not None


def _words(name: object) -> list[str]:
    words = re.split(r"[^a-zA-Z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(name)).lower())
    return [word for word in words if word]


def _plain_name(name: object) -> str:
    plain = re.sub(r"[^a-z0-9]", "", str(name).lower())
    return plain.removesuffix("s") or plain


def _within(text: str, others: Sequence[str]) -> bool:
    text = text.strip()
    return any(text in other for other in others)
