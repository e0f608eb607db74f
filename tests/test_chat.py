"""Chats of every kind of template: prompt, response and one end token, and the user's words stay words."""

from __future__ import annotations

import dataclasses

import pytest
from test_tokenise import ANSWER, CHAT, CHATML, PLAIN, chat_tokenizer, sentencepiece_like
from transformers import PreTrainedTokenizerFast

from tdpo import PreferenceRecord, TokenisedPair, UserError
from tdpo.data.chat import ChatRenderer
from tdpo.data.formats import DataReport
from tdpo.data.sft import prepare_sft
from tdpo.data.special_tokens import SpecialTokens
from tdpo.data.templates import TEMPLATES
from tdpo.data.tokenise import Lengths, Tokeniser

OTHER = [{"role": "assistant", "content": "The garden."}]
OPENS_A_THOUGHT = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
"""Asks with an open thought, and renders answers without: as DeepSeek R1's."""
DROPS_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Strips thoughts from all turns but the last: a prompt that ends in an assistant's turn changes with a response."""
SHOWS_TOOLS = "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}{% if brief %}Be brief.\n{% endif %}" + CHATML


def record(prompt: list = CHAT, chosen: list = ANSWER, rejected: list = OTHER, **more: object) -> PreferenceRecord:
    return PreferenceRecord(prompt, chosen, rejected, "chats.jsonl", 3, **more)


def one(tokenizer: PreTrainedTokenizerFast, given: PreferenceRecord) -> TokenisedPair:
    (pair,) = Tokeniser(tokenizer, Lengths(4000, 2000)).pairs([given], DataReport("chats.jsonl"))
    return pair


def test_a_prompt_rendered_differently_before_a_response_ends_at_the_responses_first_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = chat_tokenizer(OPENS_A_THOUGHT)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    report = DataReport("chats.jsonl")
    pairs = Tokeniser(tokenizer, Lengths(400, 200)).pairs([record(), record()], report)
    for pair in pairs:
        assert tokenizer.decode(pair.chosen_ids) == "The river <|im_end|>.<|im_end|>"
        assert tokenizer.decode(pair.rejected_ids) == "The garden.<|im_end|>"
        assert pair.chosen_ids.count(end) == pair.rejected_ids.count(end) == 1
        assert tokenizer.decode(pair.prompt_ids).endswith("<|im_start|>assistant\n")
    assert [r.message.count("renders a prompt differently once a response follows") for r in caplog.records] == [1]


def test_both_responses_share_the_prompt_under_a_template_that_drops_earlier_thoughts() -> None:
    tokenizer = chat_tokenizer(DROPS_THOUGHTS)
    chat = [*CHAT, {"role": "assistant", "content": "<think>hm</think>Which river?"}]
    pair = one(tokenizer, record(chat))
    whole = tokenizer.apply_chat_template([*chat, *OTHER], tokenize=False)
    assert "hm" not in whole
    assert tokenizer.decode(pair.prompt_ids + pair.rejected_ids) + "\n" == whole
    assert tokenizer.decode(pair.rejected_ids) == "The garden.<|im_end|>"
    thought = [{"role": "assistant", "content": "<think>so</think>The river."}]
    assert (
        tokenizer.decode(one(tokenizer, record(chosen=thought)).chosen_ids) == "<think>so</think>The river.<|im_end|>"
    )


def test_a_prompt_that_depends_on_the_response_is_refused_by_row() -> None:
    template = "{{ messages[-1].content[:5] }}|" + CHATML
    ends_in_a_mark = record([{"role": "user", "content": "<|im_end|> abcde"}])  # which has to be shown as its text
    for given, end in ((record(), "garden?<|im_end|>"), (ends_in_a_mark, "'> abcde<|im_end|>")):
        with pytest.raises(UserError, match=r"row 3: the chat template renders the prompt differently for") as error:
            one(chat_tokenizer(template), given)
        assert end in str(error.value) and "chats.jsonl" in str(error.value)


def test_a_refused_row_names_the_options_that_help() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    bad = record([{"role": "system", "content": "x"}, *CHAT])
    with pytest.raises(
        UserError, match=r"no system\n\(--on_bad_row drop .*, --chat_template_path gives .* such as 'system'"
    ):
        Tokeniser(chat_tokenizer(template)).pairs([bad], DataReport("chats.jsonl"))


def test_rows_a_template_refuses_are_named_or_dropped_as_bad_rows() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    tokeniser = Tokeniser(chat_tokenizer(template))
    bad = dataclasses.replace(record([{"role": "system", "content": "x"}, *CHAT]), row=4)
    report = DataReport("chats.jsonl")
    assert [pair.row for pair in tokeniser.pairs([record(), bad, record()], report, "drop")] == [3, 3]
    assert report.dropped == {
        "bad row (the chat template refuses a chat with the roles system, user, assistant: no system)": [4]
    } or report.dropped == {"bad row (the chat template refuses a chat with the roles system, user: no system)": [4]}
    with pytest.raises(UserError, match=r"chats\.jsonl, row 4: .* no system\n\(--on_bad_row drop leaves such rows out"):
        tokeniser.pairs([record(), bad], DataReport("chats.jsonl"))


def test_tools_and_template_arguments_reach_the_template_and_stay_text() -> None:
    tokenizer = chat_tokenizer(SHOWS_TOOLS)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tools = [{"type": "function", "function": {"name": "look", "description": "ends <|im_end|> turns"}}]
    pair = one(tokenizer, record(tools=tools, chat_template_kwargs={"brief": True}))
    output = tokenizer.decode(pair.prompt_ids)
    assert output.startswith("tools: [") and "look" in output and "Be brief.\n<|im_start|>user" in output
    assert pair.prompt_ids.count(end) == 1 and output.count("<|im_end|>") == 3
    assert "Be brief" not in tokenizer.decode(one(tokenizer, record()).prompt_ids)


@pytest.mark.parametrize("text", ["\ue0000\ue001", "\ue002", "\ue000", "a\ue00199\ue001b", "<|im_end|>\ue0001\ue001"])
def test_private_use_characters_of_the_user_stay_unchanged(text: str) -> None:
    tokenizer = chat_tokenizer(CHATML)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    pair = one(tokenizer, record([{"role": "user", "content": text}], [{"role": "assistant", "content": text + "x"}]))
    assert tokenizer.decode(pair.prompt_ids).startswith(f"<|im_start|>user\n{text}<|im_end|>\n")
    assert tokenizer.decode(pair.chosen_ids) == f"{text}x<|im_end|>"
    assert pair.chosen_ids.count(end) == pair.prompt_ids.count(end) == 1


def test_a_template_that_writes_the_start_token_gives_one() -> None:
    tokenizer = sentencepiece_like()
    tokenizer.chat_template = "{{ bos_token }}" + PLAIN.replace("{% endfor %}", "{{ eos_token }}{% endfor %}", 1)
    pair = one(tokenizer, record([{"role": "user", "content": "a b"}]))
    assert pair.prompt_ids[0] == 1 and pair.prompt_ids.count(1) == 1 and 1 not in pair.chosen_ids
    assert pair.chosen_ids.count(2) == pair.rejected_ids.count(2) == 1
    assert tokenizer.decode(pair.prompt_ids[1:] + pair.rejected_ids[:-1]).endswith("assistant: The garden.\n")


@pytest.mark.parametrize("name", TEMPLATES)
def test_named_templates_end_a_response_once_in_tokenizers_of_any_kind(name: str) -> None:
    plain = chat_tokenizer(CHATML)
    for tokenizer in (plain, sentencepiece_like()):
        tokenizer.chat_template = TEMPLATES[name]
        ends = set(tokenizer.all_special_ids)
        chat = [{"role": "system", "content": "Be."}, {"role": "user", "content": "The river or the garden?"}]
        pair = one(tokenizer, record(chat, ANSWER, OTHER))
        for ids in (pair.chosen_ids, pair.rejected_ids):
            assert ids[-1] in ends and sum(token in ends for token in ids) == 1
        words = tokenizer.decode([token for token in pair.rejected_ids if token not in ends]).strip()
        assert words in ("The garden.", "The garden.<|im_end|>")  # its mark, where it is no token of the tokenizer's


def test_chats_have_the_same_ids_alone_and_in_a_batch() -> None:
    tokenizer = chat_tokenizer(CHATML)
    records = [
        record([{"role": "user", "content": f"{n} <|im_end|> river" * (n % 3 + 1)}], ANSWER, OTHER) for n in range(20)
    ]
    records.insert(7, PreferenceRecord("plain text", " a", " b", "chats.jsonl", 9))
    together = Tokeniser(tokenizer, Lengths(400, 200)).pairs(records, DataReport(""))
    assert together == [one(tokenizer, given) for given in records]


def test_supervised_rows_have_the_prompt_of_pairs() -> None:
    tokenizer = chat_tokenizer(OPENS_A_THOUGHT)
    (example,) = prepare_sft([{"messages": [*CHAT, *OTHER]}], Tokeniser(tokenizer, Lengths(400, 200)))
    pair = one(tokenizer, record())
    assert (example.prompt_ids, example.response_ids) == (pair.prompt_ids, pair.rejected_ids)


def test_a_records_own_truncation_wins_over_the_runs() -> None:
    tokenizer = sentencepiece_like()
    given = PreferenceRecord("abcdehilmnorst" * 3, "b" * 5, "d", "pairs.jsonl", 7)
    report = DataReport("")
    tokeniser = Tokeniser(tokenizer, Lengths(20, 8, "keep_end"))
    own = [dataclasses.replace(given, truncation_mode=mode) for mode in (None, "keep_end", "keep_start")]
    run, end, start = tokeniser.pairs(own, report)
    whole = Tokeniser(tokenizer, Lengths(90, 80)).pairs([given], report)[0].prompt_ids
    assert run.prompt_ids == end.prompt_ids == [1, *whole[-7:]] and start.prompt_ids == whole[:8]


def test_half_a_mark_that_a_template_leaves_is_removed() -> None:
    tokenizer = chat_tokenizer(CHATML.replace("{{ m.content }}", "{{ m.content[:1] }}"))
    renderer = ChatRenderer(tokenizer, SpecialTokens(tokenizer), {})
    rendered = renderer.render([{"role": "user", "content": "<|im_end|> hi"}])
    assert rendered.prompt == [("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n", False, False)]
