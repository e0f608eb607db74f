"""``tdpo check-data`` says of a dataset what training would make of it, by training's own code."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import END, make_tokenizer, preference_rows, write_jsonl
from rich.console import Console, RenderableType
from test_tokenise import sentencepiece_like

from tdpo import PreferenceRecord
from tdpo.cli import main
from tdpo.data.check import whole
from tdpo.data.formats import DataReport
from tdpo.data.tokenise import Lengths, Tokeniser
from tdpo.report.data import example, histogram

LENGTHS = ["--max_length=40", "--max_prompt_length=20"]


def rows_with_everything() -> list[dict]:
    rows: list[dict] = [dict(row) for row in preference_rows(8)]
    return [
        *rows,
        {"prompt": "Which?", "chosen": " The river.", "rejected": " The garden."},  # 9
        {"prompt": "Which? ", "chosen": " the garden.", "rejected": " The river."},  # 10: turned around
        {"prompt": "Which?", "chosen": " The  river.", "rejected": " the garden."},  # 11: repeats 9
        {"prompt": "Spaces", "chosen": " The river.", "rejected": " The river. "},  # 12: alike
        {"prompt": f"Say {END}", "chosen": " x", "rejected": " y"},  # 13: special-token text
        {"prompt": "Same", "chosen": " x", "rejected": " x"},  # 14: dropped
        {"prompt": "Long", "chosen": " the river" * 40, "rejected": " y"},  # 15: cut
        {"prompt": "The river likes the garden. " * 12, "chosen": " a", "rejected": " b"},  # 16: prompt cut
    ]


def shown(renderable: RenderableType) -> str:
    screen = Console(width=100, record=True, force_terminal=False, file=io.StringIO())
    screen.print(renderable)
    return screen.export_text()


def check_data(model: Path, data: Path, *more: object) -> int:
    words = ["check-data", "--model_name_or_path", model, "--dataset_name", data, *LENGTHS, *more]
    return main([str(word) for word in words])


def test_every_finding_is_named_by_row(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", rows_with_everything())
    held_out = write_jsonl(tmp_path / "eval.jsonl", [rows_with_everything()[0], rows_with_everything()[8]])
    json_file = tmp_path / "found.json"
    assert check_data(model_folder, data, "--eval_dataset_name", held_out, "--json", json_file) == 0
    found = json.loads(json_file.read_text())
    assert (found["read"], found["kept"], found["format"], found["errors"]) == (16, 15, "preference", [])
    assert found["dropped"] == {"chosen and rejected are identical": [14]}
    assert found["truncated"] == {"prompt": [16], "response": [15]}
    assert found["rows"] == {
        "repeated": [11],
        "repeated_prompts": [10],
        "contradicted": [9, 10, 11],
        "alike": [12],
        "special": [13],
        "leaks": [1, 9, 10, 11],
        "without_end": [15],
    }
    assert found["eval"]["kept"] == 2 and found["eval"]["rows"]["leaks"] == []
    output = capsys.readouterr().out
    assert re.search(r"4 +│ whose prompt is in the evaluation data +│ 1, 9, 10, 11", output)
    assert "15 │ pairs to train on" in output and "3 rows contradict another row of the same prompt" in output
    assert output.count("tokens of a sequence") == 2 and "row 1" in output and END in output


def test_lengths_are_those_before_truncation(model_folder: Path, tmp_path: Path, tokenizer: object) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", rows_with_everything())
    assert check_data(model_folder, data, "--json", tmp_path / "found.json", "--num_examples", 0) == 0
    records = [
        PreferenceRecord(r["prompt"], r["chosen"], r["rejected"])
        for r in rows_with_everything()
        if r["chosen"] != r["rejected"]
    ]
    pairs = Tokeniser(tokenizer, Lengths(10**6, 10**5)).pairs(records, DataReport(""))
    lengths = json.loads((tmp_path / "found.json").read_text())["lengths"]
    for name in ("prompt", "chosen", "rejected"):
        counts = [len(getattr(pair, f"{name}_ids")) for pair in pairs]
        assert lengths[name] == {f"p{p}": int(np.percentile(counts, p)) for p in (0, 5, 25, 50, 75, 95, 99, 100)}
    assert lengths["sequence"]["p100"] == max(
        len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs
    )


def test_bad_rows_end_it_with_2_after_all_is_told_and_fix_writes_the_rest(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [*rows_with_everything(), {"prompt": "a", "chosen": 3, "rejected": "b", "note": "שלום"}]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    with open(data, "a", encoding="utf-8") as file:
        file.write("{broken\n")
    assert check_data(model_folder, data, "--json", tmp_path / "found.json") == 2
    output = capsys.readouterr()
    assert "training would stop at this data" in output.err and "Traceback" not in output.err
    assert f"{data}, row 17: field 'chosen' must be a text" in output.err and "row 18: not valid JSON" in output.err
    assert "15 │ pairs to train on" in output.out
    assert len(json.loads((tmp_path / "found.json").read_text())["errors"]) == 3
    fixed = tmp_path / "fixed.jsonl"
    assert (
        check_data(
            model_folder, data, "--fix", fixed, "--eval_dataset_name", write_jsonl(tmp_path / "e.jsonl", rows[:1])
        )
        == 0
    )
    kept = [json.loads(line) for line in fixed.read_text(encoding="utf-8").splitlines()]
    assert kept == [row for number, row in enumerate(rows_with_everything(), 1) if number not in (1, 11, 14)]
    assert check_data(model_folder, fixed, "--fix", fixed) == 2
    assert "is a file of the dataset; it would be overwritten" in capsys.readouterr().err
    assert check_data(model_folder, fixed) == 0
    assert check_data(model_folder, data, "--on_bad_row", "drop") == 0


def test_training_reads_what_the_check_has_tokenised(
    model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ["--cache_dir", tmp_path / "cache"]
    assert check_data(model_folder, pairs_file, *cache) == 0
    monkeypatch.setattr(Tokeniser, "pairs", None)  # whatever would tokenise again
    words = ["train", "--model_name_or_path", model_folder, "--dataset_name", pairs_file, *LENGTHS, *cache]
    words += [
        "--output_dir",
        tmp_path / "out",
        "--max_steps",
        1,
        "--save_strategy",
        "no",
        "--use_cpu",
        "--disable_tqdm",
    ]
    assert main([str(word) for word in words]) == 0


def test_length_bias_is_hinted_at(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [{"prompt": f"Q{n}", "chosen": " long long" * 3, "rejected": " short"} for n in range(60)]
    assert check_data(model_folder, write_jsonl(tmp_path / "pairs.jsonl", rows)) == 0
    assert "chosen is the longer response in 100% of pairs" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
def test_an_example_shows_every_token_and_marks_what_was_cut(mode: str) -> None:
    tokenizer = sentencepiece_like()
    tokeniser = Tokeniser(tokenizer, Lengths(20, 8, mode))
    record = PreferenceRecord("abcdeabcdehilmnorst", "b" * 40, "d", "pairs.jsonl", 7)
    (pair,) = tokeniser.pairs([record], DataReport(""))
    output = shown(example(pair, whole(record, tokeniser), tokenizer, "row 7"))
    assert "prompt 8 tokens, 13 cut off" in output and "chosen 12 tokens, 29 cut off" in output
    cut = "<s>⟪cut off: abcdeabcdehi⟫lmnorst" if mode == "keep_end" else "<s>abcdea⟪cut off: bcdehilmnorst⟫"
    for line in (cut, "b" * 12 + "⟪cut off: " + "b" * 28 + "</s>⟫", "d</s>"):
        assert f"│ {line} " in output, line


def test_a_histogram_counts_every_sequence() -> None:
    lengths = np.array([*range(1, 400), 5000, 9000])
    output = shown(histogram(lengths, limit=128))
    counts = [int(line.split()[-1].replace(",", "")) for line in output.splitlines()[1:]]
    assert sum(counts) == len(lengths) and " 128  " in output
    assert shown(histogram(np.array([7]), limit=512)).splitlines()[1].split()[-1] == "1"


def test_mistakes_are_told_in_words(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert check_data(model_folder, tmp_path / "none.jsonl") == 2
    assert "no such file" in capsys.readouterr().err
    tokenised = write_jsonl(tmp_path / "ids.jsonl", [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}])
    assert check_data(model_folder, tokenised) == 2
    assert "token ids already" in capsys.readouterr().err
    chats = (
        [{"role": "user", "content": "Hi"}],
        [{"role": "assistant", "content": "a"}],
        [{"role": "assistant", "content": "b"}],
    )
    data = write_jsonl(tmp_path / "chats.jsonl", [dict(zip(("prompt", "chosen", "rejected"), chats, strict=True))])
    assert check_data(model_folder, data) == 2
    assert "one of chatml, zephyr, dialogue" in capsys.readouterr().err
    assert check_data(model_folder, data, "--chat_template_path", "dialogue") == 0
    assert "Human: Hi" in capsys.readouterr().out
    assert check_data(model_folder, data, "--chat_template_path", "chatlm") == 2
    assert "Did you mean 'chatml'?" in capsys.readouterr().err
    broken = tmp_path / "template.jinja"
    broken.write_text("{% for m in messages %}")
    assert check_data(model_folder, data, "--chat_template_path", broken) == 2
    assert "not a valid Jinja template" in capsys.readouterr().err


def test_make_tokenizer_is_the_models_own(tokenizer: object) -> None:
    assert make_tokenizer().get_vocab() == tokenizer.get_vocab()
