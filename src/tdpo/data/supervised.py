"""Formats of supervised rows: conversations, questions with answers, plain text, and the chosen of preference rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tdpo.config.row_spec import RowSpec, parse_json
from tdpo.data.formats import FORMATS, DataReport, Format, RowDropped, RowError, chat_options, is_empty
from tdpo.data.formats.fields import as_text, assistant_turn, field_of, first_of, read_turns
from tdpo.data.formats.prompts import CHAT_USES, QUESTIONS, SYSTEMS, history_messages, joined_question, with_system
from tdpo.data.formats.refused import LABELS
from tdpo.data.sources import SourceRow, describe
from tdpo.types import Message, PreferenceRecord, Text

RESPONSES = ("completion", "response", "output", "answer", "solution", "target", "targets")
LEARNT_FLAGS = ("weight", "loss", "train")
"""Keys of a message that mark it as learnt or not: OpenAI's, ms-swift's and Axolotl's."""
CONVERSATIONS = ("conversations", "conversation")
UNANSWERED = "the last turn is left out, because nothing answers it"
UNASKED = "the first turn is the assistant's, which is read but not learnt, because no turn precedes it"
ANSWER_USES = ("label", "history", *CHAT_USES)


@dataclass(frozen=True)
class Exchange(PreferenceRecord):
    """A prompt and, as ``chosen``, the response to learn; of a conversation its last one. ``rejected`` is empty.

    Attributes:
        earlier: Indices of the messages of the prompt that are responses to learn too.
        notes: Warnings about the row, for the report.
    """

    earlier: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def text(row: SourceRow, spec: RowSpec) -> list[Exchange]:
    """Reads ``text``, all of which is learnt."""
    content = field_of(row, "text", as_text)
    if not isinstance(content, str):
        raise RowError("field 'text' must be a text, found chat messages")
    return _exchange(row, "", content, "text")


def completion(row: SourceRow, spec: RowSpec) -> list[Exchange]:
    """Reads ``prompt`` and ``completion``, both texts or both messages; of the messages the completion is learnt."""
    return _answered(row, "prompt", "completion")


def answer(row: SourceRow, spec: RowSpec) -> list[Exchange]:
    """Reads a prompt or a question with its answer, under any of their usual names."""
    asked = "prompt" if "prompt" in row.fields else _only(row, spec, QUESTIONS, "question")
    return _answered(row, asked, _only(row, spec, RESPONSES, "response"))


def alpaca(row: SourceRow, spec: RowSpec) -> list[Exchange]:
    """Reads ``instruction``, perhaps ``input``, ``history`` and ``system``, and ``output``; or a pair's chosen."""
    if FORMATS["alpaca"].recognises(row.fields):
        return chosen(FORMATS["alpaca"], row, spec)
    question = joined_question(row, "instruction", "input", "context")
    asked = replace(row, fields={**row.fields, "instruction": question})
    return _answered(asked, "instruction", _only(row, spec, RESPONSES, "response"))


def messages(row: SourceRow, spec: RowSpec) -> list[Exchange]:
    """Reads a conversation in ``messages``."""
    return _conversation(row, "messages", field_of(row, "messages", _parsed))


def sharegpt(row: SourceRow, spec: RowSpec) -> list[Exchange]:
    """Reads a conversation in ``conversations`` or ``conversation``, in turns or in messages; or a pair's chosen."""
    if FORMATS["sharegpt"].recognises(row.fields):
        return chosen(FORMATS["sharegpt"], row, spec)
    name = next((name for name in CONVERSATIONS if name in row.fields), CONVERSATIONS[0])
    turns = field_of(row, name, _parsed)
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) and "output" in turn for turn in turns):
        turns = [message for round_ in turns for message in _round(round_)]
    return _conversation(row, name, turns)


def chosen(known: Format, row: SourceRow, spec: RowSpec) -> list[Any]:
    """Reads the chosen responses of a row of preferences; of several answers the best is learnt."""
    return [_learnt(made) for made in known.convert(row, _best(spec))]


def joined_chosen(known: Format, made: Sequence[Any], spec: RowSpec, report: DataReport) -> Iterable[Exchange]:
    """Makes the exchanges of a format of preferences whose rows belong together."""
    return map(_learnt, known.join(made, _best(spec), report)) if known.join else []


def has_answer(fields: Mapping[str, Any]) -> bool:
    """Returns whether a row has a question and its answer, and is neither a pair nor scored."""
    asked = _has({"prompt", *QUESTIONS}, fields)
    return asked and _has_response(fields) and not FORMATS["scored"].recognises(dict(fields))


def has_instruction(fields: Mapping[str, Any]) -> bool:
    """Returns whether an instruction has an answer, or two."""
    return _has_response(fields) or FORMATS["alpaca"].recognises(dict(fields))


def has_conversation(fields: Mapping[str, Any]) -> bool:
    """Returns whether a row has a conversation, alone or with a pair that follows it."""
    alone = _has(CONVERSATIONS, fields) and not _is_pair(fields)
    return alone or FORMATS["sharegpt"].recognises(dict(fields))


SFT_FORMATS: dict[str, Format] = {
    "completion": Format(
        "prompt, completion", completion, ("prompt", "completion", *ANSWER_USES), needs=("prompt", "completion"),
        matches=lambda fields: not FORMATS["scored"].recognises(dict(fields)),
    ),
    "messages": Format(
        "messages", messages, ("messages", *CHAT_USES), needs=("messages",), matches=lambda fields: not _is_pair(fields)
    ),
    "sharegpt": Format(
        "conversations: ShareGPT turns or messages, also with chosen, rejected", sharegpt,
        (CONVERSATIONS, *CHAT_USES, *FORMATS["sharegpt"].uses), matches=has_conversation,
    ),
    "alpaca": Format(
        "instruction, input, output, also with chosen, rejected", alpaca,
        ("instruction", "input", "context", RESPONSES, *ANSWER_USES, *FORMATS["alpaca"].uses),
        needs=("instruction",), matches=has_instruction,
    ),
    "answer": Format(
        "prompt, question, query or problem, with response, answer, output or solution", answer,
        (("prompt", *QUESTIONS), RESPONSES, *ANSWER_USES), matches=has_answer,
    ),
    "text": Format("text", text, ("text",), needs=("text",)),
    **{
        name: replace(known, convert=partial(chosen, known), join=known.join and partial(joined_chosen, known))
        for name, known in FORMATS.items()
        if name not in ("sharegpt", "alpaca")
    },
}  # fmt: skip
"""Supervised rows, and after them all preference formats."""


def _best(spec: RowSpec) -> RowSpec:
    return spec if spec.pairs_from else replace(spec, best_alone=True)


def _learnt(record: Any) -> Any:
    """Makes the exchange that learns the chosen response of a record; what is yet to be joined stays."""
    if not isinstance(record, PreferenceRecord):
        return record
    options = (record.tools, record.chat_template_kwargs)
    return Exchange(record.prompt, record.chosen, "", record.source, record.row, *options)


def _answered(row: SourceRow, asked: str, answered: str) -> list[Exchange]:
    """Makes the exchange of two columns.

    Text in ``prompt`` is continued as it stands; a question, and what has a system column or a history, is a chat. An
    empty system column makes a chat too, so that all rows of a source are of one kind.
    """
    prompt, response = field_of(row, asked, as_text), field_of(row, answered, as_text)
    history = history_messages(row)
    stands_alone = asked == "prompt" and not history and all(row.fields.get(name) is None for name in SYSTEMS)
    if isinstance(prompt, str) and isinstance(response, str) and stands_alone:
        return _exchange(row, prompt, response, answered)
    if isinstance(prompt, str) and isinstance(response, list):
        raise RowError(f"one of {asked!r} and {answered!r} is a text, the other chat messages")
    for name, side in ((asked, prompt), (answered, response)):
        if is_empty(side):
            raise RowError(f"field {name!r} is empty")
    question: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    learnt = assistant_turn(response)
    flags = [True] * len(history) + [False] * len(question) + [True] * len(learnt)
    return _learn_turns(row, answered, [*history, *question, *learnt], flags)


def _conversation(row: SourceRow, name: str, turns: Any) -> list[Exchange]:
    """Makes the exchange of a column of turns."""
    found = read_turns(turns, f"field {name!r}")
    return _learn_turns(row, name, found, _flags(turns, name))


def _learn_turns(row: SourceRow, name: str, turns: list[Message], flags: list[bool]) -> list[Exchange]:
    """Makes the exchange that learns every assistant turn whose flag is set and that another turn precedes."""
    _drop_unwanted(row)
    with_first: Any = with_system(row, turns)[0]
    flags = [False] * (len(with_first) - len(turns)) + flags
    turns = with_first
    learnt = [index for index, turn in enumerate(turns) if index and turn["role"] == "assistant" and flags[index]]
    if not learnt:
        roles = ", ".join(turn["role"] for turn in turns)
        raise RowError(f"field {name!r} holds no assistant turn to learn that another turn precedes; roles: {roles}")
    for index in learnt:
        if is_empty(turns[index : index + 1]):
            raise RowError(f"field {name!r} holds an empty assistant turn, message {index + 1} of {len(turns)}")
    turns = [{key: value for key, value in turn.items() if key not in LEARNT_FLAGS} for turn in turns]
    prompt, response = turns[: learnt[-1]], [turns[learnt[-1]]]
    notes = [UNANSWERED] if turns[-1]["role"] != "assistant" else []
    notes += [UNASKED] if turns[0]["role"] == "assistant" and flags[0] else []
    more: dict[str, Any] = {**chat_options(row, prompt), "earlier": tuple(learnt[:-1]), "notes": tuple(notes)}
    return [Exchange(prompt, response, "", row.source, row.row, **more)]


def _exchange(row: SourceRow, prompt: Text, response: Text, name: str) -> list[Exchange]:
    _drop_unwanted(row)
    if is_empty(response):
        raise RowError(f"field {name!r} is empty")
    return [Exchange(prompt, response, "", row.source, row.row, **chat_options(row, prompt))]


def _drop_unwanted(row: SourceRow) -> None:
    """Drops an answer that a label calls bad (KTO)."""
    for name in LABELS:
        if row.fields.get(name) is False or str(row.fields.get(name)).lower() == "false":
            raise RowDropped(f"its {name} is false, an answer that is not wanted")


def _flags(turns: Any, name: str) -> list[bool]:
    """Reads from the keys of each turn whether it is learnt; it is unless a key says otherwise."""
    flags = []
    for index, turn in enumerate(turns, 1):
        given = [(key, turn[key]) for key in LEARNT_FLAGS if turn.get(key) is not None]
        for key, value in given:
            if not isinstance(value, int | float) or value not in (0, 1):
                raise RowError(f"field {name!r}, turn {index}, {key!r} must be 0 or 1, found {describe(value)}")
        flags.append(all(value for _, value in given))
    return flags


def _round(turn: dict[str, Any]) -> list[dict[str, Any]]:
    """Splits a round with ``input`` and ``output``, perhaps ``system``, into messages."""
    roles = (("system", "system"), ("input", "user"), ("output", "assistant"))
    return [{"role": role, "content": turn[name]} for name, role in roles if turn.get(name) not in (None, "")]


def _parsed(value: Any, what: str) -> Any:
    """Parses a list of turns that a table of texts holds as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        return parse_json(value, f"{what} is a list of turns as text and", RowError)
    return value


def _only(row: SourceRow, spec: RowSpec, names: Sequence[str], field: str) -> str:
    """Finds the one of some columns that the row has; ``--columns`` decides between several."""
    there = [name for name in names if row.fields.get(name) is not None]
    there = [name for name, _ in spec.columns if name in there] or there
    if len(there) > 1:
        raise RowError(
            f"fields {' and '.join(map(repr, there))} may each be the {field}; name one, as in --columns "
            f"{field}={there[-1]}"
        )
    return there[0] if there else first_of(row.fields, names)


def _has(names: Iterable[str], fields: Mapping[str, Any]) -> bool:
    return any(name in fields for name in names)


def _has_response(fields: Mapping[str, Any]) -> bool:
    return _has(RESPONSES, fields) and not isinstance(fields.get("output"), list) and not _is_pair(fields)


def _is_pair(fields: Mapping[str, Any]) -> bool:
    return any(str(name).startswith(("chosen", "rejected")) for name in fields)
