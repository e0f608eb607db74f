"""Pairs in two columns: TRL's shapes, HH's dialogues, and the rows of LLaMA-Factory, ms-swift and OpenAI."""

from __future__ import annotations

import bisect
from dataclasses import replace
from typing import Any

import regex

from tdpo.config.row_spec import RowSpec
from tdpo.data.formats.fields import (
    ASKING_ROLES,
    assistant_turn,
    check_kinds,
    field_of,
    first_of,
    plain_text,
    read_turns,
)
from tdpo.data.formats.prompts import (
    PROMPTS,
    SYSTEMS,
    TURNS,
    has_prompt,
    instruction_of,
    make_record,
    pair_record,
    prompt_of,
    shared_turns,
    turns_column,
)
from tdpo.data.formats.report import RowDropped, RowError
from tdpo.data.sources import SourceRow, describe
from tdpo.types import PreferenceRecord

PAIR = ("chosen", "rejected")
OUTPUTS = ("preferred_output", "non_preferred_output")
DIALOGUE_TURN = "\n\nAssistant:"
CONTROL = r"<[|\uff5c][^<>|\uff5c\s]{1,40}[|\uff5c]>"
ANSWER_HEADER = regex.compile(
    rf"{CONTROL}assistant(?:{CONTROL})?\n*|<[|\uff5c][Aa]ssistant[|\uff5c]>\n*|<start_of_turn>model\n|\[/INST\]"
)
"""Beginning of an assistant's turn in chats that are rendered already, in the usual families of models."""
BOUNDARY = regex.compile(r"(?w)\b")
"""A word boundary as Unicode defines it (UAX 29): none in a number, an emoji, a flag or before a combining mark."""


def preference(row: SourceRow, spec: RowSpec) -> list[PreferenceRecord]:
    """Reads TRL's explicit format: ``prompt``, ``chosen``, ``rejected``, texts or lists of chat messages.

    The prompt may have another name (see :func:`~tdpo.data.formats.prompts.prompt_of`), and ``system`` belongs to it.
    Where both responses repeat the whole prompt as their first messages, it is taken once; so is a prompt given as text
    beside chats that hold it among the turns they share (``ultrafeedback_binarized``).
    """
    prompt = prompt_of(row)
    return [pair_record(row, prompt, field_of(row, "chosen"), field_of(row, "rejected"))]


def alpaca(row: SourceRow, spec: RowSpec) -> list[PreferenceRecord]:
    """Reads ``instruction``, perhaps ``input``, ``history`` and ``system``, with ``chosen`` and ``rejected``.

    Instead of the two, ``output`` may list them, the better one first.
    """
    fields = {"instruction": None, **row.fields}
    fields.pop("prompt", None)
    output = fields.get("output")
    if output is not None and all(fields.get(name) is None for name in PAIR):
        if not isinstance(output, list) or len(output) != 2:
            raise RowError(f"field 'output' must list two texts, the better one first, found {describe(output)}")
        for number, (name, text) in enumerate(zip(PAIR, output, strict=True), 1):
            fields[name] = plain_text(text, f"field 'output', text {number}")
    return preference(replace(row, fields=fields), spec)


def sharegpt(row: SourceRow, spec: RowSpec) -> list[PreferenceRecord]:
    """Reads ``conversations`` of turns with ``from`` and ``value``, and a turn or a text ``chosen`` and ``rejected``.

    ``system`` and ``tools`` beside them are taken as LLaMA-Factory takes them.
    """
    name = first_of(row.fields, TURNS)
    prompt, *pair = field_of(row, name, read_turns), field_of(row, "chosen"), field_of(row, "rejected")
    if prompt[-1]["role"] == "assistant" and prompt not in pair:
        raise RowError(f"field {name!r} ends with the assistant's turn, and chosen and rejected are to be that")
    return [pair_record(row, prompt, *pair)]


def swift(row: SourceRow, spec: RowSpec) -> list[PreferenceRecord]:
    """Reads ms-swift's rows: ``messages`` with ``rejected_response`` or ``rejected_messages``, or its older columns.

    These are ``query``, ``response``, ``rejected_response``, ``history`` and ``system``. All of them are chats.
    """
    name = first_of(row.fields, ("rejected_response", "rejected_messages"))
    rejected = assistant_turn(field_of(row, name))
    if row.fields.get("messages") is None:
        asked = first_of(row.fields, ("query", "instruction"))
        prompt = prompt_of(row) if row.fields.get(asked) is None else instruction_of(row, asked)
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return [pair_record(row, prompt, field_of(row, "response"), rejected)]
    messages = field_of(row, "messages", read_turns)
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise RowError(f"field 'messages' must end with the assistant's turn, to which {name!r} is the worse one")
    if name == "rejected_messages" and rejected[0] == messages[0]:
        return [pair_record(row, None, messages, rejected)]
    return [pair_record(row, messages[:-1], messages[-1:], rejected)]


def openai(row: SourceRow, spec: RowSpec) -> list[PreferenceRecord]:
    """Reads OpenAI's preference rows: ``input`` with ``messages`` and ``tools``, two outputs as lists of messages."""
    asked = field_of(row, "input", _object)
    known = ("messages", "tools", "parallel_tool_calls")
    for key, value in asked.items():
        if key not in known and value:
            raise RowError(f"field 'input' holds {key!r}, which is not used; there are {', '.join(known)}")
    inner = replace(row, fields={name: asked.get(name) for name in known[:2]})
    return [pair_record(inner, field_of(inner, "messages", read_turns), *(field_of(row, name) for name in OUTPUTS))]


def implicit(row: SourceRow, spec: RowSpec) -> list[PreferenceRecord]:
    """Reads TRL's implicit format: ``chosen`` and ``rejected`` begin with the prompt, as texts or as chat messages.

    The prompt is the longest common prefix of whole turns, or of whole words; of texts that are rendered chats, all
    before the last assistant's answer.
    """
    chosen, rejected = field_of(row, "chosen"), field_of(row, "rejected")
    check_kinds(chosen=chosen, rejected=rejected)
    if chosen == rejected:
        raise RowDropped("chosen and rejected are identical")
    if isinstance(chosen, str):
        system = first_of(row.fields, SYSTEMS)
        if row.fields.get(system):
            raise RowError(f"field {system!r} is for a chat, and chosen and rejected are texts without a prompt beside")
        end = _shared_text(chosen, rejected)
        if not chosen[:end].strip():
            raise RowError("there is no field 'prompt', and chosen and rejected do not begin with the same words")
        return [make_record(row, chosen[:end], chosen[end:], rejected[end:])]
    shared = shared_turns(chosen, rejected)
    if not shared:
        raise RowError("there is no field 'prompt', and chosen and rejected do not begin with the same messages")
    if any(messages[len(shared)]["role"] in ASKING_ROLES for messages in (chosen, rejected)):
        raise RowDropped("the two chats do not share their prompt")
    return [pair_record(row, None, chosen, rejected)]


def hh(row: SourceRow, spec: RowSpec) -> list[PreferenceRecord]:
    """Reads Anthropic HH: two whole dialogues as text that share all up to the last ``Assistant:``."""
    prompts, responses = [], []
    for name in PAIR:
        text = field_of(row, name)
        if not isinstance(text, str) or DIALOGUE_TURN not in text:
            raise RowError(f"field {name!r} must be a dialogue with an 'Assistant:' turn, found {describe(text)}")
        end = text.rindex(DIALOGUE_TURN) + len(DIALOGUE_TURN)
        prompts.append(text[:end])
        responses.append(text[end:])
    if prompts[0] != prompts[1]:
        raise RowDropped("the two dialogues do not share their prompt")
    if not all(map(str.strip, responses)):
        raise RowDropped("a dialogue ends without a response")
    return [make_record(row, prompts[0], *responses)]


def has_explicit_prompt(fields: dict[str, Any]) -> bool:
    """Returns whether a pair has its prompt beside it; dialogues, or an instruction, are of other formats."""
    asked = any(fields.get(name) is not None for name in PROMPTS)
    return "prompt" in fields or (asked and "instruction" not in fields and not has_dialogues(fields))


def has_dialogues(fields: dict[str, Any]) -> bool:
    """Returns whether a pair is two dialogues as :func:`hh` reads them."""
    pair = [fields.get(name) for name in PAIR]
    return all(isinstance(value, str) and DIALOGUE_TURN in value for value in pair)


def has_turns(fields: dict[str, Any]) -> bool:
    """Returns whether turns stand beside a pair, and are not those of one of its two whole chats."""
    turns = turns_column(fields)
    if turns is not None:
        return fields[turns] not in (fields["chosen"], fields["rejected"])
    return any(fields.get(name) is not None for name in ("conversations", "messages"))


def has_outputs(fields: dict[str, Any]) -> bool:
    """Returns whether an instruction has two responses."""
    pair = {*PAIR} <= fields.keys() or isinstance(fields.get("output"), list)
    return pair and fields.get("prompt") is None


def has_rejected(fields: dict[str, Any]) -> bool:
    """Returns whether a row has ms-swift's rejected response, and a better one."""
    worse = fields.get("rejected_response") is not None or fields.get("rejected_messages") is not None
    return worse and (fields.get("messages") is not None or ("response" in fields and has_prompt(fields)))


def common_words(one: str, other: str) -> int:
    """Returns the length of the longest common prefix that is whole words in both texts and leaves something of both.

    Spaces before the end belong to what follows, as tokenizers have it.

    Example:
        >>> one, other = "The sky is bluish.", "The sky is blue."
        >>> one[:common_words(one, other)]
        'The sky is'
    """
    last = min(len(one.rstrip()), len(other.rstrip())) - 1
    end = min(common_prefix(one, other), max(last, 0))
    while end > 0 and not all(BOUNDARY.match(text, end) for text in (one, other)):
        end -= 1
    return len(one[:end].rstrip(" "))


def common_prefix(one: str, other: str) -> int:
    """Returns the length of the common prefix of two texts, by halving."""
    return bisect.bisect_left(range(min(len(one), len(other))), True, key=lambda i: not other.startswith(one[: i + 1]))


def _shared_text(one: str, other: str) -> int:
    """Returns the length of the prompt that two texts begin with: of rendered chats with the header of the last answer.

    Raises:
        RowDropped: if rendered chats differ before their last turn.
    """
    last, others = ([found.end() for found in ANSWER_HEADER.finditer(text)] for text in (one, other))
    common = common_prefix(one, other)
    shared = max((end for end in last if end <= common), default=0)
    if shared and not last[-1] == others[-1] == shared:
        raise RowDropped("the two chats do not share their prompt")
    return shared or common_words(one, other)


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError(f"{what} must be an object with messages, found {describe(value)}")
    return value
