"""The prompt of a pair: the columns it may be in, the system prompt before it, and the chats that repeat it."""

from __future__ import annotations

from typing import Any

from tdpo.data.formats.fields import (
    ASKING_ROLES,
    as_text,
    chat_options,
    check_kinds,
    checked,
    encodable,
    field_of,
    first_of,
    is_chat,
    plain_text,
    read_turn,
)
from tdpo.data.formats.report import RowError
from tdpo.data.sources import SourceRow, describe
from tdpo.types import Message, PreferenceRecord, Text

SYSTEMS = ("system", "system_prompt")
QUESTIONS = ("question", "query", "problem", "input", "inputs")
"""Columns of what a user asks; a text in ``prompt`` is continued as it stands, in these it is a user's turn."""
PROMPTS = ("prompt", *QUESTIONS)
TURNS = ("conversations", "messages", "conversation", "trajectory", "context")
"""Columns whose turns are a prompt."""
CHAT_OPTIONS = ("tools", "chat_template_kwargs")
PROMPT_USES = (("prompt", "instruction+input+history", *PROMPTS[1:], *TURNS), SYSTEMS, *CHAT_OPTIONS)
"""What :func:`prompt_of`, :func:`with_system` and the record take of a row, as a format declares it."""
PLACEHOLDERS = ("<image>", "<video>", "<audio>")
"""What LLaMA-Factory and others put where an image, a video or a sound is."""


def has_prompt(fields: dict[str, Any]) -> bool:
    """Returns whether some column of a row may be the prompt of :func:`prompt_of`."""
    return any(fields.get(name) is not None for name in ("instruction", *PROMPTS)) or has_turns(fields)


def has_turns(fields: dict[str, Any]) -> bool:
    """Returns whether a column of :data:`TURNS` holds turns."""
    return any(holds_turns(fields.get(name)) for name in TURNS)


def holds_turns(value: Any) -> bool:
    """Returns whether a value is a list of chat turns of either kind."""
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and ("role" in value[0] or "from" in value[0])
    )


def prompt_of(row: SourceRow) -> Text:
    """Reads the prompt of a row from the first of the columns that have one; see :data:`PROMPT_USES`.

    ``input`` and ``history`` belong to ``instruction``. The text of a column of :data:`QUESTIONS` becomes a user's turn
    in :func:`with_system`, because the responses may be chats that repeat it.

    Raises:
        RowError: if there is none.
    """
    fields = row.fields
    name = first_of(fields, ("prompt", "instruction", *PROMPTS))
    if fields.get(name) is None and has_turns(fields):
        return read_turns(row, next(name for name in TURNS if holds_turns(fields.get(name))))
    if name == "instruction":
        return instruction_messages(row, name)
    return as_text(field_of(row, name), f"field {name!r}")


def instruction_messages(row: SourceRow, name: str) -> list[Message]:
    """Reads a question with its ``input`` and ``history`` as messages, joined as LLaMA-Factory joins them."""
    parts = [(part, row.fields.get(part)) for part in (name, "input")]
    question = "\n".join(plain_text(value, f"field {part!r}") for part, value in parts if value not in (None, ""))
    if not question.strip():
        raise RowError(f"field {name!r} is empty")
    return [*history_messages(row), {"role": "user", "content": question}]


def read_turns(row: SourceRow, name: str) -> list[Message]:
    """Reads a column of turns, each with ``from`` and ``value`` or with ``role`` and ``content``.

    Raises:
        RowError: naming the turn that is neither.
    """
    turns = field_of(row, name)
    if not isinstance(turns, list) or not turns:
        raise RowError(f"field {name!r} must be a list of turns, found {describe(turns)}")
    return [read_turn(turn, f"field {name!r}, turn {number}") for number, turn in enumerate(turns, 1)]


def history_messages(row: SourceRow) -> list[Message]:
    """Reads the column ``history``: pairs of question and answer."""
    rounds = row.fields.get("history") or []
    if not isinstance(rounds, list) or not all(isinstance(turns, list) and len(turns) == 2 for turns in rounds):
        raise RowError(f"field 'history' must list pairs of question and answer, found {describe(rounds)}")
    messages = []
    for place, (question, answer) in enumerate(rounds, 1):
        messages.append({"role": "user", "content": plain_text(question, f"field 'history', question {place}")})
        messages.append({"role": "assistant", "content": plain_text(answer, f"field 'history', answer {place}")})
    return messages


def read_answer(value: Any, what: str) -> list[Message]:
    """Reads one turn, a list of turns or a text as messages of a response."""
    if isinstance(value, str):
        return assistant_turn(encodable(value, what))
    turns = value if isinstance(value, list) else [value]
    if not turns:
        raise RowError(f"{what} is an empty list of turns")
    return [read_turn(turn, what) for turn in turns]


def assistant_turn(text: Text) -> list[Message]:
    """Returns a text as the assistant's turn, and messages as they are."""
    return [{"role": "assistant", "content": text}] if isinstance(text, str) else text


def with_system(row: SourceRow, prompt: Text, *responses: Text) -> tuple[Text, ...]:
    """Puts the row's system prompt before its prompt, and makes a user's turn of a question.

    Texts with a column ``system`` beside them are a chat, where it is empty too: all rows of a source are of one kind.

    Raises:
        RowError: if the question is empty, or the prompt begins with another system turn.
    """
    name = first_of(row.fields, SYSTEMS)
    value = row.fields.get(name)
    asked = first_of(row.fields, PROMPTS)
    texts = isinstance(prompt, str) and all(isinstance(response, str) for response in responses)
    if isinstance(prompt, str) and (asked in QUESTIONS or (texts and value is not None)):
        if asked in QUESTIONS and not prompt.strip():
            raise RowError(f"field {asked!r} is empty")
        prompt = [{"role": "user", "content": prompt}]
        responses = tuple(assistant_turn(response) for response in responses)
    system = "" if value is None else plain_text(value, f"field {name!r}")
    if not system.strip():
        return prompt, *responses
    if isinstance(prompt, str):
        raise RowError(f"field {name!r} stands beside chats whose prompt is a text")
    if prompt[0]["role"] in ("system", "developer"):
        if prompt[0]["content"].strip() != system.strip():
            raise RowError(f"field {name!r} and the system turn that the prompt begins with differ")
        return prompt, *responses
    return [{"role": "system", "content": system}, *prompt], *responses


def pair_record(row: SourceRow, prompt: Text | None, chosen: Text, rejected: Text) -> PreferenceRecord:
    """Makes the record of a prompt and two responses, which may repeat the prompt as their first messages.

    Args:
        row: Their row, for its system prompt, tools and arguments of the template.
        prompt: Text or chat; None where both responses are chats that begin with it.
        chosen: The preferred response.
        rejected: The other one.

    Raises:
        RowError: naming what is wrong with it.
        RowDropped: if the responses are identical.
    """
    if prompt is not None and is_chat(prompt) and isinstance(chosen, str) and isinstance(rejected, str):
        chosen, rejected = assistant_turn(chosen), assistant_turn(rejected)
    if is_chat(chosen) and is_chat(rejected):
        prompt, chosen, rejected = _without_prompt(prompt, chosen, rejected)
    if prompt is None:
        raise RowError("there is no prompt, and the responses are not chats that begin with one")
    prompt, chosen, rejected = with_system(row, prompt, chosen, rejected)
    check_placeholders(prompt)
    record = record_of(row, prompt, chosen, rejected)
    row.notes.extend(_notes(prompt, chosen, rejected))
    return record


def record_of(row: SourceRow, prompt: Text, chosen: Text, rejected: Text) -> PreferenceRecord:
    """Makes the record of a row whose texts are complete; see :func:`pair_record` for the errors."""
    check_kinds(prompt=prompt, chosen=chosen, rejected=rejected)
    return checked(PreferenceRecord(prompt, chosen, rejected, row.source, row.row, **chat_options(row, prompt)))


def shared_turns(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """Returns the longest common prefix of whole turns that leaves both a response."""
    most = min(len(chosen), len(rejected)) - 1
    differing = (i for i in range(most) if chosen[i] != rejected[i])
    return chosen[: next(differing, most)]


def check_placeholders(prompt: Text) -> None:
    """Refuses a prompt that begins or ends with the placeholder of an image, a video or a sound.

    Raises:
        RowError: naming the placeholder.
    """
    for text in [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]:
        if text.lstrip().startswith(PLACEHOLDERS) or text.rstrip().endswith(PLACEHOLDERS):
            found = next(mark for mark in PLACEHOLDERS if mark in text)
            raise RowError(
                f"the prompt has the placeholder {found} of {found[1:-1]} data, and training is on text alone; leave "
                "such rows out, or remove the placeholder with --dataset_format module:function"
            )


def _notes(prompt: Text, *responses: Text) -> list[str]:
    """Lists what a chat holds that its author may have meant otherwise."""
    notes = []
    if is_chat(prompt) and prompt[-1]["role"] == "assistant":
        notes.append("the prompt ends with the assistant's turn, which the responses follow and do not continue")
    if any(turn["role"] in ASKING_ROLES for response in responses if is_chat(response) for turn in response):
        notes.append("a response holds turns of other roles, which are trained on as a part of it")
    return notes


def _without_prompt(
    prompt: Text | None, chosen: list[Message], rejected: list[Message]
) -> tuple[Text | None, list[Message], list[Message]]:
    """Takes the turns that are the prompt from two chats.

    A prompt given as text may be one of the shared turns (``capybara``), and one given as messages the whole of them,
    their end, or all of the chosen chat (``messages`` in ``ultrafeedback_binarized``).
    """
    shared = shared_turns(chosen, rejected)
    if isinstance(prompt, str) or prompt is None:
        if prompt is None or any(turn["content"].strip() == prompt.strip() for turn in shared):
            if not shared:
                raise RowError("there is no field 'prompt', and the two chats do not begin with the same messages")
            return shared, chosen[len(shared) :], rejected[len(shared) :]
        if all(turns[0]["role"] in ASKING_ROLES for turns in (chosen, rejected)):
            raise RowError(
                f"the prompt, {describe(prompt)}, is none of the {len(shared)} turns that the chats 'chosen' and "
                "'rejected' begin with; without the prompt (--ignore_columns) these turns are taken"
            )
        return prompt, chosen, rejected
    count = len(prompt)
    if chosen[:count] == rejected[:count] == prompt:
        chosen, rejected = chosen[count:], rejected[count:]
        if not chosen or not rejected:
            raise RowError("a response is missing: chosen or rejected holds the prompt alone")
    elif shared and (shared[-count:] == prompt or prompt in (chosen, rejected)):
        return shared, chosen[len(shared) :], rejected[len(shared) :]
    return prompt, chosen, rejected
