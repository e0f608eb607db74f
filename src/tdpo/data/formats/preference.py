"""Pairs given as chosen and rejected: TRL's four shapes, and Anthropic HH dialogues."""

from __future__ import annotations

from typing import Any

import regex

from tdpo.data.formats.fields import ASKING_ROLES, check_kinds, first_of, text_of
from tdpo.data.formats.prompts import (
    CHAT_OPTIONS,
    PROMPT_USES,
    PROMPTS,
    SYSTEMS,
    pair_record,
    prompt_of,
    record_of,
    shared_turns,
)
from tdpo.data.formats.report import RowDropped, RowError
from tdpo.data.row_spec import RowSpec
from tdpo.data.sources import SourceRow, describe
from tdpo.types import PreferenceRecord

PREFERENCE_USES = (*PROMPT_USES, "chosen", "rejected")
IMPLICIT_USES = ("chosen", "rejected", SYSTEMS, *CHAT_OPTIONS)
DIALOGUE_TURN = "\n\nAssistant:"
CONTROL = r"<[|\uff5c][^<>|\uff5c\s]{1,40}[|\uff5c]>"
ANSWER_HEADER = regex.compile(
    rf"{CONTROL}assistant(?:{CONTROL})?\n*|<[|\uff5c][Aa]ssistant[|\uff5c]>\n*|<start_of_turn>model\n|\[/INST\]"
)
"""How an assistant's turn begins in chats that are rendered already, in the usual families of models."""
BOUNDARY = regex.compile(r"(?w)\b")
"""A word boundary as Unicode defines it (UAX 29): none in a number, an emoji, a flag or before a combining mark."""


def preference(row: SourceRow, reading: RowSpec) -> list[PreferenceRecord]:
    """TRL's explicit format: ``prompt``, ``chosen``, ``rejected``, texts or lists of chat messages.

    The prompt may have another name (see :func:`~tdpo.data.formats.prompts.prompt_of`), and ``system`` belongs to it.
    Where both responses repeat the whole prompt as their first messages, it is taken once; so is a prompt given as text
    beside chats that hold it among the turns they share (``ultrafeedback_binarized``).
    """
    prompt = prompt_of(row)
    chosen, rejected = (text_of(row, name) for name in ("chosen", "rejected"))
    return [pair_record(row, prompt, chosen, rejected)]


def implicit(row: SourceRow, reading: RowSpec) -> list[PreferenceRecord]:
    """TRL's implicit format: ``chosen`` and ``rejected`` begin with the prompt, as texts or as chat messages.

    The prompt is the longest common prefix of whole turns, or of whole words; of texts that are rendered chats, all
    before the last assistant's answer.
    """
    chosen, rejected = (text_of(row, name) for name in ("chosen", "rejected"))
    check_kinds(chosen=chosen, rejected=rejected)
    if chosen == rejected:
        raise RowDropped("chosen and rejected are identical")
    if isinstance(chosen, str) and isinstance(rejected, str):
        system = first_of(row.fields, SYSTEMS)
        if row.fields.get(system):
            raise RowError(f"field {system!r} is for a chat, and chosen and rejected are texts without a prompt beside")
        end = _rendered_prompt(chosen, rejected) or common_words(chosen, rejected)
        if not chosen[:end].strip():
            raise RowError("there is no field 'prompt', and chosen and rejected do not begin with the same words")
        return [record_of(row, chosen[:end], chosen[end:], rejected[end:])]
    turns: Any = (chosen, rejected)
    prompt = shared_turns(*turns)
    if not prompt:
        raise RowError("there is no field 'prompt', and chosen and rejected do not begin with the same messages")
    first = [messages[len(prompt)]["role"] for messages in turns]
    if any(role in ASKING_ROLES for role in first):
        raise RowDropped("the two chats do not share their prompt")
    return [pair_record(row, None, *turns)]


def hh(row: SourceRow, reading: RowSpec) -> list[PreferenceRecord]:
    """Anthropic HH: two whole dialogues as text that share all up to the last ``Assistant:``."""
    (prompt, chosen), (other, rejected) = (_split_dialogue(text_of(row, name), name) for name in ("chosen", "rejected"))
    if prompt != other:
        raise RowDropped("the two dialogues do not share their prompt")
    if not (chosen.strip() and rejected.strip()):
        raise RowDropped("a dialogue ends without a response")
    return [record_of(row, prompt, chosen, rejected)]


def has_explicit_prompt(fields: dict[str, Any]) -> bool:
    """Whether a row is one of :func:`preference`: by its own columns, or with a prompt under another name.

    Dialogues and ``instruction`` beside such a prompt are of other formats.
    """
    if not {"chosen", "rejected"} <= fields.keys():
        return False
    asked = any(fields.get(name) is not None for name in PROMPTS)
    return "prompt" in fields or (asked and "instruction" not in fields and not has_dialogues(fields))


def has_implicit_prompt(fields: dict[str, Any]) -> bool:
    """Whether a row is one of :func:`implicit`: texts or chats without a prompt beside them."""
    return "prompt" not in fields and all(isinstance(fields.get(name), str | list) for name in ("chosen", "rejected"))


def has_dialogues(fields: dict[str, Any]) -> bool:
    """Whether a row is one of :func:`hh`."""
    pair = [fields.get(name) for name in ("chosen", "rejected")]
    return "prompt" not in fields and all(isinstance(value, str) and DIALOGUE_TURN in value for value in pair)


def common_words(one: str, other: str) -> int:
    """Where the longest common prefix ends that is whole words in both texts and leaves something of both.

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
    while end > 0 and one[end - 1] == " ":
        end -= 1
    return end


def _rendered_prompt(one: str, other: str) -> int:
    """Where the prompt of two rendered chats ends: after the header of the last assistant's turn; 0 for other texts.

    Raises:
        RowDropped: if the chats part before their last turn.
    """
    last, others = ([found.end() for found in ANSWER_HEADER.finditer(text)] for text in (one, other))
    common = common_prefix(one, other)
    shared = max((end for end in last if end <= common), default=0)
    if shared and not last[-1] == others[-1] == shared:
        raise RowDropped("the two chats do not share their prompt")
    return shared


def common_prefix(one: str, other: str) -> int:
    """Returns the length of the common prefix of two texts, by halving."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _split_dialogue(text: Any, name: str) -> tuple[str, str]:
    """An HH dialogue as prompt (through the last ``Assistant:``) and response (its leading space included)."""
    if not isinstance(text, str) or DIALOGUE_TURN not in text:
        raise RowError(f"field {name!r} must be a dialogue with an 'Assistant:' turn, found {describe(text)}")
    end = text.rindex(DIALOGUE_TURN) + len(DIALOGUE_TURN)
    return text[:end], text[end:]
