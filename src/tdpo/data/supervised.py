"""Formats of supervised rows: conversations, questions with answers, plain text, and the chosen of preference rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tdpo.data.formats import FORMATS, Format, RowDropped, RowError, chat_options, is_empty, text_of
from tdpo.data.formats.fields import is_chat, plain_text
from tdpo.data.formats.prompts import QUESTIONS, SYSTEMS, history_messages, read_turns
from tdpo.data.formats.refused import LABELS
from tdpo.data.row_spec import RowSpec, parse_json
from tdpo.data.sources import SourceRow, describe
from tdpo.types import Message, PreferenceRecord, Text

RESPONSES = ("completion", "response", "output", "answer", "solution", "target", "targets")
LEARNT_FLAGS = ("weight", "loss", "train")
"""Keys of a message that say whether it is learnt: OpenAI's, ms-swift's and Axolotl's."""
CONVERSATIONS = ("conversations", "conversation")
UNANSWERED = "the last turn is left out, because nothing answers it"
UNASKED = "the first turn is the assistant's, which is read but not learnt, because no turn precedes it"
CHAT_OPTIONS = ("tools", "chat_template_kwargs")
BESIDE_ANSWERS = ("label", "history", SYSTEMS, *CHAT_OPTIONS)


@dataclass(frozen=True)
class Exchange:
    """A prompt and the response to learn; of a conversation its last one, with the earlier ones in the prompt.

    Attributes:
        prompt: Plain text or chat messages; empty before plain text.
        response: The same kind.
        source: The file or dataset it was read from.
        row: Its row there.
        tools: As in :class:`~tdpo.types.PreferenceRecord`.
        chat_template_kwargs: The same.
        truncation_mode: The same.
        earlier: Indices of the messages of the prompt that are responses to learn too.
        notes: What is worth counting about the row, for the report.
    """

    prompt: Text
    response: Text
    source: str
    row: int
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    truncation_mode: Literal["keep_end", "keep_start"] | None = None
    earlier: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def text(row: SourceRow, reading: RowSpec) -> list[Exchange]:
    """Reads ``text``, all of which is learnt."""
    content = text_of(row, "text")
    if not isinstance(content, str):
        raise RowError("field 'text' must be a text, found chat messages")
    return _exchange(row, "", content, "text")


def completion(row: SourceRow, reading: RowSpec) -> list[Exchange]:
    """Reads ``prompt`` and ``completion``, both texts or both messages; of the messages the completion is learnt."""
    return _answered(row, "prompt", "completion")


def answer(row: SourceRow, reading: RowSpec) -> list[Exchange]:
    """Reads a prompt or a question with its answer, under any of their usual names."""
    asked = "prompt" if "prompt" in row.fields else _only(row, reading, QUESTIONS, "question")
    return _answered(row, asked, _only(row, reading, RESPONSES, "response"))


def alpaca(row: SourceRow, reading: RowSpec) -> list[Exchange]:
    """Reads ``instruction``, perhaps ``input``, ``history`` and ``system``, and ``output``."""
    parts = [(name, row.fields.get(name)) for name in ("instruction", "input", "context")]
    question = "\n".join(plain_text(part, f"field {name!r}") for name, part in parts if part not in (None, ""))
    asked = replace(row, fields={**row.fields, "instruction": question})
    return _answered(asked, "instruction", _only(row, reading, RESPONSES, "response"))


def messages(row: SourceRow, reading: RowSpec) -> list[Exchange]:
    """Reads a conversation in ``messages``."""
    row = _parsed(row, "messages")
    return _conversation(row, read_turns(row, "messages"), "messages", _flags(row.fields["messages"], "messages"))


def sharegpt(row: SourceRow, reading: RowSpec) -> list[Exchange]:
    """Reads a conversation in ``conversations`` or ``conversation``, in ShareGPT's turns or in messages."""
    name = next((name for name in CONVERSATIONS if name in row.fields), CONVERSATIONS[0])
    row = _parsed(row, name)
    turns = row.fields.get(name)
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) and "output" in turn for turn in turns):
        turns = [message for round_ in turns for message in _round(round_)]
        row = replace(row, fields={**row.fields, name: turns})
    return _conversation(row, read_turns(row, name), name, _flags(turns, name))


def has_completion(fields: Mapping[str, Any]) -> bool:
    """Returns whether a row is one of :func:`completion`."""
    return {"prompt", "completion"} <= fields.keys()


def has_answer(fields: Mapping[str, Any]) -> bool:
    """Returns whether a row is one of :func:`answer`, and is neither a pair nor scored."""
    asked = _has({"prompt", *QUESTIONS}, fields)
    return asked and _has_response(fields) and not FORMATS["scored"].recognises(dict(fields))


def has_instruction(fields: Mapping[str, Any]) -> bool:
    """Returns whether a row is one of :func:`alpaca`."""
    return "instruction" in fields and _has_response(fields)


def has_messages(fields: Mapping[str, Any]) -> bool:
    """Returns whether a row is one of :func:`messages`."""
    return "messages" in fields and not _is_pair(fields)


def has_conversation(fields: Mapping[str, Any]) -> bool:
    """Returns whether a row is one of :func:`sharegpt`."""
    return _has(CONVERSATIONS, fields) and not _is_pair(fields)


def chosen_of(known: Format) -> Format:
    """Makes a format of responses from one of preferences: the chosen ones, and of several answers the best."""

    def best(reading: RowSpec) -> RowSpec:
        return reading if reading.pairs_from else replace(reading, pairs_from="best_worst")

    def responses(records: Iterable[PreferenceRecord]) -> list[Exchange]:
        return [Exchange(r.prompt, r.chosen, r.source, r.row, r.tools, r.chat_template_kwargs) for r in records]

    join = known.join
    if join is None:
        return replace(known, convert=lambda row, reading: responses(known.convert(row, best(reading))))
    return replace(
        known,
        convert=lambda row, reading: known.convert(row, best(reading)),
        join=lambda made, reading, report: responses(join(made, best(reading), report)),
    )


def or_chosen(plain: Format, pairs: Format) -> Format:
    """Combines a format of responses with one of preferences, of which the chosen responses are learnt."""
    chosen = chosen_of(pairs)

    def convert(row: SourceRow, reading: RowSpec) -> Sequence[Any]:
        return (chosen if pairs.recognises(row.fields) else plain).convert(row, reading)

    return replace(
        plain,
        recognises=lambda fields: plain.recognises(fields) or pairs.recognises(fields),
        convert=convert,
        uses=tuple(dict.fromkeys((*plain.uses, *pairs.uses))),
    )


SFT_FORMATS: dict[str, Format] = {
    "completion": Format(
        "prompt, completion", has_completion, completion, uses=("prompt", "completion", *BESIDE_ANSWERS)
    ),
    "messages": Format("messages", has_messages, messages, uses=("messages", SYSTEMS, *CHAT_OPTIONS)),
    "sharegpt": or_chosen(
        Format(
            "conversations: ShareGPT turns or messages, also with chosen, rejected", has_conversation, sharegpt,
            uses=(CONVERSATIONS, SYSTEMS, *CHAT_OPTIONS),
        ),
        FORMATS["sharegpt"],
    ),
    "alpaca": or_chosen(
        Format(
            "instruction, input, output, also with chosen, rejected", has_instruction, alpaca,
            uses=("instruction", "input", "context", RESPONSES, *BESIDE_ANSWERS),
        ),
        FORMATS["alpaca"],
    ),
    "answer": Format(
        "prompt, question, query or problem, with response, answer, output or solution", has_answer, answer,
        uses=(("prompt", *QUESTIONS), RESPONSES, *BESIDE_ANSWERS),
    ),
    "text": Format("text", lambda fields: "text" in fields, text, uses=("text",)),
    **{name: chosen_of(known) for name, known in FORMATS.items() if name not in ("sharegpt", "alpaca")},
}  # fmt: skip
"""Supervised rows, and behind them all preference formats."""


def _answered(row: SourceRow, asked: str, answered: str) -> list[Exchange]:
    """Makes the exchange of two columns.

    Text in ``prompt`` is continued as it stands; a question, and what has a system column or a history, is a chat. An
    empty system column makes a chat too, so that all rows of a source are of one kind.
    """
    prompt, response = text_of(row, asked), text_of(row, answered)
    history = history_messages(row)
    stands_alone = asked == "prompt" and not history and all(row.fields.get(name) is None for name in SYSTEMS)
    if isinstance(prompt, str) and isinstance(response, str) and stands_alone:
        return _exchange(row, prompt, response, answered)
    if isinstance(prompt, str) and is_chat(response):
        raise RowError(f"one of {asked!r} and {answered!r} is a text, the other chat messages")
    if is_empty(prompt):
        raise RowError(f"field {asked!r} is empty")
    if is_empty(response):
        raise RowError(f"field {answered!r} is empty")
    question: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    learnt = response if is_chat(response) else [{"role": "assistant", "content": response}]
    flags = [True] * len(history) + [False] * len(question) + [True] * len(learnt)
    return _conversation(row, [*history, *question, *learnt], answered, flags)


def _conversation(row: SourceRow, turns: list[Message], name: str, flags: Sequence[bool]) -> list[Exchange]:
    """Makes the exchange that learns every assistant turn whose flag is set and that another turn precedes."""
    _drop_unwanted(row)
    first = _system(row)
    if first and turns[0]["role"] == "system":
        if turns[0]["content"] != first[0]["content"]:
            raise RowError(f"field {name!r} begins with another system turn than the row's own column")
        first = []
    turns, flags = [*first, *turns], [False] * len(first) + list(flags)
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
    options = chat_options(row, prompt)
    return [Exchange(prompt, response, row.source, row.row, **options, earlier=tuple(learnt[:-1]), notes=tuple(notes))]


def _exchange(row: SourceRow, prompt: Text, response: Text, name: str) -> list[Exchange]:
    _drop_unwanted(row)
    if is_empty(response):
        raise RowError(f"field {name!r} is empty")
    return [Exchange(prompt, response, row.source, row.row, **chat_options(row, prompt))]


def _drop_unwanted(row: SourceRow) -> None:
    """Drops an answer that a label calls bad (KTO)."""
    for name in LABELS:
        if row.fields.get(name) is False or str(row.fields.get(name)).lower() == "false":
            raise RowDropped(f"its {name} is false, an answer that is not wanted")


def _flags(turns: Any, name: str) -> list[bool]:
    """Reads from the keys of each turn whether it is learnt; it is where no key says otherwise."""
    flags = []
    for number, turn in enumerate(turns, 1):
        given = [(key, turn[key]) for key in LEARNT_FLAGS if turn.get(key) is not None]
        for key, value in given:
            if not isinstance(value, int | float) or value not in (0, 1):
                raise RowError(f"field {name!r}, turn {number}, {key!r} must be 0 or 1, found {describe(value)}")
        flags.append(all(value for _, value in given))
    return flags


def _round(turn: dict[str, Any]) -> list[dict[str, Any]]:
    """Splits a round with ``input`` and ``output``, perhaps ``system``, into messages."""
    roles = (("system", "system"), ("input", "user"), ("output", "assistant"))
    return [{"role": role, "content": turn[name]} for name, role in roles if turn.get(name) not in (None, "")]


def _parsed(row: SourceRow, name: str) -> SourceRow:
    """Parses a list of turns that a table of texts holds as JSON."""
    value = row.fields.get(name)
    if not (isinstance(value, str) and value.lstrip().startswith("[")):
        return row
    turns = parse_json(value, f"field {name!r} is a list of turns as text and", RowError)
    return replace(row, fields={**row.fields, name: turns})


def _system(row: SourceRow) -> list[Message]:
    name = next((name for name in SYSTEMS if row.fields.get(name)), None)
    return [] if name is None else [{"role": "system", "content": plain_text(row.fields[name], f"field {name!r}")}]


def _only(row: SourceRow, reading: RowSpec, names: Sequence[str], field: str) -> str:
    """Finds the one of some columns that the row has; ``--columns`` decides between several."""
    there = [name for name in names if row.fields.get(name) is not None]
    there = [name for name, _ in reading.columns if name in there] or there
    if len(there) > 1:
        raise RowError(
            f"fields {' and '.join(map(repr, there))} may each be the {field}; name one, as in --columns "
            f"{field}={there[-1]}"
        )
    return there[0] if there else next((name for name in names if name in row.fields), names[0])


def _has(names: Iterable[str], fields: Mapping[str, Any]) -> bool:
    return any(name in fields for name in names)


def _has_response(fields: Mapping[str, Any]) -> bool:
    return _has(RESPONSES, fields) and not isinstance(fields.get("output"), list) and not _is_pair(fields)


def _is_pair(fields: Mapping[str, Any]) -> bool:
    return any(str(name).startswith(("chosen", "rejected")) for name in fields)
