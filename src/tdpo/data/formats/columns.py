"""Finds columns that a format does not use: metadata, repeated texts, and texts that would be lost."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
SCALARS = (type(None), bool, int, float)
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
    """

    name: str
    uses: Uses
    report: DataReport
    named: set[str] = field(default_factory=set)

    def check_head(self, head: Sequence[SourceRow]) -> None:
        """Checks every column of the first rows.

        Raises:
            UserError: naming all columns among them that may be the prompt, each with its first row.
        """
        stopping: dict[str, SourceRow] = {}
        for row in head:
            used = self._used(row.fields)
            for column in (name for name in LISTS if name in used and isinstance(row.fields.get(name), list)):
                self._notice_keys(row, column)
            if not row.fields.keys() <= used:
                for name in self._stopping(row, used, row.fields):
                    stopping.setdefault(name, row)
        if stopping:
            raise UserError(self._message(stopping))

    def check(self, row: SourceRow) -> None:
        """Checks the columns of a later row that were empty so far, or are not known as metadata.

        Raises:
            UserError: naming a column that may be the prompt.
        """
        known = {name for name in row.fields if name in self.uses or name in self.named or is_metadata(name)}
        suspects = [name for name, value in row.fields.items() if name not in known and not isinstance(value, SCALARS)]
        if suspects:
            used = self._used(row.fields)
            contents = [row.fields.get(name) for name in used]
            stopping = self._stopping(row, used, [name for name in suspects if row.fields[name] not in contents])
            if stopping:
                raise UserError(self._message(dict.fromkeys(stopping, row)))

    def _used(self, fields: dict[str, Any]) -> set[str]:
        used = set()
        for use in self.uses:
            if isinstance(use, str):
                used.add(use)
                continue
            there = next((names for names in use if fields.get(names.partition("+")[0]) is not None), "")
            used.update(there.split("+") if there else ())
        return used

    def _notice_keys(self, row: SourceRow, column: str) -> None:
        """Reports keys of listed answers that hold text and are not used, such as a critique, once for each."""
        objects = [answer for answer in row.fields[column] if isinstance(answer, dict) and not _is_turns(answer)]
        for key, value in (item for answer in objects for item in answer.items()):
            name = f"{column}.{key}"
            if not (key in ANSWER_KEYS or name in self.named or is_metadata(key)) and has_content(key, value):
                self.named.add(name)
                self.report.notice(row, f"{key!r} of the answers in {column!r} is text that is not used, first")

    def _stopping(self, row: SourceRow, used: set[str], names: Iterable[str]) -> list[str]:
        """Names columns that must not be left out, and reports those that are."""
        left = {
            name: value
            for name in names
            if name not in used and name not in self.named and has_content(name, value := row.fields[name])
            if not (is_metadata(name) and is_descriptive(value))
        }
        if not left:
            return []
        prompts, answers = _texts_of(row.fields, used)
        # The prompt of the format implicit is guessed from texts, and any column beside them may be the real one.
        guessed = self.name == "implicit" and isinstance(row.fields.get("chosen"), str)
        stopping = []
        for name, value in left.items():
            texts = [text.strip() for text in texts_in(value)]
            if guessed or may_be_prompt(name, value):
                whole = {text.strip() for text in (*prompts, *answers)}
                repeated = all(text in whole or any(text in prompt for prompt in prompts) for text in texts)
                if not repeated or holds_media(name, value):
                    stopping.append(name)
            elif not all(any(text in other for other in (*prompts, *answers)) for text in texts):
                shown = f"{name} ({row.source})" if row.source != self.report.source else name
                shown = shown if len(self.report.unused) < REASONS_KEPT else "other columns"
                self.report.unused.setdefault(shown, row.row)
                self.named.add(name)
        return stopping

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
        field_name = "input" if self.name == "alpaca" and not first.fields.get("input") else "prompt"
        instead = " instead" if first.fields.get(field_name) else ""
        return (
            f"{where} what the format {self.name} does not use, and it may be the prompt or a part of it; --columns "
            f"{field_name}={name} takes {name!r} as the {field_name}{instead}, {ignored} leaves {them} out, {function}"
        )


def with_system_column(row: SourceRow, head: Sequence[SourceRow], chats: bool) -> SourceRow:
    """Returns the row, with an empty system prompt if it has none and other rows have: all of a source are chats then.

    Args:
        row: The row.
        head: The first rows of its source.
        chats: Whether one of these has a system prompt.

    Raises:
        UserError: if a row has one and the first rows, which had none, were read as texts.
    """
    filled = next((name for name in SYSTEMS if row.fields.get(name)), None)
    if chats:
        return row if filled else replace(row, fields={**row.fields, SYSTEMS[0]: ""})
    name = first_of(row.fields, ("prompt", "instruction", *PROMPTS)) if filled else ""
    value = row.fields.get(name)
    if name == "prompt" and isinstance(value, str) and not CHAT_AS_TEXT.match(value):
        raise UserError(
            f"{row.source}, row {row.row}: field {filled!r} holds a system prompt, and none of the first "
            f"{len(head)} rows does, which were read as plain texts; give {filled!r} there too (an empty text will "
            f"do), or leave it out with --ignore_columns {filled}"
        )
    return row


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
    parts = list(parts_in(value))
    if _plain_name(name) in MEDIA and any(part is not None and not isinstance(part, list | dict) for part in parts):
        return value != ""
    return any(_is_binary(part) or (isinstance(part, str) and bool(part.strip())) for part in parts)


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


def _plain_name(name: object) -> str:
    plain = re.sub(r"[^a-z0-9]", "", str(name).lower())
    return plain.removesuffix("s") or plain
