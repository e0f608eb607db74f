"""Texts that are rendered chats already: noticed, encoded as they are meant, and never with a second end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl
from test_tokenise import CHATML, chat_tokenizer, sentencepiece_like

from tdpo import PreferenceRecord, UserError
from tdpo.cli import main
from tdpo.data.dataset import prepare_pairs
from tdpo.data.formats import DataReport
from tdpo.data.sft import prepare_sft
from tdpo.data.tokenise import Lengths, Rendering, Tokeniser

ASKED = "<|im_start|>user\nWhich river?<|im_end|>\n<|im_start|>assistant\n"
ROW = {"prompt": ASKED, "chosen": "The river.<|im_end|>\n", "rejected": "The garden.<|im_end|>\n"}
PLAIN = {"prompt": "Which river?", "chosen": " The river.", "rejected": " The garden."}


def tokeniser(special_tokens: Any = None, tokenizer: Any = None) -> Tokeniser:
    rendering = Rendering(special_tokens=special_tokens)
    return Tokeniser(tokenizer or chat_tokenizer(CHATML), Lengths(400, 200), rendering=rendering)


def test_rendered_chats_have_the_ids_of_the_chats_themselves() -> None:
    as_tokens = tokeniser("tokens")
    chat = {"prompt": [{"role": "user", "content": "Which river?"}]}
    chat |= {side: [{"role": "assistant", "content": f"The {word}."}] for side, word in (("chosen", "river"),)}
    chat["rejected"] = [{"role": "assistant", "content": "The garden."}]
    (expected,) = prepare_pairs([chat], as_tokens)
    whole = {side: ASKED + ROW[side] for side in ("chosen", "rejected")}
    for row in (ROW, whole, {**ROW, "chosen": "The river.<|im_end|>"}):
        (pair,) = prepare_pairs([row], as_tokens)
        assert pair == expected
    start, end = (as_tokens.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    assert expected.prompt_ids.count(start) == 2 and expected.chosen_ids.count(end) == 1


def test_a_source_of_mostly_rendered_chats_is_refused_and_of_few_is_not() -> None:
    with pytest.raises(UserError, match=r"dataset: 3 of the first 4 rows .*\(row 2: '<\|im_start\|>'\).*--special_tok"):
        prepare_pairs([PLAIN, ROW, ROW, ROW], tokeniser())
    dataset = prepare_pairs([PLAIN, PLAIN, ROW], tokeniser())
    assert len(dataset) == 3
    (noticed,) = dataset.report.noticed.items()
    assert "'<|im_start|>' is encoded as plain text" in noticed[0] and noticed[1] == [3]
    as_text = prepare_pairs([ROW, ROW], tokeniser("text"))
    assert len(as_text) == 2 and not as_text.report.noticed
    decode = chat_tokenizer(CHATML).decode
    assert decode(as_text[0].chosen_ids) == ROW["chosen"] + "<|endoftext|>" and as_text[0].chosen_ids[-1] == 0


def test_chats_rendered_inside_a_users_turn_are_refused() -> None:
    answers = {"chosen": "The river.", "rejected": "The garden."}
    turn = {"role": "user", "content": "\n" + ASKED}
    for row in ({"question": ASKED, **answers}, {"prompt": [turn], **answers}, {"instruction": ASKED, **answers}):
        with pytest.raises(
            UserError, match=r"2 of .*\(row 1: '<\|im_start\|>' begins a user's turn\).*--columns prompt="
        ):
            prepare_pairs([row, row], tokeniser())
        assert len(prepare_pairs([row], tokeniser("text"))) == 1
    with pytest.raises(UserError, match="begins a user's turn"):
        prepare_sft([{"messages": [turn, {"role": "assistant", "content": "Yes."}]}], tokeniser())
    asks = {"question": "What is <|im_start|> for?", **answers, "chosen": "The river.<|im_end|>"}
    dataset = prepare_pairs([asks], tokeniser())
    assert dataset.report.noticed == {
        "a response ends in the text '<|im_end|>', which is encoded as plain text before the end token": [1]
    }
    as_tokens = prepare_pairs([{"prompt": ASKED, **answers}], tokeniser("tokens"))
    as_a_turn = prepare_pairs([{"question": "Which river?", **answers}], tokeniser())
    assert as_tokens[0].prompt_ids == as_a_turn[0].prompt_ids


def test_each_source_is_judged_by_its_own_rows() -> None:
    records = [PreferenceRecord("a", " b", " c", "plain.jsonl", row) for row in range(1, 200)]
    records += [PreferenceRecord(ASKED, "x", "y", "rendered.jsonl", row) for row in range(1, 4)]
    with pytest.raises(UserError, match=r"rendered\.jsonl: 3 of the first 3 rows"):
        prepare_pairs(records, tokeniser())


def test_an_end_token_in_texts_is_plain_text_and_named() -> None:
    rows = [{**PLAIN, "chosen": " The river.<|endoftext|>"}, {**PLAIN, "prompt": "<|endoftext|> in between"}]
    dataset = prepare_pairs(rows, tokeniser())
    (noticed,) = dataset.report.noticed.items()
    assert "a response ends in the text '<|endoftext|>'" in noticed[0] and noticed[1] == [1]
    eos = 0
    assert dataset[0].chosen_ids.count(eos) == 1
    assert prepare_pairs(rows[:1], tokeniser("tokens"))[0].chosen_ids.count(eos) == 1
    assert len(prepare_pairs(rows[:1], tokeniser("tokens"))[0].chosen_ids) < len(dataset[0].chosen_ids)


@pytest.mark.parametrize("special_tokens", [None, "text", "tokens"])
def test_control_tokens_of_another_family_are_named(special_tokens: Any) -> None:
    header = "<|start_header_id|>user<|end_header_id|>\n\nWhich?<|eot_id|>"
    rows = [{**PLAIN, "prompt": header}, {**PLAIN, "chosen": "[INST] no"}, PLAIN, {**PLAIN, "prompt": "a<b|c>|d|"}]
    noticed = prepare_pairs(rows, tokeniser(special_tokens)).report.noticed
    assert {rows[0]: what.split("'")[1] for what, rows in noticed.items()} == {1: "<|start_header_id|>", 2: "[INST]"}
    assert all("looks like a chat rendered for another tokenizer" in what for what in noticed)


def test_a_start_token_that_a_text_brings_is_not_added_again() -> None:
    spm = sentencepiece_like()
    rows = [{"prompt": "<s>a b", "chosen": "c</s>", "rejected": "d </s> "}, {**PLAIN, "prompt": "a b"}]
    first, second = prepare_pairs(rows, tokeniser("tokens", spm))
    assert first.prompt_ids[0] == second.prompt_ids[0] == 1
    assert first.prompt_ids.count(1) == second.prompt_ids.count(1) == 1
    assert first.chosen_ids.count(2) == first.rejected_ids.count(2) == second.chosen_ids.count(2) == 1


@pytest.mark.parametrize(
    ("header", "end"),
    [("<|im_start|>assistant\n", "<|im_end|>"), ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
     ("<start_of_turn>model\n", "<end_of_turn>"), (" [/INST]", "</s>"), ("<|assistant|>\n", "</s>"),
     ("<\uff5cAssistant\uff5c>", "<\uff5cend\uff5c>")],
)  # fmt: skip
def test_the_prompt_of_rendered_chats_ends_after_the_header_whatever_the_answers_share(header: str, end: str) -> None:
    whole = "Hi " + header + "Lake" + end + " and? " + header
    row = {"chosen": f"{whole}Lake Garda{end}", "rejected": f"{whole}Lake Como{end}"}
    seen = tokeniser("text")
    (pair,) = prepare_pairs([row], seen)
    assert seen.tokenizer.decode(pair.prompt_ids) == whole
    assert seen.tokenizer.decode(pair.chosen_ids[:-1]) == f"Lake Garda{end}"
    longer = {**row, "chosen": row["chosen"] + " and? " + header + "More"}
    report = prepare_pairs([row, longer], seen).report
    assert dict(report.dropped) == {"the two chats do not share their prompt": [2]}


def test_supervised_texts_that_are_rendered_chats_are_refused_or_encoded_as_tokens() -> None:
    rows = [{"text": ASKED + ROW["chosen"]}]
    with pytest.raises(UserError, match="--special_tokens tokens"):
        prepare_sft(rows, tokeniser())
    as_tokens = tokeniser("tokens")
    (example,) = prepare_sft(rows, as_tokens)
    assert as_tokens.tokenizer.decode(example.prompt_ids + example.response_ids) == (ASKED + ROW["chosen"]).rstrip()
    assert as_tokens.tokenizer.eos_token_id not in example.response_ids


def test_check_data_refuses_rendered_chats_unless_special_tokens_is_given(tmp_path: Path, model_folder: Path) -> None:
    folder = tmp_path / "tokenizer"
    chat_tokenizer(CHATML).save_pretrained(folder)
    data, found = write_jsonl(tmp_path / "rows.jsonl", [ROW, ROW]), tmp_path / "found.json"
    words = ["check-data", "--model_name_or_path", folder, "--dataset_name", data, "--json", found]

    def run(*more: str) -> tuple[int, dict]:
        return main([str(word) for word in (*words, *more)]), json.loads(found.read_text())

    code, content = run()
    assert code == 2 and content["kept"] == 0 and "--special_tokens tokens" in content["errors"][0]
    code, content = run("--special_tokens", "tokens")
    assert code == 0 and content["rows"]["special"] == [] and content["examples"][0]["prompt"] == ASKED
    tokens = content["examples"][0]["prompt_ids"]
    code, content = run("--special_tokens", "text")  # other ids than the cache holds for the tokens
    assert code == 0 and content["rows"]["special"] == [1, 2]
    assert len(content["examples"][0]["prompt_ids"]) > len(tokens)
    assert content["examples"][0]["chosen"].endswith("<|im_end|>\n<|endoftext|>")


def test_a_direct_call_does_not_refuse_rendered_chats() -> None:
    record = PreferenceRecord(ASKED, "x", "y", "rows.jsonl", 1)
    assert len(tokeniser().pairs([record], DataReport("rows.jsonl"))) == 1
