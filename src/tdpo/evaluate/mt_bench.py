"""Generates a chat model's answers to MT-Bench's questions, in FastChat's format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from tdpo.data.tokenise import Tokeniser, Turns
from tdpo.errors import UserError
from tdpo.evaluate.generate import Sampling, decode_response, end_tokens, sample_ids
from tdpo.evaluate.prompts import encode_prompts
from tdpo.evaluate.responses import Question
from tdpo.types import Message, PreferenceRecord


def answer_questions(
    model: nn.Module, tokenizer: Any, questions: Sequence[Question], sampling: Sampling, model_id: str
) -> list[dict[str, Any]]:
    """Answers every turn of each question, each with the turns before it in the prompt.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer, with a chat template.
        questions: The questions, all with the same number of turns.
        sampling: How responses are drawn; one for each turn.
        model_id: Name of the model in the rows.

    Returns:
        Rows with ``question_id``, ``model_id`` and ``choices``, as ``tdpo judge --mt_bench`` and FastChat read them.

    Raises:
        UserError: for more than one response per turn, and for a tokenizer without a chat template.
    """
    if sampling.num_samples != 1:
        raise UserError(f"num_samples is {sampling.num_samples}; MT-Bench has one answer to a turn")
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template, which conversations of several turns need")
    tokeniser = Tokeniser(tokenizer)
    conversations: list[list[Message]] = [[] for _ in questions]
    for turn in range(len(questions[0].turns)):
        for conversation, question in zip(conversations, questions, strict=True):
            conversation.append({"role": "user", "content": question.turns[turn]})
        records = [PreferenceRecord(list(c), "", "", "MT-Bench", number) for number, c in enumerate(conversations, 1)]
        asked = [Turns(record, record.prompt) for record in records]
        prompts = encode_prompts(tokeniser, asked, [model], sampling.max_new_tokens, None, "MT-Bench")
        sampled = sample_ids(model, [prompt.ids for prompt in prompts], sampling, end_tokens(model, tokenizer))
        for conversation, prompt, (response,) in zip(conversations, prompts, sampled, strict=True):
            text = decode_response(tokenizer, prompt.ids, response).strip()
            conversation.append({"role": "assistant", "content": text})
    answers = [[message["content"] for message in conversation[1::2]] for conversation in conversations]
    return [
        {"question_id": question.id, "model_id": model_id, "choices": [{"index": 0, "turns": turns}]}
        for question, turns in zip(questions, answers, strict=True)
    ]
