"""Pairs given as chosen and rejected: TRL's four shapes, and Anthropic HH dialogues."""

from __future__ import annotations

from typing import Any

import regex

from tdpo.config.row_spec import RowSpec
from tdpo.data.formats.fields import ASKING_ROLES, as_text, chat_options, check_kinds, field_of, first_of
from tdpo.data.formats.prompts import PROMPTS, SYSTEMS, make_record, pair_record, prompt_of, shared_turns
from tdpo.data.formats.report import RowDropped, RowError
from tdpo.data.sources import SourceRow, describe
from tdpo.types import PreferenceRecord

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
    return [pair_record(row, prompt, field_of(row, "chosen", as_text), field_of(row, "rejected", as_text))]


def implicit(row: SourceRow, spec: RowSpec) -> list[PreferenceRecord]:
    """Reads TRL's implicit format: ``chosen`` and ``rejected`` begin with the prompt, as texts or as chat messages.

    The prompt is the longest common prefix of whole turns, or of whole words; of texts that are rendered chats, all
    before the last assistant's answer.
    """
    chosen, rejected = field_of(row, "chosen", as_text), field_of(row, "rejected", as_text)
    check_kinds(chosen=chosen, rejected=rejected)
    if chosen == rejected:
        raise RowDropped("chosen and rejected are identical")
    if isinstance(chosen, str) and isinstance(rejected, str):
        system = first_of(row.fields, SYSTEMS)
        if row.fields.get(system):
            raise RowError(f"field {system!r} is for a chat, and chosen and rejected are texts without a prompt beside")
        end = _rendered_prompt(chosen, rejected) or common_words(chosen, rejected)
        prompt = chosen[:end]
        if not prompt.strip():
            raise RowError("there is no field 'prompt', and chosen and rejected do not begin with the same words")
        return [make_record(row, prompt, chosen[end:], rejected[end:], chat_options(row, prompt))]
    turns: Any = (chosen, rejected)
    shared = shared_turns(*turns)
    if not shared:
        raise RowError("there is no field 'prompt', and chosen and rejected do not begin with the same messages")
    if any(messages[len(shared)]["role"] in ASKING_ROLES for messages in turns):
        raise RowDropped("the two chats do not share their prompt")
    return [pair_record(row, None, *turns)]


def hh(row: SourceRow, spec: RowSpec) -> list[PreferenceRecord]:
    """Reads Anthropic HH: two whole dialogues as text that share all up to the last ``Assistant:``."""
    (prompt, chosen), (other, rejected) = (field_of(row, name, _split_dialogue) for name in ("chosen", "rejected"))
    if prompt != other:
        raise RowDropped("the two dialogues do not share their prompt")
    if not (chosen.strip() and rejected.strip()):
        raise RowDropped("a dialogue ends without a response")
    return [make_record(row, prompt, chosen, rejected, chat_options(row, prompt))]


def has_explicit_prompt(fields: dict[str, Any]) -> bool:
    """Returns whether a pair has its prompt beside it; dialogues, or an instruction, are of other formats."""
    asked = any(fields.get(name) is not None for name in PROMPTS)
    return "prompt" in fields or (asked and "instruction" not in fields and not has_dialogues(fields))


def has_dialogues(fields: dict[str, Any]) -> bool:
    """Returns whether a pair is two dialogues as :func:`hh` reads them."""
    pair = [fields.get(name) for name in ("chosen", "rejected")]
    return all(isinstance(value, str) and DIALOGUE_TURN in value for value in pair)


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
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _rendered_prompt(one: str, other: str) -> int:
    """Returns the length of the prompt of two rendered chats, with the header of the last answer; 0 for other texts.

    Raises:
        RowDropped: if the chats differ before their last turn.
    """
    last, others = ([found.end() for found in ANSWER_HEADER.finditer(text)] for text in (one, other))
    common = common_prefix(one, other)
    shared = max((end for end in last if end <= common), default=0)
    if shared and not last[-1] == others[-1] == shared:
        raise RowDropped("the two chats do not share their prompt")
    return shared


def _split_dialogue(value: Any, what: str) -> tuple[str, str]:
    """Reads an HH dialogue as prompt (through the last ``Assistant:``) and response (its leading space included)."""
    text = as_text(value, what)
    if not isinstance(text, str) or DIALOGUE_TURN not in text:
        raise RowError(f"{what} must be a dialogue with an 'Assistant:' turn, found {describe(text)}")
    end = text.rindex(DIALOGUE_TURN) + len(DIALOGUE_TURN)
    return text[:end], text[end:]
