"""Chats in other words: the preference data of LLaMA-Factory, ms-swift and OpenAI."""

from __future__ import annotations

from typing import Any

from tdpo.data.formats.fields import ASKING_ROLES, as_text, field_of, first_of, is_chat, plain_text
from tdpo.data.formats.prompts import (
    CHAT_OPTIONS,
    SYSTEMS,
    TURNS,
    assistant_turn,
    has_prompt,
    holds_turns,
    instruction_messages,
    pair_record,
    prompt_of,
    read_answer,
    read_turns,
)
from tdpo.data.formats.prompts import has_turns as has_prompt_turns
from tdpo.data.formats.report import RowError
from tdpo.data.row_spec import RowSpec
from tdpo.data.sources import SourceRow, describe
from tdpo.types import PreferenceRecord, Text

SHAREGPT_USES = (TURNS, "chosen", "rejected", SYSTEMS, *CHAT_OPTIONS)
ALPACA_USES = ("instruction", "input", "history", ("chosen+rejected", "output"), SYSTEMS, *CHAT_OPTIONS)
SWIFT_USES = (
    (
        "messages",
        "query+history+response",
        "instruction+input+history+response",
        "prompt+response",
        "question+response",
    ),
    ("rejected_response", "rejected_messages"),
    SYSTEMS,
    *CHAT_OPTIONS,
)
OPENAI_USES = ("input", "preferred_output", "non_preferred_output")
OPENAI_OPTIONS = ("messages", "tools", "parallel_tool_calls")


def sharegpt(row: SourceRow, reading: RowSpec) -> list[PreferenceRecord]:
    """``conversations`` of turns with ``from`` and ``value``, and a turn (or a text) ``chosen`` and ``rejected``.

    ``system`` and ``tools`` beside them are taken as LLaMA-Factory takes them.
    """
    name = first_of(row.fields, TURNS)
    prompt = read_turns(row, name)
    chosen, rejected = (read_answer(field_of(row, side), f"field {side!r}") for side in ("chosen", "rejected"))
    if prompt[-1]["role"] == "assistant" and prompt not in (chosen, rejected):
        raise RowError(f"field {name!r} ends with the assistant's turn, and chosen and rejected are to be that")
    return [pair_record(row, prompt, chosen, rejected)]


def alpaca(row: SourceRow, reading: RowSpec) -> list[PreferenceRecord]:
    """``instruction``, perhaps ``input``, ``history`` and ``system``, with ``chosen`` and ``rejected``.

    Instead of the two, ``output`` may list them, the better one first.
    """
    prompt = instruction_messages(row, "instruction")
    chosen, rejected = (as_text(value, what) for value, what in _two_outputs(row))
    if len(prompt) == 1 and all(is_chat(side) and side[0]["role"] in ASKING_ROLES for side in (chosen, rejected)):
        return [pair_record(row, prompt[0]["content"], chosen, rejected)]  # it is one of the turns they share
    return [pair_record(row, prompt, chosen, rejected)]


def swift(row: SourceRow, reading: RowSpec) -> list[PreferenceRecord]:
    """Reads ms-swift's rows: ``messages`` with ``rejected_response`` or ``rejected_messages``, or its older columns.

    These are ``query``, ``response``, ``rejected_response``, ``history`` and ``system``. All of them are chats.
    """
    name = first_of(row.fields, ("rejected_response", "rejected_messages"))
    rejected = read_answer(field_of(row, name), f"field {name!r}")
    if row.fields.get("messages") is None:
        chosen = assistant_turn(as_text(field_of(row, "response"), "field 'response'"))
        asked = first_of(row.fields, ("query", "instruction"))
        prompt: Text = instruction_messages(row, asked) if row.fields.get(asked) is not None else prompt_of(row)
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return [pair_record(row, prompt, chosen, rejected)]
    messages = read_turns(row, "messages")
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise RowError(f"field 'messages' must end with the assistant's turn, to which {name!r} is the worse one")
    if name == "rejected_messages" and rejected[0] == messages[0]:
        return [pair_record(row, None, messages, rejected)]
    return [pair_record(row, messages[:-1], messages[-1:], rejected)]


def openai(row: SourceRow, reading: RowSpec) -> list[PreferenceRecord]:
    """Reads OpenAI's preference rows: ``input`` with ``messages`` and ``tools``, two outputs as lists of messages."""
    asked = field_of(row, "input")
    if not isinstance(asked, dict):
        raise RowError(f"field 'input' must be an object with messages, found {describe(asked)}")
    for key, value in asked.items():
        if key not in OPENAI_OPTIONS and value:
            raise RowError(f"field 'input' holds {key!r}, which is not used; there are {', '.join(OPENAI_OPTIONS)}")
    whole = SourceRow(row.source, row.row, {name: asked.get(name) for name in ("messages", "tools")})
    prompt = read_turns(whole, "messages")
    outputs = ("preferred_output", "non_preferred_output")
    chosen, rejected = (read_answer(field_of(row, name), f"field {name!r}") for name in outputs)
    return [pair_record(whole, prompt, chosen, rejected)]


def has_turns(fields: dict[str, Any]) -> bool:
    """Whether a row is one of :func:`sharegpt`."""
    pair = {"chosen", "rejected"} <= fields.keys()
    named = any(fields.get(name) is not None for name in ("conversations", "messages"))
    return pair and (named or has_prompt_turns(fields)) and "prompt" not in fields and not _whole_chats(fields)


def has_instruction(fields: dict[str, Any]) -> bool:
    """Whether a row is one of :func:`alpaca`."""
    pair = {"chosen", "rejected"} <= fields.keys() or isinstance(fields.get("output"), list)
    return "instruction" in fields and pair and fields.get("prompt") is None


def has_rejected(fields: dict[str, Any]) -> bool:
    """Whether a row is one of :func:`swift`."""
    worse = fields.get("rejected_response") is not None or fields.get("rejected_messages") is not None
    better = fields.get("messages") is not None or ("response" in fields and has_prompt(fields))
    return worse and better and "chosen" not in fields


def has_outputs(fields: dict[str, Any]) -> bool:
    """Whether a row is one of :func:`openai`."""
    return {"input", "preferred_output", "non_preferred_output"} <= fields.keys()


def _whole_chats(fields: dict[str, Any]) -> bool:
    """Whether chosen and rejected are chats that begin with the prompt, and turns beside them are all of one chat."""
    turns = next((fields[name] for name in TURNS if holds_turns(fields.get(name))), None)
    return turns is not None and turns in (fields["chosen"], fields["rejected"])


def _two_outputs(row: SourceRow) -> list[tuple[Any, str]]:
    if row.fields.get("output") is None or any(row.fields.get(name) is not None for name in ("chosen", "rejected")):
        return [(field_of(row, name), f"field {name!r}") for name in ("chosen", "rejected")]
    outputs = field_of(row, "output")
    if not isinstance(outputs, list) or len(outputs) != 2:
        raise RowError(f"field 'output' must list two texts, the better one first, found {describe(outputs)}")
    return [
        (plain_text(text, f"field 'output', text {place}"), f"field 'output', text {place}")
        for place, text in enumerate(outputs, 1)
    ]
