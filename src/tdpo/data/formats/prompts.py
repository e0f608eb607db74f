"""Prompts of pairs: the columns they may be in, the system prompt before them, and the chats that repeat them."""

from __future__ import annotations

from typing import Any

from tdpo.data.formats.fields import (
    ASKING_ROLES,
    assistant_turn,
    chat_options,
    field_of,
    first_of,
    is_empty,
    mixed_kinds,
    plain_text,
    read_turns,
)
from tdpo.data.formats.report import RowDropped, RowError
from tdpo.data.sources import SourceRow, describe
from tdpo.types import Message, PreferenceRecord, Text

SYSTEMS = ("system", "system_prompt")
QUESTIONS = ("question", "query", "problem", "input", "inputs")
"""Columns of what a user asks; a text in ``prompt`` is continued as it stands, in these it is a user's turn."""
PROMPTS = ("prompt", *QUESTIONS)
ASKED = ("prompt", "instruction", *QUESTIONS)
TURNS = ("conversations", "messages", "conversation", "trajectory", "context")
"""Columns whose turns are a prompt."""
CHAT_OPTIONS = ("tools", "chat_template_kwargs")
CHAT_USES = (SYSTEMS, *CHAT_OPTIONS)
PROMPT_USES = (("prompt", "instruction+input+history", *QUESTIONS, *TURNS), *CHAT_USES)
"""Columns that :func:`prompt_of`, :func:`with_system` and the record use, as a format declares them."""
PLACEHOLDERS = ("<image>", "<video>", "<audio>")
"""Marks of LLaMA-Factory and others for an image, a video or a sound."""


def has_prompt(fields: dict[str, Any]) -> bool:
    """Returns whether some column of a row may be the prompt of :func:`prompt_of`."""
    return any(fields.get(name) is not None for name in ASKED) or turns_column(fields) is not None


def turns_column(fields: dict[str, Any]) -> str | None:
    """Names the column of :data:`TURNS` that holds turns."""
    return next((name for name in TURNS if holds_turns(fields.get(name))), None)


def holds_turns(value: Any) -> bool:
    """Returns whether a value is a list of chat turns of either kind."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and ("role" in first or "from" in first)


def prompt_of(row: SourceRow) -> Text:
    """Reads the prompt of a row from the first of the columns that have one; see :data:`PROMPT_USES`.

    The text of a question or instruction becomes a user's turn in :func:`with_system`, because the responses may be
    chats that repeat it.

    Raises:
        RowError: if there is none.
    """
    name = first_of(row.fields, ASKED)
    if row.fields.get(name) is None and (turns := turns_column(row.fields)) is not None:
        return field_of(row, turns, read_turns)
    return instruction_of(row, name) if name == "instruction" else field_of(row, name)


def instruction_of(row: SourceRow, name: str) -> Text:
    """Reads a question with its ``input``, joined as LLaMA-Factory joins them, behind the messages of ``history``."""
    question = joined_question(row, name, "input")
    if not question.strip():
        raise RowError(f"field {name!r} is empty")
    history = history_messages(row)
    return [*history, {"role": "user", "content": question}] if history else question


def joined_question(row: SourceRow, *names: str) -> str:
    """Joins the texts of those columns that a row has."""
    parts = [(name, row.fields.get(name)) for name in names]
    return "\n".join(plain_text(value, f"field {name!r}") for name, value in parts if value not in (None, ""))


def history_messages(row: SourceRow) -> list[Message]:
    """Reads the column ``history``: pairs of question and answer."""
    rounds = row.fields.get("history") or []
    if not isinstance(rounds, list) or not all(isinstance(turns, list) and len(turns) == 2 for turns in rounds):
        raise RowError(f"field 'history' must list pairs of question and answer, found {describe(rounds)}")
    return [
        {"role": role, "content": plain_text(text, f"field 'history', {what} {number}")}
        for number, turns in enumerate(rounds, 1)
        for role, what, text in zip(("user", "assistant"), ("question", "answer"), turns, strict=True)
    ]


def with_system(row: SourceRow, prompt: Text, *responses: Text) -> tuple[Text, ...]:
    """Puts the row's system prompt before its prompt; a question becomes a user's turn, and texts to a chat answers.

    Texts with a column ``system`` beside them are a chat, where it is empty too: all rows of a source are of one kind.

    Raises:
        RowError: if the question is empty, or the prompt begins with another system turn.
    """
    name = first_of(row.fields, SYSTEMS)
    value = row.fields.get(name)
    if isinstance(prompt, str):
        asked = first_of(row.fields, ASKED)
        if asked != "prompt" and not prompt.strip():
            raise RowError(f"field {asked!r} is empty")
        if asked != "prompt" or (value is not None and all(isinstance(response, str) for response in responses)):
            prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):
        responses = tuple(map(assistant_turn, responses))
    system = "" if value is None else plain_text(value, f"field {name!r}")
    if system.strip():
        if isinstance(prompt, str):
            raise RowError(f"field {name!r} stands beside chats whose prompt is a text")
        if prompt[0]["role"] not in ("system", "developer"):
            prompt = [{"role": "system", "content": system}, *prompt]
        elif prompt[0]["content"].strip() != system.strip():
            raise RowError(f"field {name!r} and the system turn that the prompt begins with differ")
    return prompt, *responses


def pair_record(row: SourceRow, prompt: Text | None, chosen: Text, rejected: Text) -> PreferenceRecord:
    """Makes the record of a prompt and two responses, which may repeat the prompt as their first messages.

    Args:
        row: Their row, for its system prompt, tools and arguments of the template.
        prompt: Text or chat; None where both responses are chats that begin with it.
        chosen: The preferred response.
        rejected: The other one.

    Raises:
        RowError: naming the field that is wrong.
        RowDropped: if the responses are identical.
    """
    if isinstance(prompt, list):
        chosen, rejected = assistant_turn(chosen), assistant_turn(rejected)
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, rejected = _without_prompt(prompt, chosen, rejected)
    if prompt is None:
        raise RowError("there is no prompt, and the responses are not chats that begin with one")
    prompt, chosen, rejected = with_system(row, prompt, chosen, rejected)
    check_placeholders(prompt)
    record = make_record(row, prompt, chosen, rejected)
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        row.notes.append("the prompt ends with the assistant's turn, which the responses follow and do not continue")
    if any(isinstance(side, list) and any(m["role"] in ASKING_ROLES for m in side) for side in (chosen, rejected)):
        row.notes.append("a response holds turns of other roles, which are trained on as a part of it")
    return record


def make_record(
    row: Any, prompt: Text, chosen: Text, rejected: Text, options: dict[str, Any] | None = None
) -> PreferenceRecord:
    """Makes the record of texts that are complete.

    Args:
        row: Their row, or anything with its location.
        prompt: The prompt.
        chosen: The preferred response.
        rejected: The other one.
        options: Further fields of the record; None reads them from the row.

    Raises:
        RowError: for an empty response, or one that begins with a question.
        RowDropped: if the responses are identical.
    """
    options = chat_options(row, prompt) if options is None else options
    if not isinstance(prompt, str) == isinstance(chosen, str) == isinstance(rejected, str):
        raise mixed_kinds(prompt=prompt, chosen=chosen, rejected=rejected)
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if is_empty(response):
            raise RowError(f"field {name!r} is an empty response")
        if isinstance(response, list) and (role := response[0]["role"]) in ASKING_ROLES:
            raise RowError(
                f"field {name!r} begins with a message of role {role!r}, and a response with the assistant's"
            )
    if chosen == rejected:
        raise RowDropped("chosen and rejected are identical")
    return PreferenceRecord(prompt, chosen, rejected, row.source, row.row, **options)


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


def _without_prompt(
    prompt: Text | None, chosen: list[Message], rejected: list[Message]
) -> tuple[Text | None, list[Message], list[Message]]:
    """Takes the turns that are the prompt from two chats.

    A prompt given as text may be one of the shared turns (``capybara``), and one given as messages the whole of them,
    their end, or all of the chosen chat (``messages`` in ``ultrafeedback_binarized``).
    """
    shared = shared_turns(chosen, rejected)
    count = len(shared)
    if isinstance(prompt, list):
        length = len(prompt)
        if chosen[:length] == rejected[:length] == prompt:
            if length in (len(chosen), len(rejected)):
                raise RowError("a response is missing: chosen or rejected holds the prompt alone")
            return prompt, chosen[length:], rejected[length:]
        repeats = shared and (shared[-length:] == prompt or prompt in (chosen, rejected))
    else:
        repeats = prompt is None or any(turn["content"].strip() == prompt.strip() for turn in shared)
        if repeats and not shared:
            raise RowError("there is no field 'prompt', and the two chats do not begin with the same messages")
        if not repeats and all(turns[0]["role"] in ASKING_ROLES for turns in (chosen, rejected)):
            raise RowError(
                f"the prompt, {describe(prompt)}, is none of the {count} turns that the chats 'chosen' and "
                "'rejected' begin with; without the prompt (--ignore_columns) these turns are taken"
            )
    return (shared, chosen[count:], rejected[count:]) if repeats else (prompt, chosen, rejected)
