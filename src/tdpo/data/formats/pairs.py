"""Pairs in two columns: TRL's shapes, dialogues, rows of LLaMA-Factory, ms-swift and OpenAI, labelled responses."""

from __future__ import annotations

import bisect
from dataclasses import replace
from typing import Any

import regex

from tdpo.config.row_spec import RowSpec
from tdpo.data.formats import prompts
from tdpo.data.formats.fields import ASKING_ROLES, field_of, first_of, mixed_kinds, number, plain_text, read_turns
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
STEMS = ("response", "output", "answer", "completion", "generation", "conversation")
SUFFIXES = (("_0", "_1"), ("_1", "_2"), ("_a", "_b"), ("_A", "_B"), ("1", "2"))
LABELS = ("better_response_id", "preference", "winner", "choice")
"""Columns that name the better response: PKU-SafeRLHF's, AlpacaFarm's, Chatbot Arena's, and one more."""
STRENGTHS = ("preference_strength", "overall_preference")
"""HelpSteer's columns: below zero the first response is better, above zero the second."""
RATINGS = ("score", "rating", "reward")
TIES = (
    "tie", "tie (bothbad)", "tie (both bad)", "bothbad", "both_bad", "both bad", "both_good", "both good", "neither",
)  # fmt: skip
PAIRS = tuple((stem, suffixes) for stem in STEMS for suffixes in SUFFIXES)
LABELLED_USES = (
    *prompts.PROMPT_USES,
    tuple(f"{stem}{a}+{stem}{b}" for stem, (a, b) in PAIRS),
    (*LABELS, *STRENGTHS, *(f"{name}{a}+{name}{b}" for name in RATINGS for a, b in SUFFIXES)),
)


def preference(row: SourceRow, spec: RowSpec) -> list[PreferenceRecord]:
    """Reads TRL's explicit format: ``prompt``, ``chosen``, ``rejected``, texts or lists of chat messages.

    The prompt may have another name (see :func:`~tdpo.data.formats.prompts.prompt_of`), and ``system`` belongs to it.
    Where both responses repeat the whole prompt as their first messages, it is taken once; so is a prompt given as text
    beside chats that hold it among the turns they share (``ultrafeedback_binarized``).
    """
    prompt = prompts.prompt_of(row)
    return [prompts.pair_record(row, prompt, field_of(row, "chosen"), field_of(row, "rejected"))]


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
        for index, (name, text) in enumerate(zip(PAIR, output, strict=True), 1):
            fields[name] = plain_text(text, f"field 'output', text {index}")
    return preference(replace(row, fields=fields), spec)


def sharegpt(row: SourceRow, spec: RowSpec) -> list[PreferenceRecord]:
    """Reads ``conversations`` of turns with ``from`` and ``value``, and a turn or a text ``chosen`` and ``rejected``.

    ``system`` and ``tools`` beside them are taken as LLaMA-Factory takes them.
    """
    name = first_of(row.fields, prompts.TURNS)
    prompt, *pair = field_of(row, name, read_turns), field_of(row, "chosen"), field_of(row, "rejected")
    if prompt[-1]["role"] == "assistant" and prompt not in pair:
        raise RowError(f"field {name!r} ends with the assistant's turn, and chosen and rejected are to be that")
    return [prompts.pair_record(row, prompt, *pair)]


def swift(row: SourceRow, spec: RowSpec) -> list[PreferenceRecord]:
    """Reads ms-swift's rows: ``messages`` with ``rejected_response`` or ``rejected_messages``, or its older columns.

    These are ``query``, ``response``, ``rejected_response``, ``history`` and ``system``. All of them are chats.
    """
    name = first_of(row.fields, ("rejected_response", "rejected_messages"))
    rejected = field_of(row, name)
    if row.fields.get("messages") is None:
        asked = first_of(row.fields, ("query", "instruction"))
        prompt = prompts.prompt_of(row) if row.fields.get(asked) is None else prompts.instruction_of(row, asked)
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return [prompts.pair_record(row, prompt, field_of(row, "response"), rejected)]
    messages = field_of(row, "messages", read_turns)
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise RowError(f"field 'messages' must end with the assistant's turn, to which {name!r} is the worse one")
    if name == "rejected_messages" and rejected[:1] == messages[:1]:
        return [prompts.pair_record(row, None, messages, rejected)]
    return [prompts.pair_record(row, messages[:-1], messages[-1:], rejected)]


def openai(row: SourceRow, spec: RowSpec) -> list[PreferenceRecord]:
    """Reads OpenAI's preference rows: ``input`` with ``messages`` and ``tools``, two outputs as lists of messages."""
    asked = field_of(row, "input", _object)
    known = ("messages", "tools", "parallel_tool_calls")
    for key, value in asked.items():
        if key not in known and value:
            raise RowError(f"field 'input' holds {key!r}, which is not used; there are {', '.join(known)}")
    inner = replace(row, fields={name: asked.get(name) for name in known[:2]})
    prompt = field_of(inner, "messages", read_turns)
    return [prompts.pair_record(inner, prompt, *(field_of(row, name) for name in OUTPUTS))]


def implicit(row: SourceRow, spec: RowSpec) -> list[PreferenceRecord]:
    """Reads TRL's implicit format: ``chosen`` and ``rejected`` begin with the prompt, as texts or as chat messages.

    The prompt is the longest common prefix of whole turns, or of whole words; of texts that are rendered chats, all
    before the last assistant's answer.
    """
    chosen, rejected = field_of(row, "chosen"), field_of(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise mixed_kinds(chosen=chosen, rejected=rejected)
    if chosen == rejected:
        raise RowDropped("chosen and rejected are identical")
    if isinstance(chosen, str):
        system = first_of(row.fields, prompts.SYSTEMS)
        if row.fields.get(system):
            raise RowError(f"field {system!r} is for a chat, and chosen and rejected are texts without a prompt beside")
        end = _shared_text(chosen, rejected)
        if not chosen[:end].strip():
            raise RowError("there is no field 'prompt', and chosen and rejected do not begin with the same words")
        return [prompts.make_record(row, chosen[:end], chosen[end:], rejected[end:])]
    shared = prompts.shared_turns(chosen, rejected)
    if shared and any(messages[len(shared)]["role"] in ASKING_ROLES for messages in (chosen, rejected)):
        raise RowDropped("the two chats do not share their prompt")
    return [prompts.pair_record(row, None, chosen, rejected)]


def hh(row: SourceRow, spec: RowSpec) -> list[PreferenceRecord]:
    """Reads Anthropic HH: two whole dialogues as text that share all up to the last ``Assistant:``."""
    (prompt, chosen), (other, rejected) = (field_of(row, name, _split_dialogue) for name in PAIR)
    if prompt != other:
        raise RowDropped("the two dialogues do not share their prompt")
    if not (chosen.strip() and rejected.strip()):
        raise RowDropped("a dialogue ends without a response")
    return [prompts.make_record(row, prompt, chosen, rejected)]


def labelled(row: SourceRow, spec: RowSpec) -> list[PreferenceRecord]:
    """Reads two responses and which of them is better.

    ``better_response_id``, ``preference``, ``winner`` and ``choice`` name the better one by the end of its column's
    name (``0``, ``1``, ``a``), by the whole name, or as ``model_a``; ``preference_strength`` and ``overall_preference``
    are below zero where it is the first; of two ratings the larger one is better.
    """
    stem, ends = _pair_of(row.fields) or PAIRS[0]
    sides = [field_of(row, stem + end) for end in ends]
    lead = _lead_of_first(row, stem, ends)
    if lead == 0:
        raise RowDropped("neither response is the better one")
    chats = all(isinstance(side, list) for side in sides) and not prompts.has_prompt(row.fields)
    prompt = None if chats else prompts.prompt_of(row)
    return [prompts.pair_record(row, prompt, *(sides if lead > 0 else reversed(sides)))]


def has_explicit_prompt(fields: dict[str, Any]) -> bool:
    """Returns whether a pair has its prompt beside it; dialogues, or an instruction, are of other formats."""
    asked = any(fields.get(name) is not None for name in prompts.PROMPTS)
    return "prompt" in fields or (asked and "instruction" not in fields and not has_dialogues(fields))


def has_dialogues(fields: dict[str, Any]) -> bool:
    """Returns whether a pair is two dialogues as :func:`hh` reads them."""
    pair = [fields.get(name) for name in PAIR]
    return all(isinstance(value, str) and DIALOGUE_TURN in value for value in pair)


def has_turns(fields: dict[str, Any]) -> bool:
    """Returns whether turns stand beside a pair, and are not those of one of its two whole chats."""
    turns = prompts.turns_column(fields)
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
    return worse and (fields.get("messages") is not None or ("response" in fields and prompts.has_prompt(fields)))


def has_labelled_pair(fields: dict[str, Any]) -> bool:
    """Returns whether a row has two responses to a prompt and the better one's label."""
    stem, ends = _pair_of(fields) or ("", ("", ""))
    if not stem or isinstance(fields.get("question"), dict):  # as in webgpt_comparisons
        return False
    prompted = prompts.has_prompt(fields) or all(prompts.holds_turns(fields[stem + end]) for end in ends)
    return prompted and _label_of(fields, ends) is not None


def common_words(one: str, other: str) -> int:
    """Returns the length of the longest common prefix that is whole words in both texts and leaves something of both.

    Spaces before the end belong to what follows, as tokenizers have it.

    Examples:
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


def _split_dialogue(value: Any, what: str) -> tuple[str, str]:
    """Reads an HH dialogue as prompt (through the last ``Assistant:``) and response (its leading space included)."""
    if not isinstance(value, str) or DIALOGUE_TURN not in value:
        raise RowError(f"{what} must be a dialogue with an 'Assistant:' turn, found {describe(value)}")
    before, turn, response = plain_text(value, what).rpartition(DIALOGUE_TURN)
    return before + turn, response


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError(f"{what} must be an object with messages, found {describe(value)}")
    return value


def _pair_of(fields: dict[str, Any]) -> tuple[str, tuple[str, str]] | None:
    """Finds two columns of responses, as the beginning and the two ends of their names."""
    return next((pair for pair in PAIRS if all(pair[0] + end in fields for end in pair[1])), None)


def _label_of(fields: dict[str, Any], ends: tuple[str, str]) -> str | None:
    """Finds the column that says which of two responses is better, or the name that two columns of ratings share."""
    label = next((name for name in (*LABELS, *STRENGTHS) if fields.get(name) is not None), None)
    return label or next((name for name in RATINGS if all(name + end in fields for end in ends)), None)


def _lead_of_first(row: SourceRow, stem: str, ends: tuple[str, str]) -> float:
    """Returns a number above zero where the first response is better, below where the second is, and 0 for a tie.

    Raises:
        RowError: for a label that names neither.
    """
    label = _label_of(row.fields, ends)
    if label is None:
        names, there = " and ".join(repr(stem + end) for end in ends), first_of(row.fields, (*LABELS, *STRENGTHS))
        raise RowError(f"field {there!r} is missing, which says the better of {names}")
    if label in RATINGS:
        first, second = (field_of(row, label + end, number) for end in ends)
        return first - second
    value = row.fields[label]
    if label in STRENGTHS:
        return -number(value, f"field {label!r}")
    short = [end.strip("_").lower() for end in ends]
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    given = "" if isinstance(value, bool) else str(value).strip().lower()
    if given in TIES or (short == ["1", "2"] and given == "1.5"):
        return 0
    for sign, end, suffix in zip((1, -1), short, ends, strict=True):
        if given in (end, (stem + suffix).lower(), f"model_{end}"):
            return sign
    raise RowError(
        f"field {label!r} must name the better response: {short[0]} for {stem + ends[0]!r}, {short[1]} for "
        f"{stem + ends[1]!r} or tie, found {describe(value)}"
    )
