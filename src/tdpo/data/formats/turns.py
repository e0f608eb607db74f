"""Chats under other names: the preference data of LLaMA-Factory, ms-swift and OpenAI."""

from __future__ import annotations

from typing import Any

from tdpo.config.row_spec import RowSpec
from tdpo.data.formats.fields import (
    ASKING_ROLES,
    as_text,
    assistant_turn,
    field_of,
    first_of,
    plain_text,
    read_answer,
    read_turns,
)
from tdpo.data.formats.prompts import TURNS, has_prompt, instruction_messages, pair_record, prompt_of, turns_column
from tdpo.data.formats.report import RowError
from tdpo.data.sources import SourceRow, describe
from tdpo.types import PreferenceRecord, Text

OPENAI_OPTIONS = ("messages", "tools", "parallel_tool_calls")


def sharegpt(row: SourceRow, spec: RowSpec) -> list[PreferenceRecord]:
    """Reads ``conversations`` of turns with ``from`` and ``value``, and a turn or a text ``chosen`` and ``rejected``.

    ``system`` and ``tools`` beside them are taken as LLaMA-Factory takes them.
    """
    name = first_of(row.fields, TURNS)
    prompt = field_of(row, name, read_turns)
    chosen, rejected = field_of(row, "chosen", read_answer), field_of(row, "rejected", read_answer)
    if prompt[-1]["role"] == "assistant" and prompt not in (chosen, rejected):
        raise RowError(f"field {name!r} ends with the assistant's turn, and chosen and rejected are to be that")
    return [pair_record(row, prompt, chosen, rejected)]


def alpaca(row: SourceRow, spec: RowSpec) -> list[PreferenceRecord]:
    """Reads ``instruction``, perhaps ``input``, ``history`` and ``system``, with ``chosen`` and ``rejected``.

    Instead of the two, ``output`` may list them, the better one first.
    """
    prompt = instruction_messages(row, "instruction")
    named = any(row.fields.get(name) is not None for name in ("chosen", "rejected"))
    chosen: Text
    rejected: Text
    if named or row.fields.get("output") is None:
        chosen, rejected = field_of(row, "chosen", as_text), field_of(row, "rejected", as_text)
    else:
        chosen, rejected = field_of(row, "output", _two_texts)
    if len(prompt) == 1 and all(isinstance(s, list) and s[0]["role"] in ASKING_ROLES for s in (chosen, rejected)):
        return [pair_record(row, prompt[0]["content"], chosen, rejected)]  # it is one of the turns they share
    return [pair_record(row, prompt, chosen, rejected)]


def swift(row: SourceRow, spec: RowSpec) -> list[PreferenceRecord]:
    """Reads ms-swift's rows: ``messages`` with ``rejected_response`` or ``rejected_messages``, or its older columns.

    These are ``query``, ``response``, ``rejected_response``, ``history`` and ``system``. All of them are chats.
    """
    name = first_of(row.fields, ("rejected_response", "rejected_messages"))
    rejected = field_of(row, name, read_answer)
    if row.fields.get("messages") is None:
        chosen = assistant_turn(field_of(row, "response", as_text))
        asked = first_of(row.fields, ("query", "instruction"))
        prompt = prompt_of(row) if row.fields.get(asked) is None else instruction_messages(row, asked)
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return [pair_record(row, prompt, chosen, rejected)]
    messages = field_of(row, "messages", read_turns)
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise RowError(f"field 'messages' must end with the assistant's turn, to which {name!r} is the worse one")
    if name == "rejected_messages" and rejected[0] == messages[0]:
        return [pair_record(row, None, messages, rejected)]
    return [pair_record(row, messages[:-1], messages[-1:], rejected)]


def openai(row: SourceRow, spec: RowSpec) -> list[PreferenceRecord]:
    """Reads OpenAI's preference rows: ``input`` with ``messages`` and ``tools``, two outputs as lists of messages."""
    asked = row.fields.get("input")
    if not isinstance(asked, dict):
        raise RowError(f"field 'input' must be an object with messages, found {describe(asked)}")
    for key, value in asked.items():
        if key not in OPENAI_OPTIONS and value:
            raise RowError(f"field 'input' holds {key!r}, which is not used; there are {', '.join(OPENAI_OPTIONS)}")
    inner = SourceRow(row.source, row.row, {name: asked.get(name) for name in ("messages", "tools")})
    prompt = field_of(inner, "messages", read_turns)
    outputs = ("preferred_output", "non_preferred_output")
    return [pair_record(inner, prompt, *(field_of(row, name, read_answer) for name in outputs))]


def has_turns(fields: dict[str, Any]) -> bool:
    """Returns whether turns stand beside a pair, and are not those of one of its two whole chats."""
    turns = turns_column(fields)
    if turns is not None and fields[turns] in (fields["chosen"], fields["rejected"]):
        return False
    return turns is not None or any(fields.get(name) is not None for name in ("conversations", "messages"))


def has_outputs(fields: dict[str, Any]) -> bool:
    """Returns whether an instruction has two responses."""
    pair = {"chosen", "rejected"} <= fields.keys() or isinstance(fields.get("output"), list)
    return pair and fields.get("prompt") is None


def has_rejected(fields: dict[str, Any]) -> bool:
    """Returns whether a row has ms-swift's rejected response, and a better one."""
    worse = fields.get("rejected_response") is not None or fields.get("rejected_messages") is not None
    return worse and (fields.get("messages") is not None or ("response" in fields and has_prompt(fields)))


def _two_texts(value: Any, what: str) -> list[str]:
    """Reads a list of the better and the worse response."""
    if not isinstance(value, list) or len(value) != 2:
        raise RowError(f"{what} must list two texts, the better one first, found {describe(value)}")
    return [plain_text(text, f"{what}, text {number}") for number, text in enumerate(value, 1)]
