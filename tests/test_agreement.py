"""``check-data``, ``train``, ``sft``, ``eval`` and ``generate`` agree on what is asked, and on what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model, preference_rows, write_jsonl
from test_omissions import CALLS, call, says
from test_tokenise import CHATML, chat_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from tdpo import UserError
from tdpo.cli import main
from tdpo.commands import generate
from tdpo.data.dataset import PairDataset, check_fits, prepare_pairs
from tdpo.data.sources import read_source
from tdpo.data.tokenise import Lengths, Rendering, Tokeniser
from tdpo.types import TokenisedPair

QUESTION = {"role": "user", "content": "Where is the river?"}
TOOLS = [{"type": "function", "function": {"name": "find", "description": "Finds a place.", "parameters": {}}}]


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of chats with a template that shows tools, calls and an argument."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = chat_tokenizer("{% if brief %}Be brief.\n{% endif %}" + CALLS)
    model = make_model(len(tokenizer))
    model.config.max_position_embeddings = 1024
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def larger_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has two tokens more than it has rows for, one of them the padding."""
    folder = tmp_path_factory.mktemp("larger") / "model"
    tokenizer = chat_tokenizer(CHATML)
    make_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["[MORE]"]})
    tokenizer.save_pretrained(folder)
    return folder


def commands(model: Path, data: Path, out: Path) -> dict[str, list[Any]]:
    named = ["--model_name_or_path", model, "--dataset_name", data]
    run = ["--max_steps", 1, "--use_cpu", "true", "--save_strategy", "no"]
    return {
        "check-data": ["check-data", *named],
        "train": ["train", *named, "--output_dir", out / "train", *run],
        "sft": ["sft", *named, "--output_dir", out / "sft", *run],
        "eval": ["eval", *named, "--ref_model_name_or_path", model, "--dataset_test_split", "train"],
        "generate": ["generate", *named, "--max_new_tokens", 2, "--dataset_test_split", "train"],
    }


def outcome(words: list[Any], capsys: pytest.CaptureFixture) -> tuple[int, str]:
    code = main([str(word) for word in words])
    return code, " ".join(capsys.readouterr().err.split())


def test_a_tokenizer_larger_than_the_model_is_used_as_far_as_the_model_goes(
    larger_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    size = AutoConfig.from_pretrained(larger_tokenizer).vocab_size
    data = write_jsonl(tmp_path / "rows.jsonl", preference_rows(2))
    for name, words in commands(larger_tokenizer, data, tmp_path).items():
        assert outcome(words, capsys)[0] == 0, name
    for name in ("train", "sft"):  # a padding token without a row would keep the saved model from loading
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert loaded.config.pad_token_id is None and loaded.config.vocab_size == size
    row = {"prompt": "The [MORE]", "chosen": " river", "rejected": " garden"}
    holding = write_jsonl(tmp_path / "holding.jsonl", [preference_rows(1)[0], *[row] * 2])
    message = f"holding.jsonl, row 2: token id {size + 1} is outside the model's vocabulary of {size}"
    for name, words in commands(larger_tokenizer, holding, tmp_path / "again").items():
        code, error = outcome([*words, "--special_tokens", "tokens"], capsys)
        assert code == 2 and message in error, name
        assert f"the tokenizer has {size + 2} tokens, the model's vocabulary {size} entries" in error


def test_rows_beyond_the_models_positions_stop_check_data_as_training(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    long = {"prompt": "The river", "chosen": " sees" * 200, "rejected": " no"}
    data = write_jsonl(tmp_path / "rows.jsonl", [preference_rows(1)[0], long])
    found = tmp_path / "found.json"
    for name, words in commands(model_folder, data, tmp_path).items():
        if name != "generate":  # which asks the prompts alone
            more = ["--json", found] if name == "check-data" else []
            code, error = outcome([*words, *more], capsys)
            assert code == 2 and "row 2: " in error and "but the model has 128 positions; set --max_length" in error
    content = json.loads(found.read_text())
    assert content["kept"] == 2 and "128 positions" in content["errors"][0]


def test_check_data_writes_what_it_found_though_no_pair_is_left(
    chat_folder: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    same = {"prompt": "Q", "chosen": " a", "rejected": " a"}
    bad = {"prompt": "Q", "chosen": 3, "rejected": " b"}
    found = tmp_path / "found.json"

    def run(model: Path, *rows: dict, more: tuple = ()) -> tuple[int, dict]:
        words = commands(model, write_jsonl(tmp_path / "rows.jsonl", list(rows)), tmp_path)["check-data"]
        found.unlink(missing_ok=True)
        return main([str(word) for word in (*words, "--json", found, *more)]), json.loads(found.read_text())

    code, content = run(model_folder, same, bad)
    assert code == 2 and (content["read"], content["kept"], content["examples"]) == (2, 0, [])
    assert content["dropped"]["chosen and rejected are identical"] == [1] and content["lengths"] == {}
    assert any("field 'chosen' must be a text" in error for error in content["errors"])
    assert any("no pair is left" in error for error in content["errors"])
    code, content = run(model_folder, same, more=("--on_bad_row", "drop"))
    assert code == 2 and len(content["errors"]) == 1 and "no pair is left" in content["errors"][0]
    code, content = run(model_folder, {"prompt": [QUESTION], "chosen": [says("a")], "rejected": [says("b")]})
    assert code == 2 and "no chat template" in content["errors"][0]
    code, content = run(model_folder, {"one": 1})
    assert code == 2 and "Known formats" in " ".join(content["errors"])
    assert "training would stop at this data" in capsys.readouterr().err


def test_examples_in_json_are_the_ids_that_are_trained_on(model_folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    rows = [*preference_rows(3), {"prompt": "Long river " * 30, "chosen": " a" * 30, "rejected": " b"}]
    data, found = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "found.json"
    limits = ["--max_length", "40", "--max_prompt_length", "20"]
    words = ["check-data", "--model_name_or_path", model_folder, "--dataset_name", data, "--json", found, *limits]
    assert main([str(word) for word in (*words, "--num_examples", 9)]) == 0
    examples = json.loads(found.read_text())["examples"]
    pairs = prepare_pairs(read_source(str(data), "train"), Tokeniser(tokenizer, Lengths(40, 20)))
    assert [TokenisedPair(e["prompt_ids"], e["chosen_ids"], e["rejected_ids"], e["row"]) for e in examples] == list(
        pairs
    )
    assert len(examples) == 4 and len(examples[3]["prompt_ids"]) == 20 and len(examples[3]["chosen_ids"]) == 20
    assert examples[0]["source"] == str(data) and examples[0]["prompt"] == rows[0]["prompt"]
    assert examples[0]["rejected"] == rows[0]["rejected"] + "<|endoftext|>"
    assert main([str(word) for word in (*words, "--num_examples", 0)]) == 0
    assert json.loads(found.read_text())["examples"] == []


def test_rows_that_differ_in_calls_thoughts_tools_or_arguments_alone_all_stay(
    chat_folder: Path, tmp_path: Path
) -> None:
    def row(place: str, rejected: str = "No.", **more: Any) -> dict:
        chosen = says("", tool_calls=call({"place": place}))
        return {"prompt": [QUESTION], "chosen": [chosen], "rejected": [says(rejected)], **more}

    lake = says("", tool_calls=call({"place": "lake"}))
    turned = {"prompt": [QUESTION], "chosen": [lake], "rejected": [says("", tool_calls=call('{"place": "river"}'))]}
    back = {"prompt": [QUESTION], "chosen": turned["rejected"], "rejected": [lake]}
    rows = [
        row("river"), row("garden"), row("river", tools=TOOLS), row("river", chat_template_kwargs={"brief": True}),
        row(" RIVER "), turned, back,
    ]  # fmt: skip
    rows[4]["chosen"] = [says("", tool_calls=call('{"place":   "river"}'))]  # repeats the first in another form
    data, fixed, found = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "fixed.jsonl", tmp_path / "found.json"
    held_out = write_jsonl(tmp_path / "eval.jsonl", [row("river", tools=TOOLS)])
    words = commands(chat_folder, data, tmp_path)["check-data"]
    more = ["--fix", fixed, "--json", found, "--eval_dataset_name", held_out]
    assert main([str(word) for word in (*words, *more)]) == 0
    content = json.loads(found.read_text())["rows"]
    assert content["repeated"] == [5] and content["leaks"] == [3] and content["contradicted"] == [6, 7]
    assert content["alike"] == []
    kept = [json.loads(line) for line in fixed.read_text().splitlines()]
    assert [{**rows[n], "tools": rows[n].get("tools")} for n in (0, 1, 3, 5, 6)] == [
        {**line, "tools": line.get("tools")} for line in kept
    ]


def test_records_that_became_no_pair_are_not_taken_for_their_neighbours(chat_folder: Path, tmp_path: Path) -> None:
    answers = ["same" + " river" * 60 + " one", "same" + " river" * 60 + " two", " short"]
    row = {"prompt": "Q", "completions": [{"text": t, "score": 3 - n} for n, t in enumerate(answers)]}
    data, found = write_jsonl(tmp_path / "rows.jsonl", [row]), tmp_path / "found.json"
    words = commands(chat_folder, data, tmp_path)["check-data"]
    more = ["--json", found, "--max_length", 40, "--max_prompt_length", 20, "--fix", tmp_path / "fixed.jsonl"]
    assert main([str(word) for word in (*words, *more)]) == 0
    assert json.loads(found.read_text())["dropped"] == {"chosen and rejected are identical after truncation": [1]}
    kept = [json.loads(line) for line in (tmp_path / "fixed.jsonl").read_text().splitlines()]
    assert [(line["chosen"], line["rejected"]) for line in kept] == [(answers[0], " short"), (answers[1], " short")]


def asked_by_generate(monkeypatch: pytest.MonkeyPatch, model: Path, data: Path, *more: str) -> list[list[int]]:
    asked: list[list[int]] = []

    def remember(lm: Any, ids: list[list[int]], *arguments: Any) -> list[list[list[int]]]:
        asked.extend(ids)
        return [[[0]] for _ in ids]

    monkeypatch.setattr(generate, "sample_ids", remember)
    words = ["generate", "--model_name_or_path", model, "--dataset_name", data, "--max_new_tokens", 2, *more]
    assert main([str(word) for word in words]) == 0
    return asked


def test_generate_asks_the_prompts_of_training_token_by_token(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = {"prompt": [QUESTION], "chosen": [says("Here.")], "rejected": [says("No.")]}
    shared = [{"role": "user", "content": "Hi"}]
    rows = [
        {**chat, "tools": TOOLS},
        {**chat, "chat_template_kwargs": {"brief": True}},
        {**chat, "chat_template_kwargs": {"brief": False}},
        {"prompt": "Hi", "chosen": [*shared, says("Here.")], "rejected": [*shared, says("No.")]},
        chat, {**chat, "chosen": [says("Another.")]},
    ]  # fmt: skip
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    tokenizer = chat_tokenizer("{% if brief %}Be brief.\n{% endif %}" + CALLS)
    for more in ((), ("--chat_template_kwargs", "brief=true")):
        rendering = Rendering({"brief": True} if more else {})
        pairs = prepare_pairs(read_source(str(data), "train"), Tokeniser(tokenizer, Lengths(900, 800), 1, rendering))
        assert isinstance(pairs, PairDataset)
        assert asked_by_generate(monkeypatch, chat_folder, data, *more) == [pair.prompt_ids for pair in pairs][:5]
    closed = tmp_path / "asks.jinja"  # asks with a thought that answers lack: training takes the prompt before them
    closed.write_text(CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}"))
    tokenizer.chat_template = closed.read_text()
    (pair, *_) = prepare_pairs(read_source(str(data), "train"), Tokeniser(tokenizer, Lengths(900, 800)))
    assert asked_by_generate(monkeypatch, chat_folder, data, "--chat_template_path", str(closed))[0] == pair.prompt_ids


def test_generate_asks_prompts_without_responses_as_they_are(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": [QUESTION], "tools": TOOLS}, {"prompt": [QUESTION], "chat_template_kwargs": {"brief": True}}]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    tokenizer = chat_tokenizer("{% if brief %}Be brief.\n{% endif %}" + CALLS)
    first, second = (tokenizer.decode(ids) for ids in asked_by_generate(monkeypatch, chat_folder, data))
    assert first.startswith('<tools>[{"type": "function"') and second.startswith("Be brief.\n<|im_start|>user\n")
    assert first.endswith("<|im_start|>assistant\n") and second.endswith("<|im_start|>assistant\n")


def test_generate_asks_questions_as_a_users_turn(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"question": "Why?", "system": "Be brief."}])
    asked = asked_by_generate(monkeypatch, chat_folder, data)
    data = write_jsonl(
        tmp_path / "pairs.jsonl", [{"question": "Why?", "system": "Be brief.", "chosen": "A.", "rejected": "B."}]
    )
    pairs = prepare_pairs(read_source(str(data), "train"), Tokeniser(chat_tokenizer(CALLS), Lengths(900, 800)))
    assert asked == [pairs[0].prompt_ids] == asked_by_generate(monkeypatch, chat_folder, data)
    assert chat_tokenizer(CALLS).decode(asked[0]).startswith("<|im_start|>system\nBe brief.")


def test_ids_are_checked_without_a_vocabulary_or_positions_too() -> None:
    pairs = [TokenisedPair([1], [2], [9], 5)]
    check_fits(pairs, None, None)
    with pytest.raises(
        UserError, match=r"pairs, row 5: token id 9 is outside the model's vocabulary of 9; .* \(the to"
    ):
        check_fits(pairs, 9, None, tokens=12)


def test_a_model_that_cannot_be_read_is_refused_by_both(
    tmp_path: Path, model_folder: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "unknown"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text('{"model_type": "unheard-of"}', encoding="utf-8")
    named = ["--model_name_or_path", str(folder), "--dataset_name", str(pairs_file)]
    for words in (["check-data", *named], ["train", *named, "--output_dir", str(tmp_path / "out")]):
        assert main(words) == 2
        assert "unheard-of" in capsys.readouterr().err, words[0]
