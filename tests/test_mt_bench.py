"""MT-Bench: both turns judged together, rates of categories, generated answers; and the page on judging runs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, make_model, make_tokenizer, write_jsonl
from judge_server import JudgeServer, judge_server, shown_responses
from transformers import PreTrainedTokenizerFast

from tdpo.cli import main
from tdpo.errors import UserError
from tdpo.evaluate.generate import Sampling
from tdpo.evaluate.mt_bench import answer_questions
from tdpo.evaluate.responses import Question

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
    {"question_id": 82, "category": "writing", "turns": ["Rhyme.", "Longer."]},
    {"question_id": 83, "category": "math", "turns": ["Add.", "Subtract."]},
]


@pytest.fixture
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A chat tokenizer of the test's own."""
    made = make_tokenizer()
    made.chat_template = TEMPLATE
    return made


def spread_model(vocab_size: int) -> torch.nn.Module:
    """A random model whose likeliest tokens depend on all that comes before."""
    model = make_model(vocab_size).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.5)
    return model


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with judge_server() as running:
        yield running


def answers(path: Path, turns: dict[int, list[str]]) -> Path:
    rows = [{"question_id": number, "choices": [{"index": 0, "turns": texts}]} for number, texts in turns.items()]
    return write_jsonl(path, rows)


def test_rates_of_categories_by_hand(server, tmp_path, capsys):
    write_jsonl(tmp_path / "q.jsonl", QUESTIONS)
    # The second turns decide: a win and a tie in writing, a loss in math.
    a = answers(tmp_path / "a.jsonl", {81: ["x", "good"], 82: ["good", "x"], 83: ["x", "x"]})
    b = answers(tmp_path / "b.jsonl", {83: ["x", "good"], 82: ["x", "good"], 81: ["x", "x"]})
    words = ["judge", "--mt_bench", tmp_path / "q.jsonl", "--responses_a", a, "--responses_b", b, "--json"]
    words += [tmp_path / "out.json", "--endpoint", server.url, "--judge_model", "m"]
    assert main([str(word) for word in words]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found["categories"]) == ["writing", "math"]
    assert [found["categories"][name]["win_rate"] for name in ("writing", "math")] == [0.75, 0]
    assert [found["categories"]["writing"][name] for name in ("wins", "ties", "losses")] == [1, 1, 0]
    assert (found["win_rate"], found["calls"]) == (0.5, 6)
    shown = {shown_responses(body["messages"][0]["content"]) for body, _ in server.requests}
    assert ("x good", "x x") in shown and ("x x", "x good") in shown
    output = capsys.readouterr().out
    assert re.search(r"writing\s+│\s+75.0%", output) and re.search(r"all\s+│\s+50.0%", output)
    own = tmp_path / "prompt.txt"
    own.write_text("{prompt} {response_a} {response_b}")
    assert main([*map(str, words), "--judge_prompt", str(own)]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "{prompt_2}, {response_a_2}, {response_b_2} missing for conversations of 2 turns" in message


def test_answers_are_those_of_decoding_by_hand(chat_tokenizer):
    tokenizer = chat_tokenizer
    model = spread_model(len(tokenizer))
    questions = [Question(1, "", ("The river", "Why?")), Question(2, "", ("The garden sees the market.", "Longer."))]
    rows = answer_questions(model, tokenizer, questions, Sampling(max_new_tokens=6, temperature=0), "m")
    assert [(row["question_id"], row["model_id"], len(row["choices"][0]["turns"])) for row in rows] == [
        (1, "m", 2), (2, "m", 2),
    ]  # fmt: skip
    assert len({turn for row in rows for turn in row["choices"][0]["turns"]}) == 4
    for row, question in zip(rows, questions, strict=True):
        chat: list[dict[str, Any]] = []
        for prompt, answered in zip(question.turns, row["choices"][0]["turns"], strict=True):
            chat.append({"role": "user", "content": prompt})
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            for _ in range(6):
                with torch.no_grad():
                    following = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
                ids.append(following)
                if following == tokenizer.eos_token_id:
                    break
            whole = tokenizer.decode(ids, skip_special_tokens=True)
            assert answered == whole[len(text) :].strip()
            chat.append({"role": "assistant", "content": answered})


def test_what_cannot_be_answered_is_refused(chat_tokenizer):
    tokenizer = chat_tokenizer
    model, questions = make_model(len(tokenizer)), [Question(1, "", ("a", "b"))]
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        answer_questions(model, tokenizer, questions, Sampling(), "m")
    with pytest.raises(UserError, match="one answer to a turn"):
        answer_questions(model, tokenizer, questions, Sampling(num_samples=2), "m")


def test_the_page_on_judging_runs(server, model_folder, chat_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(model_folder, "my-model")
    chat_tokenizer.save_pretrained("my-model")
    write_jsonl(Path("tdpo.jsonl"), [{"prompt": f"Q{n}", "response": "good" * n} for n in range(4)])
    write_jsonl(Path("sft.jsonl"), [{"prompt": f"Q{n}", "response": "good" * 2} for n in range(4)])
    write_jsonl(Path("samples.jsonl"), [{"prompt": "Q", "policy": ["good"], "reference": ["bad"]}])
    write_jsonl(Path("question.jsonl"), QUESTIONS)
    answers(Path("other-answers.jsonl"), {81: ["x", "x"], 82: ["x", "x"], 83: ["x", "x"]})
    Path("my_rewards.py").write_text("def by_length(texts):\n    return [float(len(text)) for text in texts]\n")
    page = (REPOSITORY / "docs" / "judge.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```py\n(.*?)^```", page, re.M | re.S)
    exec(compile(code.replace("max_new_tokens=1024", "max_new_tokens=4"), "docs/judge.md", "exec"), {})
    commands = re.findall(r"^tdpo (judge .*)$", page, re.M)
    rates = []
    for command in commands:
        Path("judged.json").unlink(missing_ok=True)
        assert main(shlex.split(command.replace("http://localhost:8000/v1", server.url))) == 0, command
        rates.append(json.loads(Path("judged.json").read_text())["win_rate"] if "--json" in command else None)
    # Longer repetitions of "good" win: 0 and 1 lose against 2, 2 ties, 3 wins.
    assert rates == [1.5 / 4, 1.0, 1.5 / 4, 0.5, None]
    assert len(json.loads(Path("outputs.json").read_text())) == 4
    (fields,) = re.findall(r"^\| JSON \|.*?\n\n", page, re.M | re.S)
    written = set(re.findall(r"`(\w+)`", "\n".join(line.split(" | ")[0] for line in fields.splitlines())))
    assert main(shlex.split(commands[0].replace("http://localhost:8000/v1", server.url))) == 0
    assert written == set(json.loads(Path("judged.json").read_text()))
